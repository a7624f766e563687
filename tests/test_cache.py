import dataclasses
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

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["book-small", "hf-small"])
def setting(request):
    cfg, params, expected = golden.model(request.param)
    ids = expected["input_ids"]
    return cfg, params, ids, flaxgpt.forward(cfg, params, ids)


def extended(cfg, params, ids, sizes, layout):
    """Return the logits of ids given to `extend` in pieces of these sizes."""
    cache = flaxgpt.init_cache(cfg, ids.shape[0], ids.shape[1], layout=layout)
    pieces = []
    for piece in np.split(ids, np.cumsum(sizes)[:-1], axis=1):
        logits, cache = flaxgpt.extend(cfg, params, piece, cache)
        pieces.append(logits)
    assert int(cache.length) == ids.shape[1]
    return jnp.concatenate(pieces, axis=1)


@pytest.mark.parametrize("layout", ["separate", "merged", "joined"])
def test_extending_at_once_equals_forward(setting, layout):
    cfg, params, ids, logits = setting
    golden.assert_logits_agree(extended(cfg, params, ids, [ids.shape[1]], layout), logits)


@pytest.mark.parametrize("layout", ["separate", "merged", "joined"])
def test_extending_id_by_id_equals_forward(setting, layout):
    cfg, params, ids, logits = setting
    golden.assert_logits_agree(extended(cfg, params, ids, [1] * ids.shape[1], layout), logits)


def test_extending_in_chunks_equals_forward():
    cfg, params, expected = golden.model("book-qkv-bias")
    logits = extended(cfg, params, expected["input_ids"], [4, 1, 4, 1, 1], "separate")
    golden.assert_logits_agree(logits, expected["logits"])


@pytest.mark.slow
@settings(max_examples=8)
@given(data=st.data())
def test_extending_in_any_chunks_equals_forward(data):
    cfg, params, expected = golden.model("book-qkv-bias")
    ids = expected["input_ids"]
    cuts = data.draw(st.sets(st.integers(1, ids.shape[1] - 1)))
    edges = [0, *sorted(cuts), ids.shape[1]]
    sizes = np.diff(edges).tolist()
    logits = extended(cfg, params, ids, sizes, "separate")
    golden.assert_logits_agree(logits, expected["logits"])


def test_a_cache_longer_than_needed_changes_nothing(setting):
    cfg, params, ids, logits = setting
    cache = flaxgpt.init_cache(cfg, ids.shape[0], cfg.context_length)
    golden.assert_logits_agree(flaxgpt.extend(cfg, params, ids, cache)[0], logits)


def test_the_cache_is_a_pytree_of_documented_shapes():
    cfg = golden.model("book-small")[0]
    cache = flaxgpt.init_cache(cfg, 2, 10, jnp.bfloat16, layout="separate")
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


def test_a_cache_rewound_to_0_is_known_to_be_empty_in_a_jitted_function():
    cfg = golden.model("book-small")[0]

    @jax.jit
    def known(cache):
        return cache.is_empty, cache.rewind(0).is_empty, cache.rewind(jnp.int32(0)).is_empty

    assert [bool(x) for x in known(flaxgpt.init_cache(cfg, 1, 8))] == [False, True, False]


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
    with pytest.raises(ValueError, match="2 more ids do not fit: 5 of the cache's 6 slots"):
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
    with pytest.raises(ValueError, match=f"ids have {ids.shape[0]} rows, but the cache has"):
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
        (1, 33, "length=33 exceeds context_length=32"),
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


# --- Rewinding and rearranging, against recomputation

LAYOUTS = pytest.mark.parametrize("layout", ["separate", "merged", "joined"])


@pytest.fixture(scope="module")
def filled():
    """Caches of book-small in every layout, holding 8 ids per row, and what they were made from."""
    cfg, params, expected = golden.model("book-small")
    ids = expected["input_ids"][:, :10]
    caches = {}
    for layout in ("separate", "merged", "joined"):
        cache = flaxgpt.init_cache(cfg, ids.shape[0], 12, layout=layout)
        caches[layout] = flaxgpt.extend(cfg, params, ids[:, :8], cache)[1]
    return cfg, params, ids, caches


@LAYOUTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_rewound_cache_continues_as_if_the_later_ids_had_never_been_read(
    filled, layout, transform
):
    cfg, params, ids, caches = filled
    rewound = transform(lambda cache: cache.rewind(5))(caches[layout])
    other = (ids[:, 5:8] + 1) % cfg.vocab_size
    logits, cache = flaxgpt.extend(cfg, params, other, rewound)
    whole = flaxgpt.forward(cfg, params, np.concatenate([ids[:, :5], other], axis=1))
    golden.assert_logits_agree(logits, whole[:, 5:])
    assert int(cache.length) == 8


@LAYOUTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_taken_rows_continue_as_those_rows_do(filled, layout, transform):
    cfg, params, ids, caches = filled
    rows = np.array([1, 0, 1])
    taken = transform(lambda cache: cache.take(rows))(caches[layout])
    logits, _ = flaxgpt.extend(cfg, params, ids[rows, 8:10], taken)
    golden.assert_logits_agree(logits, flaxgpt.forward(cfg, params, ids[rows])[:, 8:])


@LAYOUTS
def test_taken_rows_keep_their_padding(filled, layout):
    cfg, params, ids, _ = filled
    cache = flaxgpt.init_cache(cfg, 2, 12, layout=layout)
    cache = dataclasses.replace(cache, start=jnp.array([0, 3], jnp.int32))
    _, cache = flaxgpt.extend(cfg, params, ids[:2, :8], cache)
    logits, _ = flaxgpt.extend(cfg, params, ids[1:2, 8:9], cache.take([1]))
    alone = flaxgpt.forward(cfg, params, ids[1:2, 3:9])
    golden.assert_logits_agree(logits, alone[:, -1:])


@LAYOUTS
def test_rows_of_another_cache_put_into_a_cache_continue_there(filled, layout):
    cfg, params, ids, caches = filled
    empty = flaxgpt.init_cache(cfg, 3, 12, layout=layout)
    cache = empty.put(1, caches[layout].take([0, 1]))
    cache = dataclasses.replace(cache, length=caches[layout].length)
    logits, _ = flaxgpt.extend(cfg, params, ids[[0, 0, 1], 8:10], cache)
    golden.assert_logits_agree(logits[1:], flaxgpt.forward(cfg, params, ids[:2])[:, 8:])


@LAYOUTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_repeated_rows_stand_next_to_each_other(filled, layout, transform):
    cfg, params, ids, caches = filled
    repeated = transform(lambda cache: cache.repeat(2))(caches[layout])
    rows = np.repeat(np.arange(ids.shape[0]), 2)
    logits, cache = flaxgpt.extend(cfg, params, ids[rows, 8:10], repeated)
    golden.assert_logits_agree(logits, flaxgpt.forward(cfg, params, ids[rows])[:, 8:])
    assert cache.batch == 2 * ids.shape[0]


@LAYOUTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("size", [8, 16])
def test_a_placed_row_continues_from_every_place(filled, layout, transform, size):
    cfg, params, ids, caches = filled
    row, start = caches[layout].take([0]).rewind(5), np.array([0, 2, 5])
    placed = transform(lambda cache: cache.place(start, size))(row)
    assert (placed.batch, placed.size, int(placed.length)) == (3, size, 5)
    # Slots up to 5 are filled: rows that begin later lack the last of the five ids.
    more = np.stack([ids[0, 5 - first : 8 - first] for first in start])
    logits, _ = flaxgpt.extend(cfg, params, more, placed)
    whole = flaxgpt.forward(cfg, params, ids[:1, :8])[0]
    expected = np.stack([whole[5 - first : 8 - first] for first in start])
    golden.assert_logits_agree(logits, expected)


def test_only_a_single_row_can_be_placed(filled):
    with pytest.raises(ValueError, match="a cache of 2 rows cannot be placed"):
        filled[3]["merged"].take([0, 1]).place([0, 1], 8)


@pytest.mark.parametrize("length", [-1, 9])
def test_rewinding_to_a_length_never_reached_is_refused_and_nan_under_jit(filled, length):
    cfg, params, ids, caches = filled
    with pytest.raises(ValueError, match=f"length={length} is out of range: 8 slots are filled"):
        caches["merged"].rewind(length)
    rewound = jax.jit(lambda cache, length: cache.rewind(length))(caches["merged"], length)
    logits, _ = jax.jit(partial(flaxgpt.extend, cfg))(params, ids[:, :1], rewound)
    assert jnp.isnan(logits).all()


@LAYOUTS
@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_refused_and_nan_under_jit(filled, layout, row):
    cfg, params, ids, caches = filled
    cache = jax.tree.map(lambda x: x, caches[layout]).take([0, 1])
    with pytest.raises(ValueError, match=f"rows=.*{row}.* must be from 0 to 1"):
        cache.take([0, row])
    taken = jax.jit(lambda cache, rows: cache.take(rows))(cache, jnp.array([0, row]))
    logits, _ = flaxgpt.extend(cfg, params, ids[:2, 8:9], taken)
    assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1]).all()


# --- A length per row


@LAYOUTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_rewound_to_different_lengths_continue_each_on_its_own(filled, layout, transform):
    cfg, params, ids, caches = filled
    lengths = np.array([3, 6], np.int32)
    rewound = transform(lambda cache: cache.rewind(lengths))(caches[layout].take([0, 1]))
    other = (ids[:2, 5:8] + 1) % cfg.vocab_size
    logits, cache = flaxgpt.extend(cfg, params, other, rewound)
    assert cache.length.tolist() == [6, 9]
    for row, length in enumerate(lengths):
        whole = np.concatenate([ids[row, :length], other[row]])[None]
        expected = flaxgpt.forward(cfg, params, whole)[:, length:]
        golden.assert_logits_agree(logits[row : row + 1], expected)
    swapped, _ = flaxgpt.extend(cfg, params, ids[:2, :1], cache.take([1, 0]))
    expected, _ = flaxgpt.extend(cfg, params, ids[:2, :1][::-1], cache)
    golden.assert_logits_agree(swapped, expected[::-1])


def test_a_row_without_room_is_refused_and_nan_under_jit(filled):
    cfg, params, ids, caches = filled
    cache = caches["merged"].take([0, 1]).rewind([8, 2])
    with pytest.raises(ValueError, match="5 more ids do not fit: 8 of the cache's 12 slots"):
        flaxgpt.extend(cfg, params, ids[:2, :5], cache)
    logits, _ = jax.jit(partial(flaxgpt.extend, cfg))(params, ids[:2, :5], cache)
    assert jnp.isnan(logits[0]).all() and jnp.isfinite(logits[1]).all()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9], "is out of range: 8 slots"), ([3, 3, 3], r"length of shape \(3,\) must be one")],
)
def test_lengths_that_rows_never_had_are_refused(filled, lengths, message):
    with pytest.raises(ValueError, match=message):
        filled[3]["merged"].take([0, 1]).rewind(lengths)


@pytest.mark.parametrize("rows", [[], [[0]], [0.5], 0])
def test_rows_that_are_no_list_of_integers_are_refused(filled, rows):
    with pytest.raises(ValueError, match="must be a flat list of one or more integers"):
        filled[3]["merged"].take(rows)


def test_repeating_no_times_is_refused(filled):
    with pytest.raises(ValueError, match="n=0 must be a whole number"):
        filled[3]["merged"].repeat(0)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="unknown cache layout 'apart'"):
        flaxgpt.init_cache(golden.model("book-small")[0], 1, 4, layout="apart")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.put(1, cache), "row=1 must be from 0 to 0, for 3 of 3 rows"),
        (lambda cache: cache.put(-1, cache), "row=-1 must be from 0 to 0"),
        (lambda cache: cache.take([0]).put(0, cache), "3 rows and 12 slots does not fit one of 1"),
        (lambda cache: cache.take([0]).place([3, -1], 12), "must be a list of slots from 0 to"),
        (lambda cache: cache.take([0]).place([0], 7), "size=7 is less than the 8 ids"),
        (lambda cache: cache.place([0], 12), "a cache of 3 rows cannot be placed"),
    ],
)
def test_rows_that_do_not_fit_are_refused(filled, call, message):
    cache = filled[3]["merged"].take([0, 1, 0])
    with pytest.raises(ValueError, match=message):
        call(cache)


@pytest.mark.slow
def test_rows_put_past_the_end_are_nan_under_jit(filled):
    cache = filled[3]["merged"].take([0, 1, 0])
    put = jax.jit(lambda row: cache.put(row, cache.take([0, 1])))
    assert np.isnan(put(2).keys[0]).any()
    assert not np.isnan(put(1).keys[0]).any()


def test_a_cache_of_another_layout_is_refused(filled):
    caches = filled[3]
    with pytest.raises(ValueError, match='the layouts differ: "joined" and "merged"'):
        caches["merged"].put(0, caches["joined"])


@pytest.mark.slow
def test_a_row_with_a_length_of_its_own_can_be_placed(filled):
    cfg, params, ids, caches = filled
    placed = caches["merged"].take([0]).rewind([6]).place([0, 1], 12)
    logits, _ = flaxgpt.extend(cfg, params, ids[[0, 0], 6:8], placed)
    golden.assert_logits_agree(logits[:1], flaxgpt.forward(cfg, params, ids[:1, :8])[:, 6:])
