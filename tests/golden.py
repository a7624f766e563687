"""Golden values, computed by PyTorch with the book's code and with transformers."""

import functools
import json
from pathlib import Path

import numpy as np

import flaxgpt

FOLDER = Path(__file__).parent / "golden"
DATA = Path(__file__).parent / "data"
# Models of nanoGPT, of transformers with other options than GPT-2's, and of transformers' Flax.
FOREIGN = ("nanogpt-small", "hf-gelu-eps", "hf-inverse-layer", "hf-flax-msgpack")

# Two float32 computations that sum in a different order differ by some units in the last place of
# the largest terms. 2e-5 of the largest logit is 170 such units and 10 times the difference that is
# observed. A wrong formula, such as GELU's other form, is off by 1e-3.
LOGITS_TOLERANCE = 2e-5


@functools.cache
def model(name):
    """Return the configuration, parameters and expected values of a small golden model."""
    cfg, params, _ = flaxgpt.load(FOLDER / name)
    with np.load(FOLDER / name / "expected.npz") as file:
        return cfg, params, dict(file)


@functools.cache
def generation_cases():
    """Return what transformers generates with hf-small: a list of cases."""
    return json.loads((FOLDER / "generation" / "hf-small.json").read_text())


def prompt(name, length, row=0):
    """Return the first ids of a golden model's input."""
    return model(name)[2]["input_ids"][row, :length].tolist()


@functools.cache
def book_values():
    """Return the values that the book prints."""
    return json.loads((FOLDER / "book_values.json").read_text())


def assert_logits_agree(actual, expected):
    """Assert that logits agree up to rounding, relative to the largest one."""
    difference = np.abs(np.asarray(actual) - np.asarray(expected)).max()
    assert difference <= LOGITS_TOLERANCE * np.abs(expected).max(), difference
