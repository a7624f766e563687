"""`generate` and `stream`: rows, keys, stopping, compilation, invalid input."""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.generation import Sampling, decoding, programs
from flaxgpt.generation.decoding import DecodeState, Plan, Request
from flaxgpt.generation.observed import check_watch
from flaxgpt.generation.programs import Program
from flaxgpt.generation.prompts import bucket, prepare
from flaxgpt.model import param_shapes
from flaxgpt.platform import PLATFORMS, Platform

pytestmark = pytest.mark.usefixtures("quick_compilation")  # exact ids: test_generation_golden.py

SAMPLED = {"temperature": 1.2, "top_k": 40, "top_p": 0.95}


@functools.cache
def model(name):
    """Return a golden model with its first block only, which compiles faster."""
    cfg, params, expected = golden.model(name)
    shallow = dataclasses.replace(cfg, n_layers=1)
    return shallow, {part: params[part] for part in param_shapes(shallow)}, expected


# --- Rows, keys, drivers


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("book-small", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("book-small", 1), ("hf-small", 5))
        ),
    ],
)
def test_stream_yields_the_ids_of_generate(name, length):
    cfg, params, _ = model(name)
    new = cfg.context_length + 2
    options = SAMPLED | {"key": jax.random.key(4), "stop_ids": (3, 4)}
    ids = flaxgpt.generate(cfg, params, [golden.prompt(name, length)], new, **options)[0]
    assert list(flaxgpt.stream(cfg, params, golden.prompt(name, length), new, **options)) == ids


def test_the_same_key_gives_the_same_ids_and_another_key_others():
    cfg, params, _ = model("book-small")
    run = partial(
        flaxgpt.generate, cfg, params, [golden.prompt("book-small", 4)] * 2, 12, **SAMPLED
    )
    first = run(key=jax.random.key(1))
    assert run(key=jax.random.key(1)) == first
    assert run(key=jax.random.key(2)) != first
    assert first[0] != first[1]  # each row folds its number into the key


def test_old_style_keys_are_the_same_keys():
    cfg, params, _ = model("book-small")
    run = partial(flaxgpt.generate, cfg, params, [golden.prompt("book-small", 4)] * 2, 5, **SAMPLED)
    assert run(key=jax.random.PRNGKey(7)) == run(key=jax.random.key(7))
    each = jax.random.split(jax.random.PRNGKey(7))
    assert run(key=each) == run(key=jax.random.wrap_key_data(each))


def test_prompts_may_be_arrays_or_lists():
    cfg, params, expected = model("book-small")
    ids = expected["input_ids"]
    lists = flaxgpt.generate(cfg, params, ids.tolist(), 3)
    for array in (ids, jnp.asarray(ids), [jnp.asarray(row) for row in ids], ids.astype(np.uint16)):
        assert flaxgpt.generate(cfg, params, array, 3) == lists


def test_iterators_serve_as_prompts_and_stop_ids():
    cfg, params, expected = model("book-small")
    ids = expected["input_ids"].tolist()
    lists = flaxgpt.generate(cfg, params, ids, 8)
    stop = lists[0][2]
    cut = flaxgpt.generate(cfg, params, ids, 8, stop_ids=[stop])
    assert flaxgpt.generate(cfg, params, iter(ids), 8, stop_ids=iter([stop])) == cut
    assert cut != lists


@pytest.mark.slow
def test_a_stream_far_past_the_context_keeps_only_the_context():
    cfg, params, _ = model("book-qkv-bias")
    new = 3 * bucket(cfg.context_length + 1)
    options = SAMPLED | {"key": jax.random.key(8)}
    whole = flaxgpt.generate(cfg, params, [golden.prompt("book-qkv-bias", 5)], new, **options)[0]
    assert (
        list(flaxgpt.stream(cfg, params, golden.prompt("book-qkv-bias", 5), new, **options))
        == whole
    )
    endless = flaxgpt.stream(cfg, params, golden.prompt("book-qkv-bias", 5), 2**29, **options)
    assert [next(endless) for _ in range(50)] == whole[:50]


def test_numpy_parameters_are_parameters():
    cfg, params, _ = model("book-small")
    plain = jax.tree.map(np.asarray, params)
    rows = [golden.prompt("book-small", 4)]
    assert flaxgpt.generate(cfg, plain, rows, 3) == flaxgpt.generate(cfg, params, rows, 3)


def test_ids_are_plain_ints():
    cfg, params, _ = model("book-small")
    ids = flaxgpt.generate(cfg, params, [golden.prompt("book-small", 4)], 3)[0]
    assert [type(token) for token in ids] == [int] * 3
    assert type(next(flaxgpt.stream(cfg, params, [1], 1))) is int


# --- Stopping


def test_a_stopped_row_ends_with_its_stop_id_and_the_others_go_on():
    cfg, params, expected = model("book-small")
    free = flaxgpt.generate(cfg, params, expected["input_ids"], 12)
    stop = free[0][4]
    stopped = flaxgpt.generate(cfg, params, expected["input_ids"], 12, stop_ids=[stop])
    for row, cut in zip(free, stopped, strict=True):
        assert cut == (row[: row.index(stop) + 1] if stop in row else row)
    assert len(stopped[0]) <= 5


def test_the_loop_ends_when_every_row_has_stopped():
    cfg, params, expected = model("book-small")
    ids = expected["input_ids"]
    firsts = {row[0] for row in flaxgpt.generate(cfg, params, ids, 1)}
    prepared = prepare(cfg, params, ids, 12, Sampling(stop_ids=tuple(firsts)), "float32")
    out = programs.decode(*prepared)
    written = out[:, ids.shape[1] :] != 0
    assert (written.sum(-1) <= 1).all()  # the first new id, and nothing after it


# --- Compilation


def test_ten_prompt_lengths_in_one_bucket_compile_once(compilations):
    cfg, params, _ = model("book-qkv-bias")
    on_device = jnp.array([[1, 2], [3, 4]])
    run = partial(flaxgpt.generate, cfg, params)
    run([[5], [6]], 8, temperature=0.5, top_k=3, top_p=0.5, key=jax.random.key(0), stop_ids=[1])
    del compilations[:]
    for n in range(1, 11):
        run(
            [[n] * n, [1]],
            max_new_tokens=5 + n % 4,
            temperature=n / 10,
            top_k=n,
            top_p=n / 11,
            key=jax.random.key(n),
            stop_ids=range(n % 9),
        )
    run([[1], [2]], 8)
    run(on_device, 8)
    assert compilations == []


def test_streams_of_ten_prompt_lengths_in_one_bucket_compile_once(compilations):
    cfg, params, _ = model("book-qkv-bias")
    list(flaxgpt.stream(cfg, params, [5], 8))
    del compilations[:]
    for n in range(1, 11):
        list(flaxgpt.stream(cfg, params, [n] * n, 8, temperature=1.0, key=jax.random.key(n)))
    assert compilations == []


@given(st.integers(1, 5000))
def test_a_bucket_holds_its_lengths_and_wastes_at_most_half(length):
    size = bucket(length)
    assert length <= size <= max(16, 1.5 * length)
    assert bucket(size) == size
    assert bucket(length + 1) >= size


# --- No scan


def primitives(jaxpr):
    """Yield the name of every primitive in a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def abstract_call(cfg, layout):
    """Return a program and abstract arguments of the loop: shapes only, nothing is allocated."""
    plan = Plan(16, bucket(cfg.context_length + 8), cfg.context_length, exceeds_context=True)
    program = Program(cfg, plan, Platform(cache_layout=layout), jnp.dtype("float32"))
    i32, f32 = jnp.dtype("int32"), jnp.dtype("float32")
    scalar = partial(jax.ShapeDtypeStruct, ())
    request = Request(
        key=jax.eval_shape(lambda: jax.random.key(0)),
        temperature=scalar(f32),
        top_k=scalar(i32),
        top_p=scalar(f32),
        stop_ids=jax.ShapeDtypeStruct((4,), i32),
        prompt_length=scalar(i32),
        final_length=scalar(i32),
    )
    ids, start = jax.ShapeDtypeStruct((2, 16), i32), jax.ShapeDtypeStruct((2,), i32)
    return program, (param_shapes(cfg), request, ids, start)


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("book-124M", "merged"),
        ("book-124M", "separate"),
        pytest.param("gpt2-xl", "merged", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("n_layers", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_neither_driver_has_a_scan_in_its_jaxpr(preset, layout, n_layers):
    cfg = GPTConfig.preset(preset)
    cfg = dataclasses.replace(cfg, n_layers=n_layers or cfg.n_layers)
    program, (params, request, ids, start) = abstract_call(cfg, layout)
    loop = partial(programs.decode, program)
    names = set(primitives(jax.make_jaxpr(loop)(params, request, ids, start).jaxpr))
    assert "while" in names
    assert "dot_general" in names
    assert "scan" not in names

    prefill = partial(programs.prefill, program)
    state, _ = jax.eval_shape(prefill, params, request, ids, start)
    assert isinstance(state, DecodeState)
    for step in (programs.extend_step, programs.window_step):
        jaxpr = jax.make_jaxpr(partial(step, program))(params, request, state)
        names = set(primitives(jaxpr.jaxpr))
        assert "dot_general" in names
        assert "scan" not in names


@pytest.mark.parametrize("capture", [None, pytest.param(["*"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [1, 8])
def test_no_step_of_the_loop_copies_a_cache_on_cpu(rows, capture):
    cfg = GPTConfig(vocab_size=64, context_length=192, n_layers=1)
    params = flaxgpt.init(cfg, jax.random.key(0))
    watch = check_watch(cfg, capture, None)
    prompts = np.ones((rows, 32), int)
    prepared = prepare(cfg, params, prompts, 128, Sampling(), "float32", watch=watch)
    decode = programs.compiled_decode(PLATFORMS["cpu"].decode_options)
    program = decode.lower(*prepared).compile().as_text()
    buffer = rf"f32\[(?:{rows},12|{12 * rows}),{prepared.program.plan.width},64\]"
    assert re.search(buffer, program)
    assert not re.search(rf"= {buffer}\S* copy\(", program)


@pytest.mark.parametrize("rows", [1, 8])
def test_no_step_of_the_loop_transposes_a_weight_on_cpu(rows):
    cfg = GPTConfig(vocab_size=64, context_length=192, n_layers=1)
    params = flaxgpt.init(cfg, jax.random.key(0))
    prepared = prepare(cfg, params, np.ones((rows, 32), int), 128, Sampling(), "float32")
    decode = programs.compiled_decode(PLATFORMS["cpu"].decode_options)
    program = decode.lower(*prepared).compile().as_text()
    weight = r"f32\[(?:3072,768|768,3072|768,768)\]"
    assert re.search(weight, program)
    assert not re.search(rf"= {weight}\S* (?:copy|transpose|fusion|call)\(", program)


def test_the_walk_finds_a_scan_inside_a_loop_inside_a_jit():
    def hidden(x):
        return jax.lax.while_loop(
            lambda c: c < 3, jax.jit(lambda c: jax.lax.fori_loop(0, 3, lambda _, d: d + 1, c)), x
        )

    assert "scan" in set(primitives(jax.make_jaxpr(jax.jit(hidden))(0).jaxpr))


# --- A fake model drives the loop

COUNTING = 5  # the fake model's context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeCache:
    """The cache of a model that only remembers how many ids it has read."""

    start: jax.Array
    length: jax.Array

    def rewind(self, length):
        return dataclasses.replace(self, length=jnp.asarray(length, jnp.int32))


def read_successor(ids, last, cache):
    """Answer every id with its successor, modulo 10."""
    following = (jax.lax.dynamic_index_in_dim(ids, last, axis=1, keepdims=False) + 1) % 10
    return jax.nn.one_hot(following, 10), dataclasses.replace(
        cache, length=cache.length + ids.shape[1]
    )


def count_on(prompts, new, **options):
    """Return the new ids that the loop generates with the fake model."""
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(row)) + row for row in prompts], np.int32)
    start = np.array([longest - len(row) for row in prompts], np.int32)
    width = longest + new
    plan = Plan(longest, width, COUNTING, exceeds_context=width > COUNTING + 1)
    request = Request(
        key=jax.random.key(0),
        temperature=np.float32(0),
        top_k=np.int32(10),
        top_p=np.float32(1),
        stop_ids=np.array(options.get("stop_ids", [-1]), np.int32),
        prompt_length=np.int32(longest),
        final_length=np.int32(width),
    )
    cache = FakeCache(jnp.zeros(len(prompts), jnp.int32), jnp.int32(0))
    out = jax.jit(decoding.decode, static_argnums=(0, 1))(
        read_successor, plan, request, ids, start, cache
    )
    return out[:, longest:].tolist()


def test_the_loop_is_driven_by_any_reading_function():
    assert count_on([[3], [7]], 4) == [[4, 5, 6, 7], [8, 9, 0, 1]]


def test_the_loop_reads_windows_past_the_context_of_any_model():
    assert count_on([[1, 2], [8]], 9) == [[3, 4, 5, 6, 7, 8, 9, 0, 1], [9, *range(8)]]


def test_the_loop_stops_any_model_once_all_rows_have_met_a_stop_id():
    assert count_on([[3], [4]], 4, stop_ids=[5]) == [[4, 5, 0, 0], [5, 6, 0, 0]]


# --- Dtype


@pytest.mark.slow
def test_bfloat16_generates_on_both_drivers_alike():
    cfg, params, _ = model("book-small")
    ids = golden.prompt("book-small", 6)
    out = flaxgpt.generate(cfg, params, [ids], 10, dtype=jnp.bfloat16)[0]
    assert list(flaxgpt.stream(cfg, params, ids, 10, dtype="bfloat16")) == out
    assert all(0 <= token < cfg.vocab_size for token in out)


# --- Invalid input

DRAW = {"key": jax.random.key(0)}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
        (np.zeros((0, 3), int), {}, "no prompts"),
        (np.zeros((2, 0), int), {}, "prompt 0 is empty"),
        ([1, 2], {}, r"prompts must be rows of ids, got 1"),
        ("Hello", {}, "prompts are ids, not text"),
        (["Hello"], {}, "prompts are ids, not text"),
        (7, {}, "prompts must be rows of ids, got 7"),
        ([[[1]]], {}, r"prompt 0 of shape \(1, 1\) must be a flat list"),
        (
            [[1, 2], [3, 257]],
            {},
            r"id 257 at \[1, 1\] is outside the vocabulary: expected 0 to 256",
        ),
        ([[-1]], {}, r"id -1 at \[0, 0\] is outside"),
        ([[1.5]], {}, "float64 must be integers"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1 must be a whole number"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ([[1]], {"max_new_tokens": 2**31}, "must be below 2..30"),
        ([[1]], {"max_new_tokens": 2**29}, "for 1 rows needs 3.0 GiB for the ids alone"),
        ([[1]], {"temperature": "0.8"}, "temperature='0.8' must be 0"),
        ([[1]], {"temperature": None}, "temperature=None must be 0"),
        ([[1]], {"temperature": 1, "key": "x"}, "key='x' must be a JAX random key"),
        ([[1]], {"temperature": 1, "top_p": 1e-50, **DRAW}, "top_p=1e-50 must be above 0"),
        ([[1]], {"temperature": -1}, "temperature=-1 must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan must be 0"),
        ([[1]], {"temperature": float("inf"), **DRAW}, "temperature=inf must be 0"),
        ([[1]], {"temperature": 1, "top_p": 0, **DRAW}, "top_p=0 must be above 0"),
        ([[1]], {"temperature": 1, "top_p": 1.5, **DRAW}, "top_p=1.5 must be above 0 and at most"),
        ([[1]], {"temperature": 1, "top_p": float("nan"), **DRAW}, "top_p=nan must be above 0"),
        ([[1]], {"temperature": 1, "top_k": 0, **DRAW}, "top_k=0 must be a whole number"),
        ([[1]], {"temperature": 1, "top_k": 258, **DRAW}, "top_k=258 exceeds vocab_size=257"),
        ([[1]], {"temperature": 0.5}, "temperature=0.5 samples at random and needs a key"),
        ([[1]], {"temperature": 1, "key": 3}, "key=3 must be a JAX random key"),
        (
            [[1]],
            {"temperature": 1, "key": jax.random.split(jax.random.key(0))},
            r"keys of shape \(2,\) must be one key, or one per row",
        ),
        ([[1]], {"stop_ids": 5}, "stop_ids=5 must be a list of ids"),
        ([[1]], {"stop_ids": None}, "stop_ids=None must be a list of ids"),
        ([[1]], {"stop_ids": [257]}, "stop id 257 must be an id, from 0 to 256"),
        ([[1]], {"stop_ids": [True]}, "stop id True must be an id"),
        ([[1]], {"dtype": "int8"}, "dtype='int8' must be float32"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(prompts, options, message):
    cfg, params, _ = model("book-small")
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, prompts, **({"max_new_tokens": 3} | options))


def test_stream_refuses_bad_input_at_the_call():
    cfg, params, _ = model("book-small")
    for bad in ("Hello", 5):
        with pytest.raises(ValueError, match="stream takes the ids of one prompt"):
            flaxgpt.stream(cfg, params, bad, 3)
    for bad in ([[1, 2]], [[1], [2, 3]]):
        with pytest.raises(ValueError, match=r"must be a flat list of ids|all rows equally long"):
            flaxgpt.stream(cfg, params, bad, 3)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        flaxgpt.stream(cfg, params, [], 3)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        flaxgpt.stream(cfg, params, [1], 0)


def test_parameters_that_give_nan_are_an_error_and_not_an_id():
    cfg, params, _ = model("book-small")
    broken = params | {"out_head": {"weight": params["out_head"]["weight"].at[3, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 0"):
        flaxgpt.generate(cfg, broken, [[1, 2]], 3)
    with pytest.raises(ValueError, match="logits of row 0 became NaN"):
        list(flaxgpt.stream(cfg, broken, [1, 2], 3))


def test_a_later_nan_is_told_with_its_place():
    cfg, params, _ = model("book-small")
    first = flaxgpt.generate(cfg, params, [[1, 2]], 1)[0][0]
    broken = params | {"tok_emb": {"weight": params["tok_emb"]["weight"].at[first].set(jnp.nan)}}
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 1"):
        flaxgpt.generate(cfg, broken, [[1, 2]], 3)
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 1"):
        list(flaxgpt.stream(cfg, broken, [1, 2], 3))


def test_generate_inside_jit_says_what_to_jit_instead():
    cfg, params, _ = model("book-small")
    with pytest.raises(ValueError, match="cannot run inside jit"):
        jax.jit(lambda p: flaxgpt.generate(cfg, p, [[1]], 3))(params)
    with pytest.raises(ValueError, match="not inside jit"):
        jax.jit(lambda ids: flaxgpt.generate(cfg, params, ids, 3))(jnp.ones((1, 2), jnp.int32))
