"""Hooks change logits before an id is chosen, as Hugging Face's processors do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.generation import hooks
from flaxgpt.generation.sampling import keep_likely

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = golden.generation_cases()
SAMPLING = {"key": jax.random.key(0), "temperature": 1.0}


def cases(name):
    """Return the cases of a name as parameters, all but the first slow."""
    first, *others = (case for case in CASES if case["name"] == name)
    slow = [pytest.param(case, marks=pytest.mark.slow, id=name) for case in others]
    return [pytest.param(first, id=name), *slow]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model():
    return golden.model("hf-small")[:2]


def generate(model, case, **options):
    """Return the new ids of a golden case."""
    asked = case["options"]
    return flaxgpt.generate(
        *model,
        [case["prompt"]],
        asked["max_new_tokens"],
        stop_ids=[asked["eos_token_id"]],
        **options,
    )


# --- Hugging Face's results


@pytest.mark.parametrize("case", cases("repetition_penalty"))
def test_repetition_is_penalized_as_by_hugging_face(case, model):
    hook = hooks.penalize_repetition(case["options"]["repetition_penalty"])
    assert generate(model, case, logits_fn=hook) == case["new_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("no_repeat_ngram"))
def test_sequences_do_not_repeat_as_with_hugging_face(case, model):
    hook = hooks.no_repeat_ngram(case["options"]["no_repeat_ngram_size"])
    assert generate(model, case, logits_fn=hook) == case["new_ids"]


@pytest.mark.parametrize("case", cases("min_new_tokens"))
def test_rows_have_a_least_length_as_with_hugging_face(case, model):
    found = generate(model, case, min_new_tokens=case["options"]["min_new_tokens"])
    assert found == case["new_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("bad_words"))
def test_ids_are_banned_as_by_hugging_face(case, model):
    # Hugging Face never bans the id that ends a row.
    end = case["options"]["eos_token_id"]
    banned = [ids[0] for ids in case["options"]["bad_words_ids"] if ids != [end]]
    assert generate(model, case, logits_fn=hooks.ban(banned)) == case["new_ids"]


@pytest.mark.parametrize("case", cases("kept"))
def test_the_ids_that_filters_keep_are_hugging_faces(case, model):
    kind, value = case["warper"].split()
    temperature = case["temperature"]
    logits = flaxgpt.forward(*model, [case["prompt"]])[:, -1]
    match kind:
        case "min_p":
            kept = hooks.min_p(float(value), temperature)(None, None, logits)
        case "typical":
            kept = hooks.typical(float(value), temperature)(None, None, logits)
        case _:
            top_k = int(value) if kind == "top_k" else logits.shape[-1]
            top_p = float(value) if kind == "top_p" else 1.0
            kept = keep_likely(logits / temperature, jnp.int32(top_k), jnp.float32(top_p))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == case["kept"]


# --- What a hook sees


@pytest.mark.slow
def test_a_hook_sees_the_text_of_each_row_as_if_it_were_alone(model):
    seen = []

    def spy(ids, length, logits):
        jax.debug.callback(lambda *x: seen.append([np.asarray(y) for y in x]), ids, length)
        return logits

    prompts = [[5, 6, 7], [8]]
    rows = flaxgpt.generate(*model, prompts, 3, logits_fn=spy)
    jax.effects_barrier()
    assert len(seen) == 3
    for count, (ids, length) in enumerate(sorted(seen, key=lambda x: x[1][0])):
        for row, prompt in enumerate(prompts):
            text = prompt + rows[row][:count]
            assert length[row] == len(text)
            assert ids[row, : len(text)].tolist() == text
            assert (ids[row, len(text) :] == -1).all()


@pytest.mark.slow
def test_rows_of_different_lengths_get_what_they_get_alone(model):
    hook = hooks.chain(hooks.penalize_repetition(1.3), hooks.no_repeat_ngram(2))
    prompts = [[5, 6, 7, 5, 6], [8, 9]]
    alone = [flaxgpt.generate(*model, [row], 8, logits_fn=hook)[0] for row in prompts]
    assert flaxgpt.generate(*model, prompts, 8, logits_fn=hook) == alone


@pytest.mark.slow
def test_a_stream_calls_the_hook_with_the_whole_text_also_past_the_context(model):
    hook = hooks.penalize_repetition(1.5)
    new = model[0].context_length + 4
    rows = flaxgpt.generate(*model, [[5, 6]], new, logits_fn=hook)
    assert list(flaxgpt.stream(*model, [5, 6], new, logits_fn=hook)) == rows[0]


@pytest.mark.parametrize(
    "options",
    [{"logits_fn": hooks.penalize_repetition(1.5)}, {"min_new_tokens": 1, "stop_ids": [3]}],
)
def test_a_stream_whose_ids_a_hook_reads_needs_memory_for_them(options, model):
    with pytest.raises(
        ValueError, match=r"needs 3\.0 GiB for the ids alone: .* leave out logits_fn"
    ):
        flaxgpt.stream(*model, [5], 2**29, **options)


@pytest.mark.slow
def test_other_values_of_a_hook_compile_nothing(model, compilations):
    def run(penalty):
        return flaxgpt.generate(*model, [[5]], 2, logits_fn=hooks.penalize_repetition(penalty))

    run(1.1)
    del compilations[:]
    run(1.7)
    assert compilations == []


# --- Properties


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    size=st.integers(1, 4),
)
def test_no_repeat_ngram_excludes_what_would_repeat(ids, size):
    row = jnp.array([ids + [-1] * (13 - len(ids))])
    found = hooks.no_repeat_ngram(size)(row, jnp.array([len(ids)]), jnp.zeros((1, 4)))
    assert found.shape == (1, 4)
    grams = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    latest = tuple(ids[len(ids) - size + 1 :])
    for token in range(4):
        repeats = len(latest) == size - 1 and (*latest, token) in grams
        assert (found[0, token] == -jnp.inf) == repeats, token


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_min_p_keeps_ids_by_their_share_of_the_best(share, seed):
    logits = jax.random.normal(jax.random.key(seed), (1, 16))
    probs = np.asarray(jax.nn.softmax(logits / 0.5))[0]
    kept = np.isfinite(hooks.min_p(share, 0.5)(None, None, logits)[0])
    certain = np.abs(probs / probs.max() - share) > 1e-5
    np.testing.assert_array_equal(kept[certain], (probs >= share * probs.max())[certain])


def test_bias_adds_and_allow_excludes():
    logits = jnp.zeros((1, 4))
    assert hooks.bias({1: 2.5, 3: -1.0})(None, None, logits).tolist() == [[0, 2.5, 0, -1]]
    allowed = np.array([True, False, True, False])
    inf = float("inf")
    assert hooks.allow(allowed)(None, None, logits).tolist() == [[0, -inf, 0, -inf]]


def test_what_a_limit_excludes_stays_excluded_and_does_not_count():
    logits = jnp.array([[9.0, 1.0, 0.9, -5.0]])
    inf = float("inf")
    kept = hooks.within(hooks.ban([0]), hooks.min_p(0.5))(None, None, logits)
    assert kept.tolist() == [[-inf, 1.0, np.float32(0.9), -inf]]
    lifted = hooks.within(hooks.ban([0]), lambda *_: jnp.zeros((1, 4)))(None, None, logits)
    assert lifted.tolist() == [[-inf, 0, 0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["allowed", "min_new_tokens"])
def test_filters_of_a_hook_count_only_ids_that_may_be_chosen(limit, model):
    (best,), *_ = flaxgpt.generate(*model, [[5]], 1)
    options = {"allowed": np.arange(300) != best}
    if limit == "min_new_tokens":
        options = {"min_new_tokens": 4, "stop_ids": [best]}
    (row,) = flaxgpt.generate(*model, [[5]], 4, logits_fn=hooks.min_p(1.0), **options)
    assert len(row) == 4
    assert best not in row


# --- Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_fn": 3}, "must be a function of"),
        ({"logits_fn": lambda ids, length, logits: logits[:, :5]}, "must return logits of shape"),
        ({"logits_fn": lambda ids, length, logits: None}, "must return logits of shape"),
        slow({"logits_fn": lambda ids, length, logits: logits * jnp.nan}, "logits_fn returned NaN"),
        slow({"logits_fn": lambda ids, length, logits: logits - jnp.inf}, "excluded every id"),
        slow({"logits_fn": hooks.ban([7]), "allowed": np.arange(300) == 7}, "excluded every id"),
        slow({"logits_fn": hooks.ban([10**6])}, "logits_fn returned NaN"),
        ({"min_new_tokens": 9, "stop_ids": [1]}, "exceeds max_new_tokens=3"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be"),
        ({"logits_fn": hooks.ban([1]), "beams": 2}, "logits_fn does not work with beam search"),
        ({"min_new_tokens": 1, "beams": 2}, "min_new_tokens does not work with beam search"),
        ({"top_logprobs": 2}, "set return_logprobs=True too"),
        ({"return_logprobs": True, "top_logprobs": 999}, "exceeds vocab_size"),
        ({"return_logprobs": True, "beams": 2}, "return_logprobs does not work with beam search"),
        ({"return_logprobs": 1}, "must be True or False"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(*model, [[5]], 3, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hooks.penalize_repetition(0), "penalty=0 must be a finite number above 0"),
        (lambda: hooks.no_repeat_ngram(0), "size=0 must be a whole number"),
        (lambda: hooks.ban([]), "one or more ids"),
        (lambda: hooks.ban([-2]), "stop id -2"),
        (lambda: hooks.bias({}), "one or more ids"),
        (lambda: hooks.bias({1: float("inf")}), "must be finite"),
        (lambda: hooks.min_p(1.5), "share=1.5 must be above 0 and at most 1"),
        (lambda: hooks.typical(0), "mass=0 must be above 0 and at most 1"),
        (lambda: hooks.min_p(0.1, 0), "temperature=0 must be a finite number above 0"),
        (lambda: hooks.chain(3), "must be a function of"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Log-probabilities


@pytest.mark.parametrize("case", cases("logprobs"))
def test_log_probabilities_are_hugging_faces(case, model):
    (found,) = generate(model, case, return_logprobs=True, top_logprobs=5)
    assert [found.ids] == case["new_ids"]
    # Of logits that agree to 2e-5 of the largest, near 5.
    np.testing.assert_allclose(found.log_probs, case["logprobs"], atol=1e-4)
    assert [[token for token, _ in step] for step in found.top] == case["top5_ids"]
    values = [[value for _, value in step] for step in found.top]
    np.testing.assert_allclose(values, case["top5_logprobs"], atol=1e-4)


@pytest.mark.slow
def test_log_probabilities_are_the_models_own_whatever_is_filtered(model):
    hook = hooks.bias({3: 50.0})
    (found,) = flaxgpt.generate(
        *model, [[5, 6]], 4, logits_fn=hook, top_k=2, return_logprobs=True, **SAMPLING
    )
    text = [5, 6, *found.ids]
    log_probs = jax.nn.log_softmax(flaxgpt.forward(*model, [text[:-1]])[0, 1:])
    expected = log_probs[jnp.arange(4), jnp.array(found.ids)]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)
    assert found.top == [[], [], [], []]


@pytest.mark.slow
def test_rows_of_different_lengths_have_log_probabilities_of_their_own(model):
    prompts, options = [[5, 6, 7], [8]], {"return_logprobs": True, "top_logprobs": 2}
    together = flaxgpt.generate(*model, prompts, 5, stop_ids=[174], **options)
    for row, prompt in zip(together, prompts, strict=True):
        (alone,) = flaxgpt.generate(*model, [prompt], 5, stop_ids=[174], **options)
        assert row.ids == alone.ids
        assert len(row.log_probs) == len(row.ids) == len(row.top)
        np.testing.assert_allclose(row.log_probs, alone.log_probs, atol=1e-5)
