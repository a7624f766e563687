"""What prompts begin with is read once, and so are prompts that are continued several times."""

import dataclasses
import string
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxgpt
from command import call
from flaxgpt.generation import programs
from flaxgpt.generation.hooks import penalize_repetition
from flaxgpt.generation.prefilling import _read
from flaxgpt.generation.prompts import bucket, prepare, unread_columns
from flaxgpt.generation.sampling import Sampling
from flaxgpt.model import param_shapes
from flaxgpt.platform import PLATFORMS
from flaxgpt.tokenizer import CharTokenizer
from test_generation import primitives

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(vocab_size=100, context_length=64, emb_dim=32, n_heads=4, n_layers=2)
PARAMS = flaxgpt.init(CFG, jax.random.key(0))
IDS = np.random.default_rng(0).integers(0, CFG.vocab_size, (4, 64)).tolist()
SHARED = IDS[0][:20]
RAGGED = [SHARED + IDS[1][:3], SHARED, SHARED + IDS[2][:20]]
TOKENIZER = CharTokenizer(string.printable)
slow = pytest.mark.slow

generate = partial(flaxgpt.generate, CFG, PARAMS)
prefill = partial(flaxgpt.prefill, CFG, PARAMS)


def sampled(seed=3):
    return {"temperature": 1.0, "key": jax.random.key(seed)}


# --- With a prefix


def test_a_batch_has_the_ids_that_it_has_without_the_prefix():
    assert generate(RAGGED, 8, prefix=prefill(SHARED)) == generate(RAGGED, 8)


@slow
@pytest.mark.parametrize("more", [0, 17, 44])
def test_a_prompt_of_any_length_has_the_ids_that_it_has_without_also_past_the_context(more):
    prompt, prefix = SHARED + IDS[1][:more], prefill(SHARED)
    assert generate([prompt], 50, prefix=prefix) == generate([prompt], 50)
    rows = [SHARED + IDS[2][: more // 2], prompt]
    assert generate(rows, 50, prefix=prefix, **sampled()) == generate(rows, 50, **sampled())


@slow
@pytest.mark.parametrize("length", [1, 64])
def test_a_prefix_may_have_any_length_up_to_the_context(length):
    prefix = prefill(IDS[0][:length])
    prompts = [IDS[0][:length], IDS[0]]
    assert generate(prompts, 5, prefix=prefix) == generate(prompts, 5)


@slow
@pytest.mark.parametrize("layout", ["separate", "joined"])
def test_all_cache_layouts_give_the_same_ids(layout, monkeypatch):
    expected = generate(RAGGED, 8, **sampled()), generate(RAGGED, 8, samples=2, **sampled())
    other = dataclasses.replace(PLATFORMS["cpu"], cache_layout=layout)
    monkeypatch.setitem(PLATFORMS, "cpu", other)
    prefix = prefill(SHARED)
    assert prefix.cache.layout == layout
    assert generate(RAGGED, 8, prefix=prefix, **sampled()) == expected[0]
    assert generate(RAGGED, 8, prefix=prefix, samples=2, **sampled()) == expected[1]


@slow
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_narrow_dtypes_give_the_same_probabilities_up_to_rounding(dtype):
    options = {"return_logprobs": True, "dtype": dtype}
    found = generate(RAGGED, 1, prefix=prefill(SHARED, dtype=dtype), **options)
    expected = generate(RAGGED, 1, **options)
    for row, other in zip(found, expected, strict=True):
        # bfloat16 has 8 bits: logits up to 0.5 are rounded to 2e-3.
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=5e-3)


@slow
def test_only_what_follows_the_prefix_is_read(monkeypatch):
    shapes = []
    apply = programs.apply_states

    def recorded(cfg, platform, params, ids, cache):
        shapes.append(ids.shape)
        return apply(cfg, platform, params, ids, cache)

    monkeypatch.setattr(programs, "apply_states", recorded)
    prepared = prepare(CFG, PARAMS, RAGGED, 4, Sampling(), "float32", prefix=prefill(SHARED))
    jax.eval_shape(partial(programs.decode, prepared.program), *prepared[1:])
    assert set(shapes) == {(3, bucket(20)), (3, 1)}


@pytest.mark.parametrize(
    ("known", "length", "width", "columns"),
    [
        (512, 528, 768, (512, 528)),
        (512, 512, 512, (496, 512)),  # the last id is read again
        (20, 40, 48, (20, 44)),
        (1000, 1010, 1024, (1000, 1016)),
        (1015, 1017, 1024, (1008, 1024)),  # within the width
        (3, 5, 16, (0, 16)),
    ],
)
def test_the_columns_that_are_read_hold_the_last_id_and_end_within_the_width(
    known, length, width, columns
):
    assert unread_columns(known, length, width) == slice(*columns)


@slow
def test_beams_hooks_and_log_probabilities_are_those_without_the_prefix():
    prefix = prefill(SHARED)
    search = {"beams": 3, "return_beams": 2, "stop_ids": [5]}
    found, expected = generate(RAGGED, 8, prefix=prefix, **search), generate(RAGGED, 8, **search)
    assert [[b.ids for b in row] for row in found] == [[b.ids for b in row] for row in expected]

    options = {"logits_fn": penalize_repetition(1.5), "return_logprobs": True, "top_logprobs": 2}
    found, expected = generate(RAGGED, 8, prefix=prefix, **options), generate(RAGGED, 8, **options)
    for row, other in zip(found, expected, strict=True):
        assert row.ids == other.ids
        np.testing.assert_allclose(row.log_probs, other.log_probs, rtol=1e-5)


@slow
def test_one_prefix_serves_streams_and_batches_again_and_again():
    prefix = prefill(SHARED)
    for _ in range(2):
        ids = list(flaxgpt.stream(CFG, PARAMS, RAGGED[2], 60, prefix=prefix))
        assert ids == generate([RAGGED[2]], 60)[0]
        assert generate(RAGGED, 8, prefix=prefix) == generate(RAGGED, 8)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(prefix))


@slow
def test_texts_are_those_without_the_prefix():
    prompts = ["Once upon a time", "Once upon two times"]
    prefix = prefill(TOKENIZER.encode("Once upon "))
    for options in ({}, {"stop": ["a", "b", "c"]}):
        text = partial(flaxgpt.generate_text, CFG, PARAMS, TOKENIZER, prompts, 12, **sampled())
        assert text(prefix=prefix, **options) == text(**options)
    stream = partial(flaxgpt.stream_text, CFG, PARAMS, TOKENIZER, prompts[0], 12)
    assert list(stream(prefix=prefix)) == list(stream())


@slow
def test_prompts_of_other_lengths_in_the_same_size_classes_compile_nothing(compilations):
    rows = [[IDS[0][:n] + IDS[1][:m], IDS[0][:n]] for n, m in ((17, 9), (20, 12), (24, 1))]
    prefixes = [prefill(IDS[0][:n]) for n in (17, 20, 24)]
    generate(rows[0], 8, prefix=prefixes[0])
    stream = partial(flaxgpt.stream, CFG, PARAMS)
    list(stream(rows[0][0], 8))
    list(stream(rows[0][0], 8, prefix=prefixes[0]))
    del compilations[:]
    for prompts, prefix in zip(rows, prefixes, strict=True):
        generate(prompts, 6, prefix=prefix, **sampled())
        list(stream(prompts[0], 6, prefix=prefix))
        prefill(prompts[1])
    assert compilations == []


@slow
def test_the_steps_of_a_stream_are_compiled_once_with_and_without_a_prefix():
    prompt = RAGGED[0]
    list(flaxgpt.stream(CFG, PARAMS, prompt, 3))
    before = programs.extend_step._cache_size()
    list(flaxgpt.stream(CFG, PARAMS, prompt, 3, prefix=prefill(SHARED)))
    assert programs.extend_step._cache_size() == before


@slow
def test_the_programs_have_no_scan():
    prefix, options = prefill(SHARED), Sampling(**sampled())
    prepared = prepare(CFG, PARAMS, RAGGED, 60, options, "float32", samples=2, prefix=prefix)
    program, *arguments = prepared
    decode = jax.make_jaxpr(partial(programs.decode, program))(*arguments)
    assert "while" in set(primitives(decode.jaxpr))
    static = (program.platform, jnp.dtype("float32"), None, 32)
    ids = np.zeros((1, 16), np.int32)
    read = jax.make_jaxpr(partial(_read, CFG, static))(PARAMS, prefix.cache, ids, np.int32(30))
    assert "dot_general" in set(primitives(read.jaxpr))
    for jaxpr in (decode, read):
        assert "scan" not in set(primitives(jaxpr.jaxpr))


@pytest.fixture(scope="module")
def prefix():
    return prefill(SHARED)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([SHARED, [*SHARED[:7], 99]], f"prompt 1 .* at place 7, the prefix has {SHARED[7]}, but"),
        ([SHARED, [*SHARED[:7], 99, 1]], "but the prompt has 99"),
        ([SHARED[:-1]], "at place 19, .* but the prompt ends"),
        ([SHARED + 2 * IDS[1]], "prompt 0 has 148 ids, more than context_length=64"),
    ],
)
def test_prompts_that_do_not_begin_with_the_prefix_are_refused(prefix, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(prompts, 3, prefix=prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 1}, "the prefix has 2 layers of shape .* but the model has 1 layers"),
        ({"emb_dim": 16, "n_heads": 2}, r"the model has 2 layers, 2 heads of 8"),
        ({"context_length": 22}, "context_length=22"),
    ],
)
def test_a_prefix_of_another_model_is_refused(prefix, changes, message):
    cfg = dataclasses.replace(CFG, **changes)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, [SHARED], 3, prefix=prefix)


def test_a_prefix_of_another_dtype_is_refused(prefix):
    with pytest.raises(ValueError, match="computed in float32, not in dtype=bfloat16"):
        generate([SHARED], 3, prefix=prefix, dtype="bfloat16")


def test_a_prefix_of_another_layout_is_refused(prefix, monkeypatch):
    other = dataclasses.replace(PLATFORMS["cpu"], cache_layout="joined")
    monkeypatch.setitem(PLATFORMS, "cpu", other)
    with pytest.raises(ValueError, match=r'layout "merged", but .* use "joined"'):
        generate([SHARED], 3, prefix=prefix)


@pytest.mark.parametrize("name", ["capture", "patches"])
def test_a_prefix_cannot_be_observed(prefix, name):
    options = {"capture": ["hidden_*"], "patches": {"hidden_0": jnp.tanh}}
    with pytest.raises(ValueError, match=f"prefix does not work with {name}"):
        generate([SHARED], 3, prefix=prefix, **{name: options[name]})
    if name == "capture":
        with pytest.raises(ValueError, match="samples does not work with capture"):
            generate([SHARED], 3, samples=2, capture=["hidden_*"], **sampled())


@pytest.mark.parametrize("given", [SHARED, "text"])
def test_only_a_prefix_is_a_prefix(given):
    with pytest.raises(ValueError, match=r"prefix must be a flaxgpt\.Prefix, .* got"):
        generate([SHARED], 3, prefix=given)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("text", "prefill takes a flat list of ids, got 'text'"),
        (7, "prefill takes a flat list of ids, got 7"),
        ([[1, 2], [3]], "ids must be a flat list of integers, not of rows"),
        ([[1, 2]], r"ids of shape \(1, 2\) .* must be a flat list"),
        ([], r"ids of shape \(0,\)"),
        ([0.5], "dtype float64 must be a flat list of one or more integers"),
        ([1, 100], r"id 100 at \[1\] is outside the vocabulary"),
        ([1] * 65, "65 ids exceed context_length=64"),
    ],
)
def test_ids_that_cannot_be_a_prefix_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        prefill(ids)


def test_prefill_inside_jit_is_refused():
    with pytest.raises(ValueError, match="prefill runs on the host, not inside jit"):
        jax.jit(prefill)(jnp.array(SHARED))


# --- Samples


def repeated(prompts, n):
    return [prompt for prompt in prompts for _ in range(n)]


@slow
def test_samples_are_those_of_prompts_that_are_repeated():
    prompts = [IDS[0][:3], IDS[1][:7]]
    rows = generate(prompts, 6, samples=3, **sampled())
    assert rows == generate(repeated(prompts, 3), 6, **sampled())
    assert len(set(map(tuple, rows))) == 6


@slow
def test_samples_are_those_of_repeated_prompts_past_the_context_and_with_a_prefix():
    expected = generate(repeated(RAGGED, 3), 70, window_step=4, **sampled())
    assert generate(RAGGED, 70, samples=3, window_step=4, **sampled()) == expected
    assert (
        generate(RAGGED, 70, samples=3, window_step=4, prefix=prefill(SHARED), **sampled())
        == expected
    )


@slow
def test_samples_may_have_keys_of_their_own_hooks_and_log_probabilities():
    options = {
        "temperature": 0.8,
        "key": jax.random.split(jax.random.key(1), 6),
        "logits_fn": penalize_repetition(1.5),
        "stop_ids": range(0, 100, 7),
        "min_new_tokens": 3,
        "return_logprobs": True,
        "top_logprobs": 2,
    }
    found = generate(RAGGED, 12, samples=2, **options)
    expected = generate(repeated(RAGGED, 2), 12, **options)
    assert len(found) == 6
    for row, other in zip(found, expected, strict=True):
        assert row.ids == other.ids
        np.testing.assert_allclose(row.log_probs, other.log_probs, rtol=1e-5)
    assert min(len(row.ids) for row in found) > 3


@slow
@pytest.mark.parametrize(
    "options",
    [{}, {"stop": ["a", "b", "c"]}, {"match": "[a-f]{2,5}!", "stop_ids": [99]}],
    ids=["free", "stop strings", "match"],
)
def test_samples_of_texts_are_those_of_repeated_texts(options):
    prompts = ["Once upon", "The king"]
    text = partial(flaxgpt.generate_text, CFG, PARAMS, TOKENIZER, max_new_tokens=12, **options)
    expected = text(prompts=repeated(prompts, 2), **sampled())
    assert text(prompts=prompts, samples=2, **sampled()) == expected


@slow
def test_prompts_are_read_once_for_all_samples(monkeypatch):
    shapes = []
    apply = programs.apply_states

    def recorded(cfg, platform, params, ids, cache):
        shapes.append(ids.shape)
        return apply(cfg, platform, params, ids, cache)

    monkeypatch.setattr(programs, "apply_states", recorded)
    options = Sampling(**sampled())
    prepared = prepare(CFG, PARAMS, RAGGED[:2], 4, options, "float32", samples=5)
    jax.eval_shape(partial(programs.decode, prepared.program), *prepared[1:])
    assert set(shapes) == {(2, bucket(23)), (10, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be a whole number"),
        ({"samples": 3}, "samples=3 at temperature 0 would be the same ids 3 times"),
        ({"samples": 2, "beams": 2}, "samples does not work with beam search"),
        (
            {"samples": 2, "temperature": 1.0, "key": jax.random.split(jax.random.key(0), 3)},
            r"keys of shape \(3,\) must be one key, or one per row: 2",
        ),
    ],
)
def test_samples_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate([[1]], 3, **options)
    if "key" not in options:
        with pytest.raises(ValueError, match=message):
            flaxgpt.generate_text(CFG, PARAMS, TOKENIZER, ["a"], 3, **options)


@slow
def test_the_command_reads_a_long_prompt_once_and_prints_the_samples_of_the_library(
    tmp_path, monkeypatch
):
    flaxgpt.save(tmp_path / "chars", CFG, PARAMS, tokenizer=TOKENIZER)
    made, real = [], flaxgpt.prefill

    def recorded(cfg, params, ids, **options):
        made.append(ids)
        return real(cfg, params, ids, **options)

    monkeypatch.setattr(flaxgpt, "prefill", recorded)
    flags = ("--model", tmp_path / "chars", "--n", 2, "--max-new-tokens", 4, "--no-echo")
    for prompt, prefills in (("Once upon a time there was", 1), ("Hi", 0), ("Hello " * 20, 0)):
        process = call("generate", prompt, *flags, "--temperature", 0.9, "--seed", 5)
        texts = flaxgpt.generate_text(
            CFG, PARAMS, TOKENIZER, [prompt], 4, samples=2, temperature=0.9, key=jax.random.key(5)
        )
        assert process.stdout.decode() == "\n\n".join(texts) + "\n", process.stderr
        assert len(made) == prefills
        del made[:]
