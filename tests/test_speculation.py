"""Drafted ids, from earlier text and from a small model: they change the speed, not the ids."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.generation import Sampling, hooks, lookup, speculation
from flaxgpt.generation import speculative_programs as programs
from flaxgpt.generation.decoding import Plan, Request
from flaxgpt.generation.drafting import Drafting
from flaxgpt.generation.prompts import prepare
from flaxgpt.generation.speculation import Speculation
from flaxgpt.generation.speculative_programs import SpeculativeProgram
from flaxgpt.platform import PLATFORMS
from test_generation import FakeCache, abstract_call, model, primitives, read_successor

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = pytest.mark.slow
SAMPLED = {"temperature": 0.9, "top_k": 50, "key": jax.random.key(3)}


def prompts():
    """Return two prompts of different lengths, one of which repeats itself."""
    repeating = golden.prompt("book-small", 3) * 3
    return [repeating, golden.prompt("book-small", 5, 1)]


def perturbed(params, scale):
    """Return other parameters that are similar."""
    keys = iter(jax.random.split(jax.random.key(9), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), params)


def sources(cfg, params):
    """Return options that draft ids, by name."""
    return {
        "lookup": {"lookup": 3},
        "itself": {"draft": (cfg, params)},
        "similar": {"draft": (cfg, perturbed(params, 0.05)), "draft_length": 3},
    }


def run(rows, new, drafting, **options):
    """Return what the loop returns, and its counts."""
    cfg, params, _ = model("book-small")
    prepared = prepare(cfg, params, rows, new, Sampling(**options), "float32")
    out, counts = drafting.add_to(prepared).decode()
    return out, jax.device_get(counts)


# --- Drafts from earlier text


_find = jax.jit(partial(lookup.find, size=5))


def look_up(*row, start=0):
    """Return the draft of five ids for a text, padded on the left by zeros."""
    ids = np.zeros((1, 16), np.int32)
    ids[0, start : start + len(row)] = row
    return _find(ids, np.array([start], np.int32), np.array([start + len(row)], np.int32)).tolist()[
        0
    ]


def test_a_draft_is_what_followed_the_latest_ids_before():
    assert look_up(1, 2, 3, 4, 5, 6, 7, 1, 2) == [3, 4, 5, 6, 7]


def test_the_longest_match_counts_and_of_several_the_last_one():
    assert look_up(1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3)[:1] == [4]
    assert look_up(2, 3, 4, 9, 2, 3, 5, 8, 2, 3)[:1] == [5]


def test_a_repeated_sequence_is_continued_however_short():
    assert look_up(7, 8, 9, 8, 9, 8, 9) == [8, 9, 8, 9, 8]
    assert look_up(4, 4, 4) == [4] * 5


@pytest.mark.parametrize("text", [(5, 0, 0), (1, 2, 1), (1,), (0, 1), (1, 2, 3)])
def test_padding_is_no_text_and_one_id_alone_no_match(text):
    assert look_up(*text, start=4) == [-1] * 5


def reference(row, size):
    for n in range(lookup.LONGEST, lookup.SHORTEST - 1, -1):
        for end in range(len(row) - 1, n - 1, -1):
            if row[end - n : end] == row[-n:]:
                copied = list(row)
                for _ in range(size):
                    copied.append(copied[end])
                    end += 1
                return copied[len(row) :]
    return [-1] * size


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 3))
def test_drafts_are_those_of_a_search_in_a_list(row, start):
    assert look_up(*row, start=start) == reference(row, 5)


# --- A fake model drives the loop


def read_successors(ids, cache):
    """Answer every id with its successor, modulo 10."""
    cache = dataclasses.replace(cache, length=cache.length + ids.shape[1])
    return jax.nn.one_hot((ids + 1) % 10, 10), cache


def from_table(text, table, wanted):
    """Draft what a table, [W, B, K], has for each row's length, as differences to the right id."""
    rows = jnp.arange(len(text.length))
    right = speculation.latest(text) + 1 + jnp.arange(table.shape[-1])[None]
    return (right + table[text.length, rows]) % 10, table


ROWS = [[3], [7, 8]]


def count_with(table, new=14, context_length=13, stop_ids=(-1, -1)):
    """Return the new ids and the counts of the loop with the fake model."""
    longest = max(map(len, ROWS))
    ids = np.array([[0] * (longest - len(row)) + row for row in ROWS], np.int32)
    width = longest + new
    plan = Plan(longest, width, context_length, exceeds_context=width > context_length + 1)
    request = Request(
        key=jax.random.key(0),
        temperature=np.float32(0),
        top_k=np.int32(10),
        top_p=np.float32(1),
        stop_ids=np.array(stop_ids, np.int32),
        prompt_length=np.int32(longest),
        final_length=np.int32(width),
    )
    start = np.array([longest - len(row) for row in ROWS], np.int32)
    out, counts = _decode_fake(plan, request, ids, start, np.asarray(table, np.int32))
    return out[:, longest:].tolist(), jax.device_get(counts)


@partial(jax.jit, static_argnums=0)
def _decode_fake(plan, request, ids, start, table):
    functions = Speculation(read_successor, read_successors, from_table, table.shape[-1])
    cache = FakeCache(jnp.zeros(len(ids), jnp.int32), jnp.int32(0))
    return speculation.decode(functions, plan, request, ids, jnp.asarray(start), cache, table)


PLAIN = [[*range(4, 10), *range(8)], [9, *range(10), 0, 1, 2]]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_ids_do_not_depend_on_the_drafts(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2, (20, 2, 3)) * rng.integers(0, 2, (20, 1, 1))
    stop = int(rng.integers(-1, 10))
    ids, _ = count_with(table, stop_ids=[stop, -1])
    for row, plain in zip(ids, PLAIN, strict=True):
        end = plain.index(stop) + 1 if stop in plain else len(plain)
        assert row[:end] == plain[:end]


def test_rows_accept_different_numbers_of_ids():
    all_right, first_right = [0, 0, 0], [0, 1, 0]
    ids, counts = count_with([[all_right, first_right]] * 20)
    assert ids == PLAIN
    # From 3 to 14 columns: 4 + 4 + 3, and 2 * 5 + 1. The rest is past the context.
    assert counts.accepted.tolist() == [9, 6]
    assert (int(counts.verifying), int(counts.plain)) == (6, 0)


def test_the_loop_ends_when_every_row_has_stopped():
    ids, counts = count_with(np.zeros((20, 2, 3)), stop_ids=[6, 0])
    assert ids == [[4, 5, 6, *[0] * 11], [9, 0, *[0] * 12]]
    assert int(counts.verifying) == 1


@SLOW
def test_drafts_that_fail_pause_for_twice_as_many_steps_each_time():
    new = 1 + 6 + 1 + 2 + 4 + 8 + 16 + 32
    _, counts = count_with(np.ones((140, 2, 2)), new, 138)
    assert (int(counts.verifying), int(counts.plain)) == (6, 1 + 2 + 4 + 8 + 16 + 32)
    assert counts.accepted.tolist() == [0, 0]


@SLOW
@pytest.mark.parametrize(
    ("later", "steps"),
    [
        ([0, 1, 1], (3 + 2 + 21, 7 + 2 + 1)),  # pauses of 2, 1 and 0 steps after one right id
        ([0, 0, 0], (3 + 13, 7)),
    ],
)
def test_a_pause_is_halved_by_some_right_ids_and_ends_with_many(later, steps):
    table = np.ones((140, 2, 3))  # wrong at 3, 5 and 8 columns, so pauses of 1, 2 and 4 steps
    table[11:] = later  # at 13 columns and after that
    _, counts = count_with(table, 60, 138)
    assert (int(counts.verifying), int(counts.plain)) == steps


# --- The ids are those without drafts


@pytest.mark.parametrize(
    ("source", "options", "new"),
    [("lookup", {}, 12), ("similar", SAMPLED, 12), ("lookup", SAMPLED, 40), ("similar", {}, 40)],
    ids=["lookup", "similar, sampled", "lookup, sampled, past the context", "similar, past it"],
)
@SLOW
def test_ids_are_those_without_drafts_in_a_ragged_batch(source, options, new):
    cfg, params, _ = model("book-small")
    plain = flaxgpt.generate(cfg, params, prompts(), new, **options)
    stop = plain[1][5]
    plain = flaxgpt.generate(cfg, params, prompts(), new, stop_ids=[stop], **options)
    assert len(plain[1]) <= 6
    options = options | sources(cfg, params)[source] | {"stop_ids": [stop]}
    assert flaxgpt.generate(cfg, params, prompts(), new, **options) == plain


@SLOW
@pytest.mark.parametrize(("source", "new"), [("similar", 1), ("lookup", 100)])
def test_a_stream_has_the_ids_without_drafts(source, new):
    cfg, params, _ = model("book-small")
    plain = flaxgpt.generate(cfg, params, prompts()[:1], new, **SAMPLED)[0]
    options = SAMPLED | sources(cfg, params)[source]
    assert list(flaxgpt.stream(cfg, params, prompts()[0], new, **options)) == plain
    assert flaxgpt.generate(cfg, params, prompts()[:1], new, **options) == [plain]


@SLOW
@pytest.mark.parametrize("source", ["lookup", "similar"])
def test_hooks_masks_and_log_probabilities_are_those_without_drafts(source):
    cfg, params, _ = model("book-small")
    free = flaxgpt.generate(cfg, params, prompts(), 14)
    options = {
        "logits_fn": hooks.penalize_repetition(1.3),
        "min_new_tokens": 6,
        "stop_ids": [free[0][2], free[1][2]],
        "allowed": np.arange(cfg.vocab_size) % 7 > 0,
        "return_logprobs": True,
        "top_logprobs": 2,
        **SAMPLED,
    }
    plain = flaxgpt.generate(cfg, params, prompts(), 14, **options)
    found = flaxgpt.generate(cfg, params, prompts(), 14, **options, **sources(cfg, params)[source])
    for row, expected in zip(found, plain, strict=True):
        assert row.ids == expected.ids
        # Products of several rows are summed in another order.
        np.testing.assert_allclose(row.log_probs, expected.log_probs, rtol=1e-4)
        assert [[i for i, _ in top] for top in row.top] == [
            [i for i, _ in top] for top in expected.top
        ]


@SLOW
def test_keys_of_rows_and_window_steps_work_with_drafts():
    cfg, params, _ = model("book-small")
    options = {"temperature": 1.0, "key": jax.random.split(jax.random.key(1)), "window_step": 5}
    plain = flaxgpt.generate(cfg, params, prompts(), 50, **options)
    assert flaxgpt.generate(cfg, params, prompts(), 50, **options, lookup=2) == plain


@SLOW
def test_int8_weights_work_with_drafts():
    cfg, params, _ = model("book-small")
    small = flaxgpt.quantize(params)
    plain = flaxgpt.generate(cfg, small, prompts(), 20, **SAMPLED)
    for drafts in ({"lookup": 3}, {"draft": (cfg, small)}, {"draft": (cfg, params)}):
        assert flaxgpt.generate(cfg, small, prompts(), 20, **SAMPLED, **drafts) == plain


@SLOW
@pytest.mark.parametrize("source", ["lookup", "similar"])
def test_samples_and_prefixes_work_with_drafts(source):
    cfg, params, _ = model("book-small")
    shared = golden.prompt("book-small", 3)
    rows = [shared * 3, [*shared, 5]]
    options = {"temperature": 0.9, "key": jax.random.key(2), "samples": 2}
    plain = flaxgpt.generate(cfg, params, rows, 20, **options)
    options |= sources(cfg, params)[source]
    prefix = flaxgpt.prefill(cfg, params, shared)
    assert flaxgpt.generate(cfg, params, rows, 20, **options) == plain
    assert flaxgpt.generate(cfg, params, rows, 20, prefix=prefix, **options) == plain
    del options["samples"]
    options["key"] = jax.random.fold_in(options["key"], 0)[None]
    assert list(flaxgpt.stream(cfg, params, rows[0], 20, prefix=prefix, **options)) == plain[0]


@SLOW
def test_texts_with_stop_strings_are_those_without_drafts():
    cfg, params, tokenizer = flaxgpt.load("tales")
    texts = ["The king said to the queen, the king said to", "Once upon"]
    run = partial(flaxgpt.generate_text, cfg, params, tokenizer, texts, 12)
    plain = run()
    assert run(lookup=4) == plain
    assert run(lookup=4, stop=["e"]) == [text[: text.index("e")] for text in plain]
    pieces = flaxgpt.stream_text(cfg, params, tokenizer, texts[0], 12, lookup=4)
    assert "".join(pieces) == plain[0]
    assert run(lookup=4, match="( the| a| king)+") == run(match="( the| a| king)+")


# --- The small model


@SLOW
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_model_accepts_all_drafts_of_its_own(options):
    cfg, params, _ = model("book-small")
    drafting = Drafting(draft=(cfg, params), draft_length=3)
    _, counts = run(prompts(), 21, drafting, **options)
    assert (int(counts.verifying), int(counts.plain)) == (5, 0)
    assert counts.accepted.tolist() == [15, 15]


@SLOW
def test_a_small_model_catches_up_after_a_pause():
    cfg, params, _ = model("book-small")
    prepared = prepare(cfg, params, prompts(), 22, Sampling(), "float32")
    arguments = Drafting(draft=(cfg, params), draft_length=3).add_to(prepared)
    program, params, small, request, *_ = arguments
    state, step = programs.prefill(*arguments)
    state = dataclasses.replace(state, wait=jnp.int32(7), draft=jnp.full_like(state.draft, -1))
    for _ in range(7):
        assert step.gained.tolist() == [1, 1]
        state, step = programs.plain_step(program, params, small, request, state)
    assert step.has_draft
    _, step = programs.verifying_step(program, params, small, request, state)
    assert step.gained.tolist() == [4, 4]


@SLOW
def test_a_small_model_with_a_shorter_context_drafts_as_far_as_that():
    cfg, params, _ = model("book-small")
    short = dataclasses.replace(cfg, context_length=20)
    weights = params | {"pos_emb": {"weight": params["pos_emb"]["weight"][:20]}}
    rows, new = [golden.prompt("book-small", 6)], 24
    _, counts = run(rows, new, Drafting(draft=(short, weights)))
    # From 7 ids on in steps of 5: with 17, the last draft is read at position 19, the last one.
    assert (int(counts.verifying), counts.accepted.tolist()) == (3, [12])
    plain = flaxgpt.generate(cfg, params, rows, new)
    assert flaxgpt.generate(cfg, params, rows, new, draft=(short, weights)) == plain
    rows = [golden.prompt("book-small", 25), golden.prompt("book-small", 3, 1)]
    plain = flaxgpt.generate(cfg, params, rows, new)
    assert flaxgpt.generate(cfg, params, rows, new, draft=(short, weights)) == plain


@SLOW
def test_a_small_model_that_gives_nan_drafts_nothing():
    cfg, params, _ = model("book-small")
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    plain = flaxgpt.generate(cfg, params, prompts(), 12)
    assert flaxgpt.generate(cfg, params, prompts(), 12, draft=(cfg, broken)) == plain


@SLOW
def test_a_model_that_gives_nan_is_an_error_with_its_place():
    cfg, params, _ = model("book-small")
    first = flaxgpt.generate(cfg, params, [[1, 2]], 1)[0][0]
    broken = params | {"tok_emb": {"weight": params["tok_emb"]["weight"].at[first].set(jnp.nan)}}
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 1"):
        flaxgpt.generate(cfg, broken, [[1, 2]], 9, draft=(cfg, params))
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 1"):
        list(flaxgpt.stream(cfg, broken, [1, 2], 9, lookup=3))


# --- The distribution


@SLOW
@pytest.mark.parametrize("source", ["lookup", "draft"])
def test_sampled_ids_have_the_distribution_of_the_model(source):
    cfg = GPTConfig(vocab_size=6, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
    params = jax.tree.map(lambda x: 3 * x, flaxgpt.init(cfg, jax.random.key(0)))
    draft = (cfg, jax.tree.map(lambda x: 3 * x, flaxgpt.init(cfg, jax.random.key(1))))
    drafting = Drafting(lookup=2) if source == "lookup" else Drafting(draft=draft, draft_length=2)
    # Whatever follows the last 2 has followed one before, so that every row has a draft.
    prompt, draws, accepted = [2, 0, 2, 1, 2, 3, 2, 4, 2, 5, 2, 2], [], 0
    for seed in range(5):
        sampling = Sampling(temperature=1.0, key=jax.random.key(seed))
        prepared = prepare(cfg, params, [prompt] * 4096, 3, sampling, "float32")
        out, counts = drafting.add_to(prepared).decode()
        draws += np.asarray(out)[:, 12:15].tolist()
        accepted += int(counts.accepted.sum())
    assert accepted > len(draws) / 10  # else the drafts are not tested

    every = np.stack(np.meshgrid(*[range(6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    ids = np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)
    log_probs = np.asarray(flaxgpt.score(cfg, params, ids), np.float64)[:, -3:].sum(axis=1)
    expected = len(draws) * np.exp(log_probs)
    numbers = np.array(draws) @ np.array([36, 6, 1])
    found = np.bincount(numbers, minlength=216)
    assert expected.min() > 5
    statistic, degrees = ((found - expected) ** 2 / expected).sum(), 215
    # Five standard deviations above the mean of the chi-square distribution.
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


# --- Compilation


def abstract_program(cfg, layout, draft):
    """Return a program with drafts and its abstract arguments."""
    program, (params, request, ids, start) = abstract_call(cfg, layout)
    small = (cfg, params) if draft else (None, None)
    return SpeculativeProgram(program, 3, small[0]), (params, small[1], request, ids, start)


@pytest.mark.parametrize("draft", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("layout", ["merged", pytest.param("joined", marks=SLOW)])
def test_neither_driver_has_a_scan_in_its_jaxpr(layout, draft):
    cfg = dataclasses.replace(GPTConfig.preset("book-124M"), n_layers=1)
    program, arguments = abstract_program(cfg, layout, draft)
    names = set(primitives(jax.make_jaxpr(partial(programs.decode, program))(*arguments).jaxpr))
    assert {"while", "dot_general"} <= names
    assert "scan" not in names

    params, small, request, _, _ = arguments
    state, _ = jax.eval_shape(partial(programs.prefill, program), *arguments)
    for step in (programs.plain_step, programs.verifying_step):
        jaxpr = jax.make_jaxpr(partial(step, program))(params, small, request, state)
        names = set(primitives(jaxpr.jaxpr))
        assert "dot_general" in names
        assert "scan" not in names


@SLOW
@pytest.mark.parametrize(("rows", "draft"), [(1, False), (8, False), (1, True)])
def test_no_step_of_the_loop_copies_a_cache_on_cpu(rows, draft):
    cfg = GPTConfig(vocab_size=64, context_length=192, n_layers=1)
    params = flaxgpt.init(cfg, jax.random.key(0))
    prepared = prepare(cfg, params, np.ones((rows, 32), int), 128, Sampling(), "float32")
    drafting = Drafting(draft=(cfg, params)) if draft else Drafting(lookup=4)
    arguments = drafting.add_to(prepared)
    decode = programs.compiled_decode(PLATFORMS["cpu"].decode_options)
    program = decode.lower(*arguments).compile().as_text()
    slots = 192 + 4 + 1
    buffer = rf"f32\[(?:{rows},12|{12 * rows}),(?:{slots}|{slots + 1}),64\]"
    assert re.search(buffer, program)
    copies = re.findall(rf"= {buffer}\S* copy\(%(\w+)", program)
    # Only the zeros with which the caches begin are copied, before the loop.
    assert all("broadcast" in name for name in copies)


@SLOW
@pytest.mark.parametrize("source", ["lookup", "itself"])
def test_ten_prompt_lengths_in_one_bucket_compile_once(source, compilations):
    cfg, params, _ = model("book-qkv-bias")
    drafts = sources(cfg, params)[source]
    flaxgpt.generate(cfg, params, [[5], [6]], 8, **drafts)
    list(flaxgpt.stream(cfg, params, [5, 5, 5, 5], 8, **drafts))
    list(flaxgpt.stream(cfg, params, [1, 2, 3, 4], 8, temperature=2.0, key=jax.random.key(0)))
    del compilations[:]
    for n in range(1, 11):
        options = {"temperature": n / 10, "top_k": n, "key": jax.random.key(n)}
        flaxgpt.generate(cfg, params, [[n] * n, [1]], 5 + n % 4, **options, **drafts)
    assert compilations == []


# --- Invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookup": 0}, "lookup=0 must be a whole number, 1 or more"),
        ({"lookup": True}, "lookup=True must be a whole number"),
        ({"lookup": 32}, "lookup=32 must be below context_length=32"),
        ({"draft": "tales"}, "draft must be the configuration and the parameters"),
        ({"draft_length": 2}, "draft_length=2 has no effect without a draft model"),
        ({"lookup": 2, "beams": 2}, "lookup does not work with beam search"),
    ],
)
def test_drafts_that_cannot_work_are_refused(options, message):
    cfg, params, _ = golden.model("book-small")
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, [[1]], 3, **options)
    if "beams" not in options:
        with pytest.raises(ValueError, match=message):
            flaxgpt.stream(cfg, params, [1], 3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookup": 2}, "lookup=2 and draft are two sources of drafts"),
        ({"draft_length": 0}, "draft_length=0 must be a whole number"),
        ({"draft_length": 32}, "draft_length=32 must be below context_length=32"),
        ({"beams": 2}, "draft does not work with beam search"),
        ({"capture": ["hidden_0"]}, "capture does not work with drafts"),
        ({"patches": {"hidden_0": jnp.tanh}}, "patches does not work with drafts"),
    ],
)
def test_a_small_model_that_cannot_work_is_refused(options, message):
    cfg, params, _ = golden.model("book-small")
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, [[1]], 3, draft=(cfg, params), **options)


def test_a_small_model_that_does_not_fit_is_refused():
    cfg, params, _ = golden.model("book-small")
    other, weights, _ = golden.model("hf-small")
    with pytest.raises(ValueError, match="the draft model has vocab_size=300, but the model has"):
        flaxgpt.generate(cfg, params, [[1]], 3, draft=(other, weights))
    with pytest.raises(ValueError, match=r"the draft model: params do not fit .* missing"):
        flaxgpt.generate(cfg, params, [[1]], 3, draft=(cfg, weights))
    short = dataclasses.replace(cfg, context_length=4)
    with pytest.raises(ValueError, match="draft_length=5 exceeds context_length=4 of the draft"):
        flaxgpt.generate(cfg, params, [[1]], 3, draft=(short, params), draft_length=5)
