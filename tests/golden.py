"""The golden values: what PyTorch computes, with the book's code and with Hugging Face's."""

import functools
import json
from pathlib import Path

import numpy as np

import flaxgpt

FOLDER = Path(__file__).parent / "golden"
DATA = Path(__file__).parent / "data"

# Two float32 computations of one function that sum in another order differ by some units in the
# last place of the largest terms: 2e-5 of the largest logit is 170 of them, and is 10 times what
# is seen, while a wrong formula (GELU's other form, say) is off by 1e-3.
LOGITS_TOLERANCE = 2e-5


@functools.cache
def model(name):
    """Return the configuration, parameters and expected values of a small golden model."""
    cfg, params, _ = flaxgpt.load(FOLDER / name)
    with np.load(FOLDER / name / "expected.npz") as file:
        return cfg, params, dict(file)


def prompt(name, length, row=0):
    """Return the first ids of a golden model's input."""
    return model(name)[2]["input_ids"][row, :length].tolist()


@functools.cache
def book_values():
    """Return what the book prints."""
    return json.loads((FOLDER / "book_values.json").read_text())


def assert_logits_agree(actual, expected):
    """Assert that logits are equal but for rounding, relative to the largest."""
    difference = np.abs(np.asarray(actual) - np.asarray(expected)).max()
    assert difference <= LOGITS_TOLERANCE * np.abs(expected).max(), difference
