"""Attention implementations agree with each other and with the rule of visibility."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.model.attend import IMPLEMENTATIONS, attend, query_blocks
from flaxgpt.model.visibility import Visibility

# Compiled as one program, which is quicker than operation by operation.
compiled = jax.jit(attend, static_argnames="implementation")

# Sums of up to 300 products in another order: some units in the last place of values near 1.
CLOSE = {"rtol": 0, "atol": 5e-6}


@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    offset=st.integers(0, 5),
    window=st.none() | st.integers(1, 9),
    queries=st.integers(1, 6),
    keys=st.integers(1, 9),
)
def test_a_mask_states_the_rule_key_by_key(starts, offset, window, queries, keys):
    visibility = Visibility(jnp.array(starts), jnp.int32(offset), window)
    mask = np.asarray(visibility.mask(range(queries), range(keys)))
    assert mask.shape == (len(starts), 1, queries, keys)
    for (row, _, query, key), seen in np.ndenumerate(mask):
        position = offset + query
        within = window is None or key > position - window
        assert seen == (starts[row] <= key <= position and within)


def arrays(queries, keys, batch=2, heads=2, size=8):
    """Return a query, keys and values, normal at random."""
    shapes = [(batch, heads, length, size) for length in (queries, keys, keys)]
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def reference(query, keys, values, visibility):
    """Return attention in float64 NumPy, each query by itself."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    scores = query @ keys.swapaxes(-1, -2) / query.shape[-1] ** 0.5
    mask = np.asarray(visibility.mask(range(query.shape[2]), range(keys.shape[2])))
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("visibility", "queries", "keys"),
    [
        (Visibility(), 9, 9),
        (Visibility(window=3), 9, 9),
        (Visibility(), 300, 300),  # of more than one block of queries
        (Visibility(window=40), 300, 300),
        (Visibility(offset=jnp.int32(5)), 4, 12),
        (Visibility(start=jnp.array([0, 2]), offset=jnp.int32(5)), 4, 12),
        (Visibility(start=jnp.array([0, 2]), offset=jnp.int32(5), window=4), 4, 12),
    ],
    ids=["causal", "window", "blocks", "blocks-window", "offset", "padding", "all"],
)
def test_each_implementation_follows_the_rule(implementation, visibility, queries, keys):
    inputs = arrays(queries, keys)
    found = compiled(*inputs, visibility, implementation=implementation)
    np.testing.assert_allclose(found, reference(*inputs, visibility), **CLOSE)


def test_queries_of_300_are_read_in_blocks():
    assert len(query_blocks(300)) > 1


def test_a_query_that_sees_nothing_gets_finite_values():
    visibility = Visibility(start=jnp.array([3, 3]), offset=jnp.int32(0))
    for implementation in IMPLEMENTATIONS:
        found = compiled(*arrays(2, 6), visibility, implementation=implementation)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("window", [None, 40])
def test_implementations_have_the_same_gradients(window):
    def total(implementation):
        def function(*inputs):
            context = attend(*inputs, Visibility(window=window), implementation=implementation)
            return jnp.sin(context).sum()

        return jax.jit(jax.grad(function, argnums=(0, 1, 2)))(*arrays(150, 150))

    for plain, other in zip(total("plain"), total("dot_product"), strict=True):
        np.testing.assert_allclose(plain, other, **CLOSE)


def test_logits_are_pytorchs_with_every_implementation():
    cfg, params, expected = golden.model("hf-small")
    for implementation in IMPLEMENTATIONS:
        logits = flaxgpt.forward(cfg, params, expected["input_ids"], attention=implementation)
        golden.assert_logits_agree(logits, expected["logits"])


def test_a_cache_is_extended_with_every_implementation():
    cfg, params, expected = golden.model("book-small")
    ids = expected["input_ids"]
    for implementation in IMPLEMENTATIONS:
        cache = flaxgpt.init_cache(cfg, len(ids), 12)
        _, cache = flaxgpt.extend(cfg, params, ids[:, :8], cache, attention=implementation)
        logits, _ = flaxgpt.extend(cfg, params, ids[:, 8:12], cache, attention=implementation)
        golden.assert_logits_agree(logits, flaxgpt.forward(cfg, params, ids[:, :12])[:, 8:])


def test_an_implementation_without_dropout_refuses_it():
    cfg, params, expected = golden.model("book-small")
    with pytest.raises(ValueError, match=r'attention="dot_product" has no dropout.*use attention='):
        flaxgpt.forward(
            flaxgpt.GPTConfig(**{**cfg.to_dict(), "drop_rate": 0.1}),
            params,
            expected["input_ids"],
            dropout_key=jax.random.key(0),
            attention="dot_product",
        )


def test_an_unknown_implementation_is_refused():
    cfg, params, expected = golden.model("book-small")
    with pytest.raises(ValueError, match=r"unknown attention implementation 'flash'.*plain"):
        flaxgpt.forward(cfg, params, expected["input_ids"], attention="flash")
