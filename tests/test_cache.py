from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.cache import merge_heads


@pytest.fixture(scope="module", params=["book-small", "hf-small"])
def setting(request):
    cfg, params, expected = golden.model(request.param)
    ids = expected["input_ids"]
    return cfg, params, ids, flaxgpt.forward(cfg, params, ids)


def extended(cfg, params, ids, sizes, layout):
    """Returns the logits of ids given to `extend` in pieces of these sizes."""
    cache = layout(flaxgpt.init_cache(cfg, ids.shape[0], ids.shape[1]))
    pieces = []
    for piece in np.split(ids, np.cumsum(sizes)[:-1], axis=1):
        logits, cache = flaxgpt.extend(cfg, params, piece, cache)
        pieces.append(logits)
    assert int(cache.length) == ids.shape[1]
    return jnp.concatenate(pieces, axis=1)


@pytest.mark.parametrize("layout", [lambda cache: cache, merge_heads], ids=["apart", "merged"])
def test_extending_at_once_equals_forward(setting, layout):
    cfg, params, ids, logits = setting
    golden.assert_logits_agree(extended(cfg, params, ids, [ids.shape[1]], layout), logits)


@pytest.mark.parametrize("layout", [lambda cache: cache, merge_heads], ids=["apart", "merged"])
def test_extending_id_by_id_equals_forward(setting, layout):
    cfg, params, ids, logits = setting
    golden.assert_logits_agree(extended(cfg, params, ids, [1] * ids.shape[1], layout), logits)


@settings(max_examples=8)
@given(data=st.data())
def test_extending_in_any_chunks_equals_forward(data):
    cfg, params, expected = golden.model("book-qkv-bias")
    ids = expected["input_ids"]
    cuts = data.draw(st.sets(st.integers(1, ids.shape[1] - 1)))
    edges = [0, *sorted(cuts), ids.shape[1]]
    sizes = np.diff(edges).tolist()
    logits = extended(cfg, params, ids, sizes, lambda cache: cache)
    golden.assert_logits_agree(logits, expected["logits"])


def test_a_cache_longer_than_needed_changes_nothing(setting):
    cfg, params, ids, logits = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0], cfg.context_length)
    golden.assert_logits_agree(flaxgpt.extend(cfg, params, ids, cache)[0], logits)


def test_the_cache_is_a_pytree_of_documented_shapes():
    cfg = golden.model("book-small")[0]
    cache = flaxgpt.init_cache(cfg, 2, 10, jnp.bfloat16)
    assert len(jax.tree.leaves(cache)) == 2 * cfg.n_layers + 2
    chex.assert_shape(cache.keys + cache.values, (2, cfg.n_heads, 10, cfg.head_dim))
    chex.assert_type(cache.keys, jnp.bfloat16)
    chex.assert_shape((cache.length, cache.start), ((), (2,)))
    assert cache.size == 10


def test_the_cache_given_is_left_as_it_was(setting):
    cfg, params, ids, _ = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0], 12)
    flaxgpt.extend(cfg, params, ids[:, :5], cache)
    assert int(cache.length) == 0
    assert all((keys == 0).all() for keys in cache.keys)


def test_a_jitted_step_may_donate_its_cache(setting):
    cfg, params, ids, logits = setting
    step = jax.jit(partial(flaxgpt.extend, cfg), donate_argnums=2)
    cache = flaxgpt.init_cache(cfg, ids.shape[0], 12)
    _, longer = step(params, ids[:, :1], cache)
    golden.assert_logits_agree(step(params, ids[:, 1:2], longer)[0], logits[:, 1:2])
    assert cache.keys[0].is_deleted()


def test_a_step_is_traced_once_whatever_its_position(setting):
    cfg, params, ids, _ = setting
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, ids, cache):
        return flaxgpt.extend(cfg, params, ids, cache)

    cache = flaxgpt.init_cache(cfg, ids.shape[0], 12)
    for position in range(6):
        _, cache = step(params, ids[:, position : position + 1], cache)


def test_ids_beyond_the_cache_are_refused_on_the_host_and_nan_under_jit(setting):
    cfg, params, ids, _ = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0], 6)
    _, cache = flaxgpt.extend(cfg, params, ids[:, :5], cache)
    with pytest.raises(ValueError, match="2 more ids do not fit: the cache has 6 slots, 5 of them"):
        flaxgpt.extend(cfg, params, ids[:, 5:7], cache)
    logits, _ = jax.jit(partial(flaxgpt.extend, cfg))(params, ids[:, 5:7], cache)
    assert jnp.isnan(logits).all()
    logits, _ = jax.jit(partial(flaxgpt.extend, cfg))(params, ids[:, 5:6], cache)
    assert jnp.isfinite(logits).all()


def test_more_ids_than_slots_are_refused_even_under_jit(setting):
    cfg, params, ids, _ = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0], 6)
    with pytest.raises(ValueError, match="7 more ids do not fit"):
        jax.jit(partial(flaxgpt.extend, cfg))(params, ids[:, :7], cache)


def test_a_cache_of_another_batch_is_refused(setting):
    cfg, params, ids, _ = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0] + 1, 6)
    with pytest.raises(ValueError, match=f"ids have {ids.shape[0]} rows, the cache has"):
        flaxgpt.extend(cfg, params, ids[:, :2], cache)


def test_a_cache_of_another_model_is_refused(setting):
    cfg, params, ids, _ = setting
    other = flaxgpt.GPTConfig(context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    cache = flaxgpt.init_cache(other, ids.shape[0], 6)
    with pytest.raises(ValueError, match="the cache has 1 layers"):
        flaxgpt.extend(cfg, params, ids[:, :2], cache)


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (0, 4, "batch=0 must be a whole number"),
        (1, 0, "length=0 must be a whole number"),
        (1, 2.0, "length=2.0 must be a whole number"),
        (1, 33, "length=33 is longer than context_length=32"),
    ],
)
def test_an_impossible_cache_is_refused(batch, length, message):
    cfg = golden.model("book-small")[0]
    with pytest.raises(ValueError, match=message):
        flaxgpt.init_cache(cfg, batch, length)


@pytest.mark.parametrize("dtype", ["float31", jnp.int32])
def test_a_cache_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        flaxgpt.init_cache(golden.model("book-small")[0], 1, 4, dtype)
