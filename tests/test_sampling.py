import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flaxgpt.generation.sampling import NOT_A_NUMBER, keep_likely, sample

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 40  # vocabulary size in these tests

logits_arrays = hnp.arrays(
    np.float32,
    (2, SIZE),
    elements=st.floats(-30, 30, width=32),
    unique=True,  # equal logits are tested separately
)


def huggingface_keeps(logits, top_k, top_p):
    """Return which ids TopKLogitsWarper and then TopPLogitsWarper keep, in float64."""
    scores = logits.astype(np.float64)
    if top_k < scores.size:
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    if top_p < 1:
        ascending = np.argsort(scores)
        probs = np.exp(scores[ascending] - scores.max())
        cumulative = np.cumsum(probs / probs.sum())
        removed = cumulative <= 1 - top_p
        removed[-1] = False
        near = np.abs(cumulative - (1 - top_p)) < 1e-6  # float32 may decide either way
        return np.isfinite(scores), ascending[removed], ascending[near]
    return np.isfinite(scores), np.array([], int), np.array([], int)


@settings(max_examples=100)
@given(logits_arrays, st.integers(1, SIZE), st.floats(0.015625, 1.0, width=32))
def test_top_k_and_top_p_keep_what_hugging_face_keeps(logits, top_k, top_p):
    kept = jax.jit(keep_likely)(logits, jnp.int32(top_k), jnp.float32(top_p))
    for row, actual in zip(logits, np.asarray(kept), strict=True):
        expected, removed, undecided = huggingface_keeps(row, top_k, top_p)
        expected[removed] = False
        decided = np.ones(SIZE, bool)
        decided[undecided] = False
        np.testing.assert_array_equal(np.isfinite(actual)[decided], expected[decided])
        np.testing.assert_array_equal(actual[np.isfinite(actual)], row[np.isfinite(actual)])


@settings(max_examples=50)
@given(
    logits_arrays,
    st.floats(0.015625, 5.0, width=32),
    st.integers(1, SIZE),
    st.floats(0.015625, 1.0, width=32),
    st.integers(0, 2**32 - 1),
)
def test_a_drawn_id_is_always_among_those_kept(logits, temperature, top_k, top_p, seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    values = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    ids = jax.jit(sample)(logits, keys, *values)
    relative = (logits - logits.max(-1, keepdims=True)) / values[0]
    kept = np.isfinite(jax.jit(keep_likely)(relative, *values[1:]))
    assert kept[np.arange(2), ids].all()


def test_equal_logits_are_kept_or_dropped_together():
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0, -0.0, -1.0]])
    kept = jax.jit(keep_likely)(logits, jnp.int32(1), jnp.float32(1.0))
    np.testing.assert_array_equal(np.isfinite(kept)[0], [0, 1, 0, 1, 0, 0])
    kept = jax.jit(keep_likely)(logits, jnp.int32(4), jnp.float32(1.0))
    np.testing.assert_array_equal(np.isfinite(kept)[0], [1, 1, 1, 1, 1, 0])


def test_top_k_of_all_and_top_p_of_1_keep_every_id():
    logits = jax.random.normal(jax.random.key(0), (3, SIZE)) * 20
    np.testing.assert_array_equal(keep_likely(logits, jnp.int32(SIZE), jnp.float32(1.0)), logits)


def test_a_tiny_top_p_keeps_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (3, SIZE))
    kept = np.isfinite(keep_likely(logits, jnp.int32(SIZE), jnp.float32(1e-6)))
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))
    assert (kept.sum(-1) == 1).all()


def draw(logits, temperature, top_k=SIZE, top_p=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(logits))
    return sample(
        jnp.asarray(logits, jnp.float32),
        keys,
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
    )


def test_temperature_0_is_the_likeliest_and_the_lowest_id_among_equals():
    np.testing.assert_array_equal(draw([[0, 3, 3, 1], [5, 0, 0, 5]], 0.0), [1, 0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_tiny_temperature_and_huge_logits_stay_finite(temperature, scale):
    logits = np.array([[0.0, 2.0, 1.0], [-3.0, -2.0, -1.0]]) * scale
    np.testing.assert_array_equal(draw(logits, temperature), [1, 2])


def test_draws_have_the_softmax_probabilities():
    logits = np.log([[0.5, 0.3, 0.2]])
    temperature = 0.5  # squares the probabilities before normalizing
    ids = draw(np.repeat(logits, 20_000, 0), temperature)
    expected = np.array([0.25, 0.09, 0.04]) / 0.38
    frequency = np.bincount(ids, minlength=3) / 20_000
    np.testing.assert_allclose(frequency, expected, atol=0.014)  # 4 standard errors


def test_a_row_with_nan_draws_no_id():
    logits = np.array([[0.0, np.nan, 1.0], [0.0, 1.0, 2.0]])
    np.testing.assert_array_equal(draw(logits, 0.0), [NOT_A_NUMBER, 2])
    assert draw(logits, 1.0)[0] == NOT_A_NUMBER


def test_a_row_draws_the_same_alone_and_in_company():
    logits = jax.random.normal(jax.random.key(0), (4, SIZE))
    keys = jax.random.split(jax.random.key(1), 4)
    values = jnp.float32(1.0), jnp.int32(5), jnp.float32(0.9)
    together = sample(logits, keys, *values)
    alone = [sample(logits[i : i + 1], keys[i : i + 1], *values)[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)
