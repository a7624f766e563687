import dataclasses
import math
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
from flaxgpt import GPTConfig
from flaxgpt.evaluation import TextEvaluation, evaluate_text, score
from flaxgpt.model import param_shapes
from flaxgpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = GPTConfig(vocab_size=61, context_length=8, emb_dim=16, n_heads=2, n_layers=1)
STRIDES = [1, 3, 4, 8]  # one does not divide the context
FULL = CFG.context_length + 1  # ids of the longest row that `score` takes

# A log-probability is a difference of logits, which are sums of dozens of float32 products. The
# order of summation changes it by 1e-6; a context that is off by one id, by 1e-3 or more.
CLOSE = 1e-5


def random_params(cfg, seed=0):
    """Return parameters whose predictions depend on every visible id, unlike fresh ones."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return (0.15 * rng.normal(size=shape.shape) + (len(shape.shape) == 1)).astype(np.float32)

    return jax.tree.map(draw, param_shapes(cfg))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(CFG))


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, length)


def log_prob(params, context, target):
    """Return the log-probability of the next id from a plain forward pass over the context."""
    # No logit depends on later ids, so padding lets contexts of all lengths compile once.
    filled = np.append(context, np.zeros(CFG.context_length - len(context), int))
    logits = np.asarray(flaxgpt.forward(CFG, params, filled[None]), np.float64)
    logits = logits[0, len(context) - 1]
    return logits[target] - np.log(np.exp(logits).sum())


def mean_loss(scores):
    return -np.asarray(scores, np.float64).mean()


def reference_loss(params, ids, stride):
    """Return the loss by definition, window by window and id by id."""
    found, start = {}, 0
    while len(found) < len(ids) - 1:
        for place in range(start + 1, min(start + FULL, len(ids))):
            if place not in found:
                found[place] = log_prob(params, ids[start:place], ids[place])
        start += stride
    return -np.mean(list(found.values()))


def blind_model():
    """Return parameters whose prediction ignores the context, and that prediction."""
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), param_shapes(CFG))
    params["final_norm"]["shift"] += 1
    params["out_head"]["weight"][:, 0] = np.random.default_rng(0).normal(size=CFG.vocab_size)
    logits = params["out_head"]["weight"][:, 0].astype(np.float64)
    return params, logits - np.log(np.exp(logits).sum())


# --- Rows: score


jitted_score = jax.jit(partial(score, CFG))


@pytest.mark.parametrize("length", [2, FULL])
def test_each_id_is_scored_given_the_ids_before_it(params, length):
    ids = np.stack([text(length, 1), text(length, 2)])
    scores = score(CFG, params, ids)
    chex.assert_shape(scores, (2, length - 1))
    chex.assert_type(scores, jnp.float32)
    expected = [[log_prob(params, row[:t], row[t]) for t in range(1, length)] for row in ids]
    np.testing.assert_allclose(scores, expected, atol=CLOSE)


@pytest.mark.parametrize("name", ["book-small", "book-qkv-bias"])
def test_the_mean_score_is_the_books_loss(name):
    # The golden targets are not the next inputs, so each follows its prefix in a row of its own.
    cfg, params, expected = golden.model(name)
    found = []
    for ids, targets in zip(expected["input_ids"], expected["targets"], strict=True):
        rows = np.tile(np.append(ids, 0), (len(ids), 1))
        rows[np.arange(len(ids)), np.arange(len(ids)) + 1] = targets
        found.append(np.diagonal(score(cfg, params, rows)))
    np.testing.assert_allclose(-np.mean(found), expected["loss"], rtol=1e-6)


def test_the_mean_score_is_hugging_faces_loss():
    cfg, params, expected = golden.model("hf-small")
    scores = score(cfg, params, expected["input_ids"])
    np.testing.assert_allclose(mean_loss(scores), expected["lm_loss"], rtol=1e-6)


def test_the_gradient_of_the_score_is_that_of_the_logits(params):
    ids = text(FULL)[None]

    def plain(params):
        log_probs = jax.nn.log_softmax(flaxgpt.forward(CFG, params, ids[:, :-1]))
        return log_probs[0, np.arange(CFG.context_length), ids[0, 1:]].mean()

    def scored(params):
        return score(CFG, params, ids).mean()

    both = jax.jit(lambda params: (jax.grad(scored)(params), jax.grad(plain)(params)))
    chex.assert_trees_all_close(*both(params), atol=CLOSE)


def test_vmap_over_models_and_batches_scores_each(params):
    other = random_params(CFG, 1)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), params, other)
    ids = np.stack([text(6, 1), text(6, 2)])
    scores = jax.vmap(lambda params, ids: score(CFG, params, ids[None]))(both, ids)
    scores = np.asarray(scores)[:, 0]
    np.testing.assert_allclose(scores[:1], score(CFG, params, ids[:1]), atol=CLOSE)
    np.testing.assert_allclose(scores[1:], score(CFG, other, ids[1:]), atol=CLOSE)


@pytest.mark.parametrize("bad", [-1, CFG.vocab_size, 2**31 - 1, -(2**31)])
def test_an_unknown_id_under_jit_is_nan_from_its_own_score_on(params, bad):
    for place in (0, 3, 5):
        ids = text(6).astype(np.int32)
        ids[place] = bad
        scores = np.asarray(jitted_score(params, np.stack([ids, text(6, 1).astype(np.int32)])))
        assert np.isnan(scores[0, max(0, place - 1) :]).all()
        assert np.isfinite(scores[1]).all()


def test_a_last_id_below_0_is_nan_in_a_type_that_cannot_hold_the_vocabulary():
    cfg, params, expected = golden.model("hf-small")
    assert cfg.vocab_size > 127
    ids = np.minimum(expected["input_ids"], 127).astype(np.int8)
    ids[0, -1] = -1
    scores = np.asarray(jax.jit(lambda ids: score(cfg, params, ids))(ids))
    assert np.isnan(scores[0, -1])
    assert np.isfinite(scores[0, :-1]).all() and np.isfinite(scores[1:]).all()


def test_half_precision_scores_are_float32_and_near(params):
    ids = text(FULL)[None]
    scores, exact = score(CFG, params, ids, dtype=jnp.bfloat16), score(CFG, params, ids)
    chex.assert_type(scores, jnp.float32)
    # bfloat16 has 8 bits, so logits near 2, as here, are off by some thousandths.
    np.testing.assert_allclose(scores, exact, atol=0.03)
    assert (np.asarray(scores) != np.asarray(exact)).any()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1]], "rows of 1 id have nothing to score"),
        ([[0] * (FULL + 1)], r"10 ids per row exceed context_length \+ 1 = 9: use `evaluate_text`"),
        ([[1, 61]], r"id 61 at \[0, 1\] is outside the vocabulary"),
        ([[-1, 1]], r"id -1 at \[0, 0\] is outside the vocabulary"),
        ([1, 2], r"pass ids\[None\]"),
        ([[1.0, 2.0]], "float64 must be integers"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(params, ids, words):
    with pytest.raises(ValueError, match=words):
        score(CFG, params, ids)


def test_params_of_another_model_are_refused(params):
    other = dataclasses.replace(CFG, n_layers=2)
    for function, ids in ((score, [[1, 2]]), (evaluate_text, [1, 2])):
        with pytest.raises(ValueError, match="missing trf_blocks_1"):
            function(other, params, ids)


# --- Texts: evaluate_text


@pytest.mark.parametrize("stride", STRIDES)
def test_the_loss_is_that_of_the_definition(params, stride):
    ids = text(2 * CFG.context_length + 5)
    found = evaluate_text(CFG, params, ids, stride=stride, batch_size=3)
    assert found.loss == pytest.approx(reference_loss(params, ids, stride), abs=CLOSE)
    assert (found.tokens, found.stride) == (len(ids) - 1, stride)


def test_stride_1_gives_each_id_all_the_context_there_can_be(params):
    ids = text(21)
    contexts = [ids[max(0, place - CFG.context_length) : place] for place in range(1, 21)]
    scores = [log_prob(params, c, target) for c, target in zip(contexts, ids[1:], strict=True)]
    found = evaluate_text(CFG, params, ids, stride=1, batch_size=3)
    assert found.loss == pytest.approx(-np.mean(scores), abs=CLOSE)


def test_a_stride_of_the_context_is_plain_chunks(params):
    ids = text(4 * CFG.context_length + 1)
    chunks = np.stack([ids[i : i + FULL] for i in range(0, len(ids) - 1, CFG.context_length)])
    found = evaluate_text(CFG, params, ids, stride=CFG.context_length, batch_size=3)
    assert found.loss == pytest.approx(mean_loss(score(CFG, params, chunks)), abs=CLOSE)
    assert found.windows == 4


def test_the_stride_is_half_the_context_unless_given(params):
    ids = text(40)
    assert evaluate_text(CFG, params, ids) == evaluate_text(CFG, params, ids, stride=4)


def test_a_context_of_one_id_has_stride_1():
    cfg = dataclasses.replace(CFG, context_length=1)
    params = random_params(cfg)
    ids = text(5)
    found = evaluate_text(cfg, params, ids)
    pairs = np.stack([ids[:-1], ids[1:]], axis=1)
    assert found.loss == pytest.approx(mean_loss(score(cfg, params, pairs)), abs=CLOSE)
    assert (found.stride, found.windows) == (1, 4)


@pytest.mark.parametrize("length", [2, FULL - 4, FULL])
def test_a_text_within_one_window_is_one_row(params, length):
    ids = text(length)
    found = evaluate_text(CFG, params, ids)
    assert found.loss == pytest.approx(mean_loss(score(CFG, params, ids[None])), abs=CLOSE)
    assert (found.tokens, found.windows) == (length - 1, 1)


@settings(max_examples=60)
@given(length=st.integers(2, CFG.vocab_size), stride=st.sampled_from(STRIDES))
def test_every_id_but_the_first_is_counted_exactly_once(length, stride):
    # Every id occurs once with a distinct loss, so the sum shows which ids were counted.
    params, log_probs = blind_model()
    ids = np.random.default_rng(length).permutation(CFG.vocab_size)[:length]
    found = evaluate_text(CFG, params, ids, stride=stride, batch_size=3)
    assert found.tokens == length - 1
    assert found.loss * found.tokens == pytest.approx(-log_probs[ids[1:]].sum(), abs=1e-4)
    later = max(0, length - 1 - CFG.context_length)
    assert found.windows == 1 + math.ceil(later / stride)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_change_the_result(params, batch_size):
    ids = text(50)
    found, usual = (
        evaluate_text(CFG, params, ids, batch_size=batch_size),
        evaluate_text(CFG, params, ids),
    )
    assert found.loss == pytest.approx(usual.loss, abs=1e-6)
    assert dataclasses.replace(found, loss=usual.loss) == usual


def test_ids_may_be_lists_device_arrays_or_files(params, tmp_path):
    ids = text(30)
    stored = np.memmap(tmp_path / "ids", np.uint16, "w+", shape=30)
    stored[:] = ids
    wanted = evaluate_text(CFG, params, ids, batch_size=3)
    for given_ids in (ids.tolist(), jnp.asarray(ids), stored, ids.astype(np.uint64)):
        assert evaluate_text(CFG, params, given_ids, batch_size=3) == wanted


def test_texts_of_other_lengths_compile_nothing(params, compilations):
    evaluate_text(CFG, params, text(100), batch_size=3)
    del compilations[:]
    for length in (2, 30, 77, 1000):
        evaluate_text(CFG, params, text(length), batch_size=3)
    assert compilations == []


def test_rows_computed_together_are_bounded_for_a_large_vocabulary():
    # 512 positions of 50,257 logits take 103 MB per row, so eight rows would be too many.
    gpt2 = GPTConfig.preset("gpt2")
    assert flaxgpt.evaluation._rows(gpt2, 512, 1000) == 1
    assert flaxgpt.evaluation._rows(gpt2, 1, 1000) == 1  # attention is as large in this case
    assert flaxgpt.evaluation._rows(CFG, 4, 1000) == 1024


def test_half_precision_measures_near(params):
    ids = text(30)
    exact = evaluate_text(CFG, params, ids, batch_size=3)
    found = evaluate_text(CFG, params, ids, batch_size=3, dtype=jnp.bfloat16)
    assert found.loss != exact.loss
    assert found.loss == pytest.approx(exact.loss, abs=0.01)  # as above; this is a mean


def test_progress_counts_up_to_all_ids(params):
    calls = []
    evaluate_text(CFG, params, text(30), batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [(12, 29), (24, 29), (29, 29)]


# --- Perplexity and bytes


def test_perplexity_and_bits_follow_from_the_loss():
    found = TextEvaluation(loss=math.log(8), tokens=10, bytes=15, windows=1, stride=4)
    assert found.perplexity == pytest.approx(8)
    assert found.bits_per_byte == pytest.approx(3 * 10 / 15)


def test_a_huge_loss_has_infinite_perplexity():
    assert TextEvaluation(loss=1e4, tokens=1, bytes=1, windows=1, stride=1).perplexity == math.inf


def test_without_a_tokenizer_there_are_no_bytes(params):
    found = evaluate_text(CFG, params, text(9))
    assert found.bytes is None and found.bits_per_byte is None


def test_characters_of_several_bytes_count_all_of_them(params):
    tokenizer = CharTokenizer.from_text("aé€😀")
    found = evaluate_text(CFG, params, tokenizer.encode("😀é€a😀"), tokenizer=tokenizer)
    assert found.bytes == len("é€a😀".encode())  # the first id is not predicted
    assert found.bits_per_byte == pytest.approx(found.loss * 4 / math.log(2) / 10)


def test_bytes_of_split_characters_add_up():
    cfg = dataclasses.replace(CFG, vocab_size=50257)
    params = random_params(cfg)
    tokenizer = flaxgpt.load_tokenizer("gpt2")
    ids = tokenizer.encode("A 🦜 speaks 日本語")
    assert any("�" in tokenizer.decode([id]) for id in ids)
    found = evaluate_text(cfg, params, ids, tokenizer=tokenizer, batch_size=1)
    assert found.bytes == len(" 🦜 speaks 日本語".encode())


def test_bytes_of_millions_of_ids_add_up():
    ids = np.tile(np.array([0, 1], np.uint8), 2**21 + 5)
    n_bytes = flaxgpt.evaluation._count_bytes(CharTokenizer("a€"), ids)
    assert n_bytes == len("a€".encode()) * (2**21 + 5) - 1  # the first is an "a"


def test_special_tokens_count_as_tokens_but_not_as_text():
    cfg = dataclasses.replace(CFG, vocab_size=50257)
    params = random_params(cfg)
    tokenizer = flaxgpt.load_tokenizer("gpt2")
    end = tokenizer.special_tokens["<|endoftext|>"]
    ids = [end, *tokenizer.encode("Hello"), end]
    found = evaluate_text(cfg, params, ids, tokenizer=tokenizer, batch_size=1)
    assert (found.tokens, found.bytes) == (2, 5)
    only = evaluate_text(cfg, params, [end, end], tokenizer=tokenizer, batch_size=1)
    assert (only.bytes, only.bits_per_byte) == (0, None)


# --- Invalid input of evaluate_text


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "a text of 0 ids leaves nothing to predict: pass 2 ids or more"),
        ([5], "a text of 1 ids leaves nothing to predict"),
        ([[1, 2], [3, 4]], r"ids of shape \(2, 2\) must be the ids of one text"),
        ([1.0, 2.0], "float64 must be integers"),
        ([True, False], "bool must be integers"),
        ([1, 2, 61, 70], r"id 61 at \[2\] is outside the vocabulary: expected 0 to 60"),
        ([1, 2, 3, -1], r"id -1 at \[3\] is outside the vocabulary"),
    ],
)
def test_texts_that_cannot_be_measured_are_refused(params, ids, words):
    with pytest.raises(ValueError, match=words):
        evaluate_text(CFG, params, ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride=0 must be a whole number, 1 or more"),
        ({"stride": 9}, "stride=9 exceeds context_length=8: it would skip ids"),
        ({"stride": 2.5}, "stride=2.5 must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number, 1 or more"),
        ({"dtype": jnp.int32}, "must be float32, bfloat16 or float16"),
    ],
)
def test_arguments_out_of_range_are_refused(params, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_text(CFG, params, text(20), **options)


def test_a_tokenizer_larger_than_the_model_is_found_out(params):
    tokenizer = flaxgpt.load_tokenizer("gpt2")
    with pytest.raises(ValueError, match=r"id 15496 at \[0\] .* this model's tokenizer\?"):
        evaluate_text(CFG, params, tokenizer.encode("Hello there"), tokenizer=tokenizer)


def test_a_tokenizer_that_lacks_an_id_is_found_out(params):
    with pytest.raises(ValueError, match=r"another tokenizer: id 3 is not in the vocabulary"):
        evaluate_text(CFG, params, [0, 3, 1], tokenizer=CharTokenizer("abc"))


def test_a_bad_id_is_found_beyond_millions_of_good_ones(params):
    ids = np.zeros(2**22 + 10, np.uint8)
    ids[-1] = 70
    with pytest.raises(ValueError, match=r"id 70 at \[4194313\] is outside the vocabulary"):
        evaluate_text(CFG, params, ids)


def test_a_loss_that_is_no_number_names_the_first_id_without_one(params):
    broken = params | {"pos_emb": {"weight": params["pos_emb"]["weight"].at[5].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"id at \[1\] is nan: the parameters hold NaN"):
        evaluate_text(CFG, broken, text(20))


def test_measuring_under_jit_is_refused(params):
    with pytest.raises(ValueError, match="not inside jit, grad or vmap: use `score`"):
        jax.jit(lambda params: evaluate_text(CFG, params, [1, 2]).loss)(params)
    with pytest.raises(ValueError, match="not inside jit, grad or vmap: use `score`"):
        jax.jit(lambda ids: evaluate_text(CFG, params, ids).loss)(text(9))
