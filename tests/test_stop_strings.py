"""Stop strings: the search in pieces of text, and generation that ends at them."""

import string

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
from command import assert_refused, call, run
from flaxgpt import GPTConfig
from flaxgpt.generation import streaming
from flaxgpt.generation.hooks import penalize_repetition
from flaxgpt.generation.stop_strings import StopStrings
from flaxgpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Few letters, so that strings overlap with themselves and each other.
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
piece_lists = st.lists(st.text("abc", max_size=6), max_size=12)


def cut(text, stops, include=False):
    """Return a text up to the stop string that counts, found by `str.find`."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, begin = min(ends, default=(len(text), len(text)))
    return text[: end if include else begin]


@given(piece_lists, stop_lists, st.booleans())
def test_a_text_ends_at_the_same_place_however_it_is_split(pieces, stops, include):
    shown = list(StopStrings(stops, include).cut(pieces))
    assert "".join(shown) == cut("".join(pieces), stops, include)
    assert all(shown)


@given(piece_lists, stop_lists)
def test_only_text_that_could_become_a_stop_string_is_held_back(pieces, stops):
    shown = ""

    def source():  # asked for the next piece when all that can be shown is shown
        read = ""
        for piece in pieces:
            beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
            held = max(len(text) for text in beginnings if read.endswith(text))
            assert shown == read[: len(read) - held]
            for rest in (stop[length:] for stop in stops for length in range(len(stop))):
                assert cut(read + rest, stops).startswith(shown)
            yield piece
            read += piece

    for piece in StopStrings(stops).cut(source()):
        shown += piece


@given(piece_lists, stop_lists)
def test_a_text_with_its_stop_string_is_shown_at_once(pieces, stops):
    stop = StopStrings(stops, include=True)
    pieces = [piece for piece in pieces if piece]
    shown = list(stop.cut(pieces))
    assert shown[:-1] == pieces[: len(shown) - 1]


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("aaab", ["aab"], "a"),
        ("xababac", ["abac"], "xab"),
        ("one two", ["two", "one two"], ""),
        ("abcd", ["abcd", "bc"], "a"),
        ("abcd", ["abcx", "c"], "ab"),
        ("Hi\n\nUser:", ["User:", "\n\n"], "Hi"),
        ("😀😁", ["😁"], "😀"),
    ],
)
def test_the_string_that_ends_first_ends_the_text(text, stops, shown):
    assert "".join(StopStrings(stops).cut(text)) == shown


def test_nothing_is_read_after_the_stop_string():
    pieces = iter(["a", "b.", "c"])
    assert "".join(StopStrings(["."]).cut(pieces)) == "ab"
    assert list(pieces) == ["c"]


CFG = GPTConfig(vocab_size=50257, context_length=16, emb_dim=8, n_heads=1, n_layers=1)
TOKENIZER = flaxgpt.load_tokenizer("gpt2")
PROMPTS = ["Hello, I am", "é"]  # of different lengths
NEW = 14  # beyond the context


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def texts(params, prompts=PROMPTS, new=NEW, **options):
    return flaxgpt.generate_text(CFG, params, TOKENIZER, prompts, new, **options)


def streamed(params, prompt, **options):
    return list(flaxgpt.stream_text(CFG, params, TOKENIZER, prompt, NEW, **options))


def sampling(seed):
    return {"temperature": 2.0, "key": jax.random.key(seed)}


def check_cuts(params, data, **options):
    """Assert that texts that end at a drawn part of them are the whole texts, cut off."""
    whole = texts(params, **options)
    text = data.draw(st.sampled_from(whole))
    begin = data.draw(st.integers(0, len(text) - 1))
    stops = [text[begin : data.draw(st.integers(begin + 1, begin + 12))], "zz"]
    include = data.draw(st.booleans())
    ended = texts(params, stop=stops, include_stop=include, **options)
    assert ended == [cut(text, stops, include) for text in whole]


def test_texts_are_those_without_stop_strings_cut_off(params):
    first, second = texts(params, new=8, **sampling(3))
    stops = [first[12:22], second[8:11], "zz"]
    ended = texts(params, new=8, stop=stops, **sampling(3))
    assert ended == [first[:12], second[:8]]
    ended = texts(params, new=8, stop=stops, include_stop=True, **sampling(3))
    assert ended == [first[:22], second[:11]]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data(), st.integers(0, 20))
def test_sampled_texts_are_cut_off_whatever_the_key(params, data, seed):
    check_cuts(params, data, **sampling(seed))


@pytest.mark.slow
@settings(max_examples=20)
@given(st.data())
def test_greedy_texts_are_cut_off(params, data):
    check_cuts(params, data)


HOOK = penalize_repetition(1.2)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.data())
def test_texts_with_other_options_are_cut_off(params, data):
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    ends = [row[5] for row in flaxgpt.generate(CFG, params, ids, NEW, **sampling(3))]
    options = {"stop_ids": ends, "min_new_tokens": 3, "top_k": 50000, "logits_fn": HOOK}
    check_cuts(params, data, **options, **sampling(3))


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 30), st.booleans())
def test_streamed_text_joins_to_the_generated_text(params, seed, begin, include):
    (whole,) = texts(params, ["é"], **sampling(seed))
    stops = [whole[begin : begin + 5]]
    pieces = streamed(params, "é", stop=stops, include_stop=include, **sampling(seed))
    assert "".join(pieces) == cut(whole, stops, include)


@pytest.mark.slow
def test_without_stop_strings_all_text_is_streamed(params):
    assert "".join(streamed(params, "é", **sampling(1))) == texts(params, ["é"], **sampling(1))[0]


def test_only_new_text_is_searched(params):
    whole = texts(params, new=8, **sampling(3))
    stops = ["Hello", "am" + whole[0][:3]]
    assert texts(params, new=8, stop=stops, **sampling(3)) == whole


def test_generation_ends_when_every_text_has_ended(params, monkeypatch):
    steps = []
    extend_step = streaming.programs.extend_step

    def counted(*arguments):
        steps.append(arguments)
        return extend_step(*arguments)

    monkeypatch.setattr(streaming.programs, "extend_step", counted)
    # The new ids begin with " tennis", " acad", " parasite", and " Political", "iamond", " pouch".
    ended = texts(params, new=8, stop=[" acad", "ouch"], **sampling(3))
    assert ended == [" tennis", " Politicaliamond p"]
    assert len(steps) == 2  # the prompts give the first id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "User:"}, r"for one string, use \['User:'\]"),
        ({"stop": 5}, "stop=5 must be a list of strings"),
        ({"stop": None}, "stop=None must be a list of strings"),
        ({"stop": [198]}, "stop string 198 must be a str; for token ids, use stop_ids"),
        ({"stop": ["a", ""]}, "stop string '' is empty"),
        ({"stop": ["a"], "include_stop": "yes"}, "include_stop='yes' must be True or False"),
        ({"include_stop": True}, "include_stop has no effect without stop strings"),
    ],
)
def test_invalid_stop_strings_are_refused_at_the_call(params, options, message):
    with pytest.raises(ValueError, match=message):
        texts(params, **options)
    with pytest.raises(ValueError, match=message):
        flaxgpt.stream_text(CFG, params, TOKENIZER, "a", NEW, **options)


def test_beam_search_takes_no_stop_strings(params):
    with pytest.raises(ValueError, match="stop does not work with beam search"):
        texts(params, stop=["a"], beams=2)


def test_options_of_beam_search_alone_are_refused_with_stop_strings_too(params):
    with pytest.raises(ValueError, match=r"length_penalty=2\.0 has no effect"):
        texts(params, stop=["a"], length_penalty=2.0)


@pytest.mark.parametrize("prompt", [["a"], [5, 6]])
def test_one_text_is_streamed(params, prompt):
    with pytest.raises(ValueError, match="stream_text takes one text"):
        streamed(params, prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with a vocabulary of 100 characters."""
    path = tmp_path_factory.mktemp("models") / "chars"
    cfg = GPTConfig(vocab_size=100, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
    params = flaxgpt.init(cfg, jax.random.key(0))
    flaxgpt.save(path, cfg, params, tokenizer=CharTokenizer(string.printable))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("start", [call, run])
def test_the_command_ends_its_text_at_a_stop_text(start, folder):
    cfg, params, tokenizer = flaxgpt.load(folder)
    options = {"temperature": 2.0, "key": jax.random.key(0)}
    (whole,) = flaxgpt.generate_text(cfg, params, tokenizer, ["a"], 20, **options)
    stops = [whole[8:11], "zz"]
    flags = ["--model", folder, "--max-new-tokens", 20, "--temperature", 2]
    flags += [f"--stop-text={stop}" for stop in stops]
    output = start("generate", "a", *flags).stdout.decode()
    assert output == "a" + cut(whole, stops) + "\n"
    output = start("generate", "a", *flags, "--include-stop", "--no-echo").stdout.decode()
    assert output == cut(whole, stops, include=True) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop-text", ""], "--stop-text '' is empty"),
        (["--include-stop"], "--include-stop has no effect without --stop-text"),
        (
            ["--stop-text", "b", "--beams", 2, "--temperature", 0],
            "--stop-text does not work with --beams",
        ),
    ],
)
def test_invalid_flags_are_refused(flags, message):
    assert_refused(call("generate", "a", *flags), message)
