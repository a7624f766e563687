"""Exact ids of `generate` and `stream`, compiled with full optimization."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.generation import Sampling, programs
from flaxgpt.generation.prompts import prepare
from flaxgpt.platform import Platform

SLOW = pytest.mark.slow
OTHERS = ("book-small", "book-qkv-bias", "hf-gelu-eps", "hf-inverse-layer")


@pytest.mark.parametrize(
    "name",
    ["hf-small", *(pytest.param(name, marks=SLOW) for name in OTHERS)],
)
def test_greedy_ids_are_pytorchs_through_the_context_limit(name):
    cfg, params, expected = golden.model(name)
    ids, full = expected["input_ids"], expected["greedy_ids"]
    new = full[:, ids.shape[1] :]
    assert flaxgpt.generate(cfg, params, ids, new.shape[1]) == new.tolist()
    for row, continuation in zip(ids, new.tolist(), strict=True):
        assert list(flaxgpt.stream(cfg, params, row, len(continuation))) == continuation


def test_ragged_greedy_ids_are_those_of_each_row_alone_in_pytorch():
    cfg, params, expected = golden.model("hf-small")
    lengths, new = expected["ragged_lengths"], expected["ragged_new_ids"]
    rows = [row[:n].tolist() for row, n in zip(expected["input_ids"], lengths, strict=True)]
    assert flaxgpt.generate(cfg, params, rows, new.shape[1]) == new.tolist()


@pytest.mark.parametrize("name", ["book-small", pytest.param("hf-small", marks=SLOW)])
def test_ragged_rows_past_the_context_are_the_books_crop(name):
    cfg, params, expected = golden.model(name)
    rows = [
        golden.prompt(name, 3),
        golden.prompt(name, expected["input_ids"].shape[1], 1),
        golden.prompt(name, 7),
    ]
    new = cfg.context_length + 3
    out = flaxgpt.generate(cfg, params, rows, new)
    for row, continuation in zip(rows, out, strict=True):
        ids = row + continuation
        ends = range(len(row), len(ids))
        windows = [ids[max(0, end - cfg.context_length) : end] for end in ends]
        padded = np.array([w + [0] * (cfg.context_length - len(w)) for w in windows])
        logits = flaxgpt.forward(cfg, params, padded)
        last = np.array([len(w) - 1 for w in windows])
        best = np.asarray(logits)[np.arange(len(windows)), last].argmax(-1)
        assert continuation == best.tolist()


def test_a_prompt_longer_than_the_context_is_cropped_as_in_the_book():
    cfg, params, _ = golden.model("book-small")
    long = np.random.default_rng(0).integers(0, cfg.vocab_size, 3 * cfg.context_length).tolist()
    out = flaxgpt.generate(cfg, params, [long, long[-cfg.context_length :]], 5)
    assert out[0] == out[1]


@pytest.mark.parametrize("layout", ["separate", "joined", pytest.param("merged", marks=SLOW)])
def test_all_cache_layouts_give_the_same_ids(layout):
    cfg, params, expected = golden.model("book-small")
    ids, full = expected["input_ids"], expected["greedy_ids"]
    new = full.shape[1] - ids.shape[1]
    program, *arrays = prepare(cfg, params, ids, new, Sampling(), "float32")
    program = dataclasses.replace(program, platform=Platform(cache_layout=layout))
    out = jax.jit(programs.decode, static_argnums=0)(program, *arrays)
    np.testing.assert_array_equal(out[:, : full.shape[1]], full)


def assert_rows_are_independent(lengths, seed, greedy):
    """Assert that each row of a batch gets the same ids as on its own."""
    cfg, params, _ = golden.model("book-small")
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, cfg.vocab_size, n).tolist() for n in lengths]
    options = {} if greedy else {"temperature": 1.2, "top_k": 40, "top_p": 0.95}
    key = jax.random.key(seed)
    together = flaxgpt.generate(cfg, params, rows, 6, key=key, **options)
    for i, row in enumerate(rows):
        own = jax.random.fold_in(key, i)[None]
        assert flaxgpt.generate(cfg, params, [row], 6, key=own, **options) == [together[i]]


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_does_not_depend_on_its_companions(greedy):
    assert_rows_are_independent([3, 14, 9], 0, greedy)  # one size class, so one program is compiled


@SLOW
@settings(max_examples=12)  # most of them compile programs of their own
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
    greedy=st.booleans(),
)
def test_a_row_of_any_length_does_not_depend_on_its_companions(lengths, seed, greedy):
    assert_rows_are_independent(lengths, seed, greedy)
