"""Attention implementations agree with each other and with the rule of visibility."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.model.attend import IMPLEMENTATIONS, attend, query_blocks
from flaxgpt.model.attend.joined import joined_attend
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform

# Compiled as one program, which is quicker than operation by operation.
compiled = jax.jit(attend, static_argnums=4)


def using(implementation):
    """Return a platform that attends by this implementation, a kernel being interpreted."""
    dtypes = ("float32", "bfloat16", "float16")
    return Platform(attention=tuple((dtype, implementation) for dtype in dtypes))


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
    scores = np.where(mask, scores, -1e300)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("visibility", "queries", "keys"),
    [
        (Visibility(), 9, 9),
        (Visibility(window=3), 9, 9),
        (Visibility(), 300, 300),  # of more than one block of queries
        (Visibility(window=40), 300, 300),
        (Visibility(start=jnp.array([0, 140])), 300, 300),
        (Visibility(start=jnp.array([0, 140]), window=40), 300, 300),
        (Visibility(offset=jnp.int32(5)), 4, 12),
        (Visibility(start=jnp.array([0, 2]), offset=jnp.int32(5)), 4, 12),
        (Visibility(start=jnp.array([0, 2]), offset=jnp.int32(5), window=4), 4, 12),
    ],
    ids=[
        "causal",
        "window",
        "blocks",
        "blocks-window",
        "blocks-padding",
        "blocks-all",
        "offset",
        "padding",
        "all",
    ],
)
def test_each_implementation_follows_the_rule(implementation, visibility, queries, keys):
    inputs = arrays(queries, keys)
    found = compiled(*inputs, visibility, using(implementation))
    mask = np.asarray(visibility.mask(range(queries), range(keys)))
    sees = np.broadcast_to(mask.any(-1, keepdims=True), found.shape)
    np.testing.assert_allclose(found[sees], reference(*inputs, visibility)[sees], **CLOSE)
    assert np.isfinite(found).all()


def test_queries_of_300_are_read_in_blocks():
    assert len(query_blocks(300)) > 1


def test_a_query_that_sees_nothing_gets_finite_values():
    visibility = Visibility(start=jnp.array([3, 3]), offset=jnp.int32(0))
    for implementation in IMPLEMENTATIONS:
        found = compiled(*arrays(2, 6), visibility, using(implementation))
        assert np.isfinite(found).all()


@pytest.mark.parametrize("implementation", ["dot_product", "splash"])
@pytest.mark.parametrize("window", [None, 40])
def test_implementations_have_the_same_gradients(window, implementation):
    def gradients(implementation):
        def total(*inputs):
            context = attend(*inputs, Visibility(window=window), using(implementation))
            return jnp.sin(context).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays(150, 150))

    for plain, other in zip(gradients("plain"), gradients(implementation), strict=True):
        np.testing.assert_allclose(plain, other, **CLOSE)


def test_splash_is_a_kernel_from_128_queries_on():
    def kernels(length):
        program = jax.make_jaxpr(attend, static_argnums=4)
        return str(program(*arrays(length, length), Visibility(), using("splash"))).count(
            "pallas_call"
        )

    assert (kernels(127), kernels(128)) == (0, 1)


@pytest.mark.parametrize(("queries", "heads"), [(1, 1), (1, 3), (2, 3), (8, 2)])
def test_joined_heads_follow_the_rule(queries, heads):
    query, keys, values = arrays(queries, 12, heads=heads)
    visibility = Visibility(jnp.array([0, 3]), jnp.int32(4))
    joined = [x.swapaxes(1, 2).reshape(2, 12, -1) for x in (keys, values)]
    found = jax.jit(joined_attend)(query, *joined, visibility)
    np.testing.assert_allclose(found, reference(query, keys, values, visibility), **CLOSE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 9])
def test_a_cache_of_any_layout_is_read_alike(implementation, queries):
    query, keys, values = arrays(queries, 12)
    visibility = Visibility(jnp.array([0, 2]), jnp.int32(3))
    expected = compiled(query, keys, values, visibility, Platform())
    for layout in (
        lambda x: x.reshape(4, 12, 8),  # merged
        lambda x: x.swapaxes(1, 2).reshape(2, 12, 16),  # joined
    ):
        found = compiled(query, layout(keys), layout(values), visibility, using(implementation))
        np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dot_product", "splash"])
def test_dropout_on_attention_weights_falls_back_to_plain(implementation):
    def dropout(shape):
        return jnp.ones(shape).at[..., ::2].set(2.0)

    inputs = arrays(150, 150)
    found = attend(*inputs, Visibility(), using(implementation), dropout=dropout)
    np.testing.assert_array_equal(found, attend(*inputs, Visibility(), Platform(), dropout=dropout))


@pytest.mark.parametrize(
    ("dtype", "size", "visibility", "expected"),
    [
        ("bfloat16", 64, Visibility(), True),
        ("float16", 64, Visibility(window=40), True),
        ("float32", 64, Visibility(), False),
        ("bfloat16", 60, Visibility(), False),
        ("bfloat16", 136, Visibility(), False),
    ],
    ids=["bfloat16", "window", "float32", "uneven-head", "large-head"],
)
def test_cudnn_is_used_where_it_can_be(monkeypatch, dtype, size, visibility, expected):
    asked = []

    def observe(query, *args, implementation=None, **options):
        asked.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", observe)
    inputs = [x.astype(dtype) for x in arrays(150, 150, size=size)]
    attend(*inputs, visibility, dataclasses.replace(using("dot_product"), cudnn=True))
    assert asked == ["cudnn" if expected else None]


def test_logits_are_pytorchs_with_every_implementation():
    cfg, params, expected = golden.model("hf-small")
    for implementation in IMPLEMENTATIONS:
        logits = flaxgpt.forward(cfg, params, expected["input_ids"], attention=implementation)
        golden.assert_logits_agree(logits, expected["logits"])


@pytest.mark.slow
def test_a_cache_is_extended_with_every_implementation():
    cfg, params, expected = golden.model("book-small")
    ids = expected["input_ids"]
    for implementation in IMPLEMENTATIONS:
        cache = flaxgpt.init_cache(cfg, len(ids), 12)
        _, cache = flaxgpt.extend(cfg, params, ids[:, :8], cache, attention=implementation)
        logits, _ = flaxgpt.extend(cfg, params, ids[:, 8:12], cache, attention=implementation)
        golden.assert_logits_agree(logits, flaxgpt.forward(cfg, params, ids[:, :12])[:, 8:])


def test_an_unknown_implementation_is_refused():
    cfg, params, expected = golden.model("book-small")
    with pytest.raises(ValueError, match=r"unknown attention implementation 'flash'.*plain"):
        flaxgpt.forward(cfg, params, expected["input_ids"], attention="flash")
