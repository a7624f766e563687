"""Prompts that are read a few rows at a time, compared with prompts that are read all at once."""

import dataclasses

import jax
import numpy as np
import pytest

import golden
from flaxgpt.generation import programs
from flaxgpt.generation.prompts import prepare
from flaxgpt.generation.sampling import Sampling
from flaxgpt.platform import Platform

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]


def prepared(rows, layout, positions):
    """Return a program for prompts of different lengths, padded to 16 ids, and its arguments."""
    cfg, params, _ = golden.model("book-small")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (12, 3, 7, 1, 12)[:rows]]
    program, *arrays = prepare(cfg, params, prompts, 6, Sampling(), "float32")
    platform = Platform(cache_layout=layout, prompt_positions=positions)
    return dataclasses.replace(program, platform=platform), arrays


def decoded(*arguments):
    program, arrays = prepared(*arguments)
    return np.asarray(jax.jit(programs.decode, static_argnums=0)(program, *arrays))


@pytest.mark.parametrize(
    ("at_once", "layout"), [(1, "merged"), (2, "separate"), (2, "merged"), (2, "joined")]
)
def test_reading_a_few_rows_at_a_time_gives_the_same_ids(at_once, layout):
    together = decoded(5, layout, 2**13)
    np.testing.assert_array_equal(decoded(5, layout, 16 * at_once), together)


def test_the_loop_that_reads_prompts_contains_no_scan():
    program, arrays = prepared(5, "merged", 16)
    jaxpr = jax.make_jaxpr(programs.decode, static_argnums=0)(program, *arrays)
    assert "scan[" not in str(jaxpr)


def test_a_prompt_longer_than_the_limit_is_read_whole():
    assert Platform(prompt_positions=16).prompts_at_once(17) == 1
