"""Beam search: Hugging Face's results, rows, stopping, compilation, invalid input."""

import dataclasses
import functools
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxgpt
import golden
from flaxgpt.generation import Sampling, programs
from flaxgpt.generation import beams as loop
from flaxgpt.generation.beam_options import BeamOptions
from flaxgpt.generation.beams import Rules
from flaxgpt.generation.decoding import Plan, Request
from flaxgpt.generation.prompts import prepare
from flaxgpt.platform import Platform
from test_generation import FakeCache, abstract_call, primitives

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = pytest.mark.slow
CASES = [
    case
    for case in json.loads((golden.FOLDER / "generation" / "hf-small.json").read_text())
    if case["name"] == "beam"
]
QUICK = (1, 3, 4)  # which share one program


def model():
    cfg, params, expected = golden.model("hf-small")
    return cfg, params, expected["input_ids"].tolist()


def search(rows, new=12, **options):
    """Return the beams of a golden model, mostly with the program of the golden cases."""
    cfg, params, _ = model()
    return flaxgpt.generate(cfg, params, rows, new, **({"beams": 4, "return_beams": 4} | options))


# --- Hugging Face


@pytest.mark.parametrize(
    "case", [pytest.param(i, marks=[] if i in QUICK else SLOW) for i in range(len(CASES))]
)
def test_ids_and_scores_are_those_of_transformers(case):
    cfg, params, _ = golden.model("hf-small")
    options, end = CASES[case]["options"], CASES[case]["options"]["eos_token_id"]
    (found,) = flaxgpt.generate(
        cfg,
        params,
        [CASES[case]["prompt"]],
        options["max_new_tokens"],
        beams=options["num_beams"],
        length_penalty=options["length_penalty"],
        early_stopping=options["early_stopping"],
        return_beams=options["num_return_sequences"],
        stop_ids=[end],
    )
    width = max(len(beam.ids) for beam in found)
    padded = [beam.ids + [end] * (width - len(beam.ids)) for beam in found]
    assert padded == CASES[case]["new_ids"]
    scores = [beam.score for beam in found]
    # Sums of log-probabilities, of up to 100, differ by some units in the last place.
    np.testing.assert_allclose(scores, CASES[case]["scores"], rtol=2e-6, atol=1e-5)


def test_the_twelve_cases_are_there():
    assert len(CASES) == 12


@SLOW
def test_ids_without_a_stop_id_are_those_of_transformers():
    cfg, params, expected = golden.model("hf-small")
    whole = expected["beam4_ids"][0].tolist()
    assert flaxgpt.generate(cfg, params, [whole[:8]], 12, beams=4) == [whole[8:]]


# --- What the beams are


@pytest.mark.parametrize("length_penalty", [1.0, pytest.param(-0.5, marks=SLOW)])
def test_scores_are_the_models_log_probabilities_over_a_power_of_the_length(length_penalty):
    cfg, params, ids = model()
    prompt = ids[0][:5]
    stop = search([prompt])[0][0].ids[2]
    (found,) = search([prompt], stop_ids=[stop], length_penalty=length_penalty)
    assert len({len(beam.ids) for beam in found}) > 1
    for beam in found:
        log_probs = flaxgpt.score(cfg, params, [prompt + beam.ids])[0, len(prompt) - 1 :]
        expected = float(log_probs.sum()) / len(beam.ids) ** length_penalty
        assert math.isclose(beam.score, expected, rel_tol=1e-5)


def test_beams_are_distinct_and_the_best_comes_first():
    (found,) = search([model()[2][0][:5]], stop_ids=(174,))
    scores = [beam.score for beam in found]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(beam.ids) for beam in found}) == 4


@SLOW
def test_as_many_beams_as_sequences_find_the_most_likely_one():
    cfg, params, ids = model()
    allowed = np.arange(cfg.vocab_size) < 4
    prompt = ids[0][:5]
    (found,) = search([prompt], 2, allowed=allowed)
    pairs = [[a, b] for a in range(4) for b in range(4)]
    log_probs = flaxgpt.score(cfg, params, [prompt + pair for pair in pairs])[:, 4:].sum(axis=-1)
    best = np.argsort(-np.asarray(log_probs), stable=True)[:4]
    assert [beam.ids for beam in found] == [pairs[i] for i in best]


@SLOW
def test_one_beam_is_greedy_decoding():
    cfg, params, ids = model()
    rows = [ids[0][:5], ids[1][:9]]
    greedy = flaxgpt.generate(cfg, params, rows, 12)
    assert [[beam.ids for beam in row] for row in search(rows, beams=1, return_beams=1)] == [
        [row] for row in greedy
    ]


def test_without_return_beams_the_ids_of_the_best_are_returned():
    rows = [model()[2][0][:5]]
    assert search(rows, return_beams=None) == [search(rows)[0][0].ids]
    assert len(search(rows, return_beams=2)[0]) == 2


@SLOW
def test_ids_that_are_not_allowed_are_never_chosen():
    allowed = np.ones(model()[0].vocab_size, bool)
    rows = [model()[2][0][:5]]
    banned = search(rows)[0][0].ids[0]
    allowed[banned] = False
    assert all(banned not in beam.ids for beam in search(rows, allowed=allowed)[0])


def test_beams_are_plain_numbers():
    beam = search([model()[2][0][:5]])[0][0]
    assert type(beam.score) is float
    assert {type(token) for token in beam.ids} == {int}


# --- Rows


@SLOW
def test_a_row_of_any_length_has_the_beams_that_it_has_alone():
    ids = model()[2]
    rows = [ids[0][:3], ids[1][:14], ids[2][:9]]
    options = {"stop_ids": (174, 153), "early_stopping": True}
    for row, together in zip(rows, search(rows, **options), strict=True):
        (alone,) = search([row], **options)
        assert [beam.ids for beam in alone] == [beam.ids for beam in together]
        # The matrix products of a batch are blocked differently.
        np.testing.assert_allclose(
            [beam.score for beam in alone], [beam.score for beam in together], rtol=1e-5
        )


@SLOW
def test_beams_past_the_context_are_scored_by_the_last_window():
    cfg, params, ids = model()
    rows, new = [ids[0][:3], ids[1][:20]], cfg.context_length + 2
    for prompt, found in zip(rows, search(rows, new), strict=True):
        for beam in found:
            assert len(beam.ids) == new
            whole, total = prompt + beam.ids, 0.0
            ends = range(len(prompt), len(whole))
            windows = [whole[max(0, end - cfg.context_length) : end] for end in ends]
            padded = np.array([w + [0] * (cfg.context_length - len(w)) for w in windows])
            log_probs = jax.nn.log_softmax(flaxgpt.forward(cfg, params, padded))
            for i, (window, token) in enumerate(zip(windows, beam.ids, strict=True)):
                total += float(log_probs[i, len(window) - 1, token])
            assert math.isclose(beam.score, total / new, rel_tol=1e-5)


@SLOW
@pytest.mark.parametrize("layout", ["separate", "joined"])
def test_all_cache_layouts_give_the_same_beams(layout):
    cfg, params, ids = model()
    rows = [ids[0][:5], ids[1][:9]]
    program, *arrays = prepare(cfg, params, rows, 12, Sampling(), "float32")
    program = dataclasses.replace(program, platform=Platform(cache_layout=layout))
    params, request, ids, start = arrays
    options = BeamOptions(4, return_beams=4)
    run = jax.jit(programs.search, static_argnums=(0, 1))
    finished = run(program, 4, params, request, options.rules(), ids, start)
    found = options.found(finished, request)
    assert [[b.ids for b in row] for row in found] == [[b.ids for b in row] for row in search(rows)]


@SLOW
def test_bfloat16_searches_too():
    (found,) = search([model()[2][0][:5]], dtype="bfloat16")
    (exact,) = search([model()[2][0][:5]])
    # bfloat16 has 8 bits, and logits of up to 10 are off by some hundredths.
    assert abs(found[0].score - exact[0].score) < 0.05


# --- Compilation


def test_other_options_in_one_size_class_compile_nothing(compilations):
    rows = [model()[2][0][:5]]
    search(rows)
    del compilations[:]
    search([rows[0][:3]], 14, stop_ids=(1, 2), length_penalty=0.5, early_stopping=True)
    search(rows, 9, return_beams=None, early_stopping="never")
    assert compilations == []


@pytest.mark.parametrize("layout", ["merged", pytest.param("joined", marks=SLOW)])
def test_the_search_has_no_scan_in_its_jaxpr(layout):
    cfg = dataclasses.replace(flaxgpt.GPTConfig.preset("book-124M"), n_layers=1)
    program, (params, request, ids, start) = abstract_call(cfg, layout)
    run = partial(programs.search, program, 4)
    jaxpr = jax.make_jaxpr(run)(params, request, BeamOptions(4).rules(), ids, start)
    names = set(primitives(jaxpr.jaxpr))
    assert {"while", "dot_general", "top_k"} <= names
    assert "scan" not in names


# --- A fake model drives the loop


class BeamCache(FakeCache):
    """A fake cache whose rows can be taken."""

    def take(self, rows):
        return dataclasses.replace(self, start=self.start[rows])


jax.tree_util.register_dataclass(BeamCache, ["start", "length"], [])


def call(probs, prompts, new=6, stops=(), penalty=1.0, early=False, never=False):
    """Return the arguments of a program of `fake`."""
    longest = max(map(len, prompts))
    request = Request(
        *(jax.random.key(0), np.float32(0), np.int32(4), np.float32(1)),
        stop_ids=np.array([*stops, -1, -1][:2], np.int32),
        prompt_length=np.int32(longest),
        final_length=np.int32(longest + new),
    )
    rules = Rules(np.float32(penalty), np.bool_(early), np.bool_(never))
    ids = np.array([[0] * (longest - len(row)) + row for row in prompts], np.int32)
    start = np.array([longest - len(row) for row in prompts], np.int32)
    table = np.log(np.broadcast_to(np.array(probs, np.float32), (6, 4, 4)))
    return table, request, rules, ids, start


@functools.cache
def fake(beams, longest, new=6):
    """Return the search with a model of the latest id, and the shapes of the ids it reads."""
    shapes = []
    plan = Plan(longest, longest + new, longest + new, exceeds_context=False)

    def run(table, request, rules, ids, start):
        def read(ids, last, cache):
            shapes.append(ids.shape)
            latest = jax.lax.dynamic_index_in_dim(ids, last, axis=1, keepdims=False)
            read = cache.length + ids.shape[1]
            return table[read - longest, latest], dataclasses.replace(cache, length=read)

        cache = BeamCache(jnp.zeros(len(ids), jnp.int32), jnp.int32(0))
        return loop.search(read, plan, beams, request, rules, ids, start, cache)

    return jax.jit(run), shapes


def find(probs, prompts, beams=2, **options):
    """Return the beams and scores that the loop finds if `probs[..., i, :]` follow id i."""
    longest = max(map(len, prompts))
    finished = fake(beams, longest)[0](*call(probs, prompts, **options))
    lengths = np.asarray(finished.lengths)
    return [
        [beam[longest : longest + n].tolist() for beam, n in zip(*row, strict=True)]
        for row in zip(np.asarray(finished.ids), lengths, strict=True)
    ], finished.scores


# After 0, id 1 is a little more likely than 2, but what follows 2 is almost certain.
DETOUR = [[0.01, 0.5, 0.48, 0.01], [0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01], [0.25] * 4]


def test_a_beam_finds_what_greedy_decoding_misses():
    assert find(DETOUR, [[0]], new=2, beams=1)[0] == [[[1, 0]]]
    ids, scores = find(DETOUR, [[0]], new=2)
    assert ids == [[[2, 0], [1, 0]]]
    expected = np.log([[0.48 * 0.97, 0.5 * 0.4]]) / 2
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_the_prompts_are_read_once_and_then_one_id_of_each_beam():
    run, shapes = fake(3, 3)
    jax.eval_shape(run, *call(DETOUR, [[0, 1, 0], [2]]))
    assert shapes == [(2, 3), (6, 1)]


def transformers_rules(probs, prompt, beams, new, stops, penalty, early, never):
    """Return the finished beams, as (score, ids), by the rules of transformers in plain Python."""
    running, finished = [(0.0, [])], []
    for count in range(1, new + 1):
        candidates = [
            (total + np.log(probs[count - 1, [*prompt, *ids][-1], token]), [*ids, token])
            for total, ids in running
            for token in range(4)
        ]
        kept = sorted(candidates, reverse=True)[: max(2, 1 + len(stops)) * beams]
        ended = [beam for beam in kept[:beams] if beam[1][-1] in stops or count == new]
        finished += [(total / count**penalty, ids) for total, ids in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = [beam for beam in kept if beam[1][-1] not in stops][:beams]
        reached = new if never and penalty > 0 else count
        if len(finished) == beams and (
            early or running[0][0] / reached**penalty <= finished[-1][0]
        ):
            break
    return finished


@SLOW
@given(
    seed=st.integers(0, 10**6),
    stops=st.sampled_from([(), (2,), (1, 3)]),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    flags=st.sampled_from([(False, False), (True, False), (False, True)]),
    new=st.integers(1, 6),
)
def test_the_rules_are_those_of_transformers(seed, stops, penalty, flags, new):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(4, 0.5), (6, 4)) * 0.96 + 0.01
    prompts = [[0, 1], [2], [3, 3]]
    options = {"new": new, "penalty": penalty, "early": flags[0], "never": flags[1]}
    found, scores = find(probs, prompts, beams=3, stops=stops, **options)
    for prompt, ids, own in zip(prompts, found, np.asarray(scores), strict=True):
        expected = transformers_rules(probs, prompt, beams=3, stops=stops, **options)
        assert ids == [beam for _, beam in expected]
        np.testing.assert_allclose(own, [score for score, _ in expected], rtol=1e-5)


# Id 2 ends a row.
ENDING = [
    [0.01, 0.5, 0.48, 0.01],
    [0.005, 0.55, 0.44, 0.005],
    [0.25, 0.25, 0.25, 0.25],
    [0.23, 0.27, 0.24, 0.26],
]
LATER = [[0.01, 0.01, 0.5, 0.48], [0.25] * 4, [0.25] * 4, [0.01, 0.005, 0.005, 0.98]]


@pytest.mark.parametrize(
    ("probs", "options", "expected"),
    [
        (ENDING, {"early": True}, [[2], [1, 2]]),
        (ENDING, {}, [[1] * 6, [*[1] * 5, 2]]),
        (ENDING, {"penalty": 0.0}, [[2], [1, 2]]),
        (LATER, {"beams": 1}, [[2]]),
        (LATER, {"beams": 1, "never": True}, [[3] * 6]),
    ],
    ids=["full", "can improve", "cannot improve", "not now", "but later"],
)
def test_a_row_is_done_when_its_rule_says_so(probs, options, expected):
    assert find(probs, [[0]], stops=[2], **options)[0] == [expected]


def test_a_row_that_is_done_keeps_its_beams_while_others_go_on():
    run = partial(find, ENDING, stops=[2], early=True)
    first, second = (run(prompts=[row])[0][0] for row in ([0], [3]))
    assert (first, second) == ([[2], [1, 2]], [[1, 1, 2], [1, 2]])
    assert run(prompts=[[0], [3]])[0] == [first, second]


# --- Invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams=0 must be a whole number, 1 or more"),
        ({"beams": 2.5}, "beams=2.5 must be a whole number"),
        ({"beams": 301}, "beams=301 exceeds the 300 ids that may be chosen"),
        ({"beams": 2, "allowed": np.arange(300) == 7}, "beams=2 exceeds the 1 ids"),
        ({"beams": 4, "temperature": 0.8}, r"temperature=0.8 .* set temperature to 0"),
        ({"beams": 4, "top_k": 5}, "top_k=5 is an option of sampling"),
        ({"beams": 4, "top_p": 0.5}, "top_p=0.5 is an option of sampling"),
        ({"return_beams": 1, "temperature": 0.8}, r"temperature=0.8 .*\(beams=1\)"),
        ({"beams": 2, "return_beams": 3}, "return_beams=3 exceeds beams=2"),
        ({"beams": 2, "return_beams": 0}, "return_beams=0 must be a whole number"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty=nan must be a finite"),
        ({"beams": 2, "length_penalty": "1"}, "length_penalty='1' must be a finite number"),
        ({"beams": 2, "length_penalty": -200}, "length_penalty=-200.0 is out of range"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping='always' must be False, True"),
        ({"beams": 2, "early_stopping": 1}, "early_stopping=1 must be False, True"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without beam search"),
        ({"early_stopping": True}, "early_stopping=True has no effect without beam search"),
        ({"beams": 4, "max_new_tokens": 2**27}, "needs 6.0 GiB for the ids alone: .* fewer beams"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(options, message):
    cfg, params, _ = model()
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate(cfg, params, [[1, 2]], **({"max_new_tokens": 3} | options))


def test_parameters_that_give_nan_are_an_error_and_no_beams():
    cfg, params, _ = model()
    weight = params["pos_emb"]["weight"].at[16].set(jnp.nan)  # past the padding of the prompt
    broken = params | {"pos_emb": {"weight": weight}}
    with pytest.raises(ValueError, match="logits of row 0 became NaN at new id 3"):
        flaxgpt.generate(cfg, broken, [[1] * 14], 12, beams=4)
