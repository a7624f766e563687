"""Generated text matches a regular expression, whatever the model prefers."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flaxgpt
from flaxgpt import GPTConfig
from flaxgpt.generation import Sampling, compile_grammar
from flaxgpt.generation.grammar.characters import ranges_of, utf8_sequences
from flaxgpt.generation.grammar.regex import byte_automaton
from flaxgpt.tokenizer import CharTokenizer
from flaxgpt.tokenizer.protocol import VocabularyTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# --- Patterns

ALPHABET = "abé"
characters = st.sampled_from(["a", "b", "é", "[ab]", "[^a]", "[^bé]", r"\w", r"\D", ".", "(?s:.)"])
repetitions = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "{0,1}?"])
patterns = st.recursive(
    characters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, repetitions).map("({0[0]}){0[1]}".format),
        inner.map("({}|)".format),
    ),
    max_leaves=5,
)
texts = st.text(ALPHABET, max_size=6)


def check_text(pattern, text):
    assert byte_automaton(pattern).matches(text.encode()) == bool(re.fullmatch(pattern, text))


@settings(max_examples=30)
@given(patterns, texts)
def test_an_automaton_reads_what_a_pattern_matches(pattern, text):
    check_text(pattern, text)


@pytest.mark.slow
@settings(max_examples=500)
@given(patterns, texts)
def test_an_automaton_reads_what_many_patterns_match(pattern, text):
    check_text(pattern, text)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.data(), patterns)
def test_an_automaton_reads_any_text_that_matches(data, pattern):
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    assume(not re.search("[\ud800-\udfff]", text))
    assert byte_automaton(pattern).matches(text.encode())


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r'\{"a": [0-9]+\}', '{"a": 12}'),
        (r"(?x) a  b  # comment", "ab"),
        (r"(?P<name>a)(?:b|c)", "ac"),
        (r"[\w.-]+@\w+", "a.é-1@x"),
        (r"\x41\u00e9\n\t\\", "Aé\n\t\\"),
        ("[😀-😂]", "😁"),
        ("[^\\x00-\uffff]", "\U0010ffff"),
        ("", ""),
    ],
)
def test_the_syntax_is_that_of_re(pattern, text):
    assert re.fullmatch(pattern, text)
    automaton = byte_automaton(pattern)
    assert automaton.matches(text.encode())
    assert not automaton.matches(text.encode() + b"!")
    assert not automaton.matches(text.encode()[:-1]) or not text


@pytest.mark.parametrize("flags", ["", "(?a)"])
@pytest.mark.parametrize("escape", [r"\d", r"\w", r"\s", slow(r"\D"), slow(r"\W"), slow(r"\S")])
def test_classes_have_the_characters_that_they_have_in_re(escape, flags):
    sample = [*range(0x500), *range(0x500, 0x110000, 997), 0x2028, 0xFF11]
    automaton = byte_automaton(flags + escape)
    for character in map(chr, sample):
        if not "\ud800" <= character <= "\udfff":
            matches = bool(re.fullmatch(flags + escape, character))
            assert automaton.matches(character.encode()) == matches, character


@pytest.mark.parametrize("pattern", ["(?:){1000000000}a", "(?:){0,1000000000}a", "(?:)*a"])
def test_repetitions_of_nothing_are_nothing(pattern):
    automaton = byte_automaton(pattern)
    assert automaton.matches(b"a")
    assert not automaton.matches(b"")


@settings(max_examples=30)
@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_byte_ranges_cover_a_range_of_characters(first, last):
    ranges = ranges_of([("RANGE", (min(first, last), max(first, last)))], False)
    count = 0
    for low, high in ranges:
        for sequence in utf8_sequences(low, high):
            ends = [bytes(byte[i] for byte in sequence).decode() for i in (0, 1)]
            assert low <= ord(ends[0]) <= ord(ends[1]) <= high
            count += int(np.prod([end - begin + 1 for begin, end in sequence]))
    assert count == sum(high - low + 1 for low, high in ranges)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^a", "anchors: leave them out"),
        (r"a\b", "anchors"),
        ("a(?=b)", "lookaround"),
        ("a(?!b)", "lookaround"),
        (r"(a)\1", "backreferences"),
        ("(a)?(?(1)b|c)", "conditions"),
        ("(?>a)", "atomic groups"),
        ("a*+", "possessive repetition"),
        ("(?i)yes", "flag i, which is not supported: write both cases"),
        ("(?i:yes)", "flag i"),
        ("(a", "is not valid: missing"),
        ("a{9999999999}", "is not valid: the repetition number is too large"),
        slow("a{0,30000}", "needs more than 20000 states"),
        slow("((a{0,100}){0,100}){0,100}", "needs more than 20000 states"),
        ("(" * 5000 + ")" * 5000, "is not valid"),
        (b"a", "must be a str"),
    ],
)
def test_patterns_that_are_no_regular_language_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        byte_automaton(pattern)


# --- Ids


class Tokens(VocabularyTokenizer):
    """Tokens of any bytes, the last of which ends a text."""

    def __init__(self, tokens):
        self._vocab = dict(enumerate([*tokens, b"<end>"]))
        self._special_tokens = {"<end>": len(tokens)}
        self.stop_ids = (len(tokens),)


# Some end within a character, and some are the same.
tokens = st.lists(st.sampled_from([97, 98, 0xC3, 0xA9]), min_size=1, max_size=3).map(bytes)
tokenizers = st.lists(tokens, min_size=1, max_size=5).map(Tokens)


def matching(pattern, tokenizer, most):
    """Return all rows of ids that match, with the id of the end if there is room."""
    (end,) = tokenizer.stop_ids
    rows = set()
    for length in range(most + 1):
        for row in itertools.product(range(end), repeat=length):
            try:
                text = b"".join(map(tokenizer.token_bytes, row)).decode()
            except UnicodeDecodeError:
                continue
            if re.fullmatch(pattern, text):
                rows.add(row if length == most else (*row, end))
    return rows


apply = jax.jit(lambda hook, *arguments: hook(*arguments))


def allowed_ids(hook, prompt, row, vocab_size):
    ids = jnp.array([[*prompt, *row] + [-1] * (16 - len(prompt) - len(row))])
    length = jnp.array([len(prompt) + len(row)])
    return np.flatnonzero(np.isfinite(apply(hook, ids, length, jnp.zeros((1, vocab_size)))[0]))


def check_ids(pattern, tokenizer, most, prompt=(0,), padding=2):
    """Assert that the ids allowed in each step are those with which a match can go on."""
    vocab_size = tokenizer.vocab_size + padding
    rows = matching(pattern, tokenizer, most)
    try:
        hook = compile_grammar(pattern, tokenizer, vocab_size).hook([len(prompt)], most)
    except ValueError:
        assert not rows
        return
    assert rows
    steps = {}
    for row in rows:
        for place, token in enumerate(row):
            steps.setdefault(row[:place], set()).add(token)
    for row, following in steps.items():
        assert set(allowed_ids(hook, prompt, row, vocab_size).tolist()) == following, row


@settings(max_examples=6)
@given(patterns, tokenizers, st.integers(1, 3))
def test_the_ids_allowed_are_those_with_which_a_match_can_go_on(pattern, tokenizer, most):
    check_ids(pattern, tokenizer, most)


@pytest.mark.slow
@settings(max_examples=200)
@given(patterns, tokenizers, st.integers(1, 4), st.lists(st.integers(0, 1), min_size=1, max_size=9))
def test_the_ids_allowed_are_right_for_many_patterns(pattern, tokenizer, most, prompt):
    check_ids(pattern, tokenizer, most, prompt)


def test_an_id_after_which_no_match_fits_is_excluded():
    check_ids("(?:a|bbb)", Tokens([b"a", b"b"]), most=2)
    check_ids("(?:a|bbb)", Tokens([b"a", b"b"]), most=3)


def test_tokens_can_begin_and_end_within_a_character():
    check_ids("é{1,2}", Tokens([b"\xc3", b"\xa9", b"\xa9\xc3"]), most=4)


def test_empty_tokens_and_special_tokens_are_no_text():
    tokenizer = Tokens([b"", b"a", b"<pad>"])
    tokenizer._special_tokens["<pad>"] = 2
    grammar = compile_grammar(".*", tokenizer, 4)
    assert allowed_ids(grammar.hook([1], 5), [1], [], 4).tolist() == [1, 3]


def test_a_row_that_has_ended_can_only_end_again():
    hook = compile_grammar("a*", Tokens([b"a"]), 2).hook([1], 9)
    assert allowed_ids(hook, [0], [0, 1, 0], 2).tolist() == [1]


# --- Generation

CFG = GPTConfig(vocab_size=300, context_length=16, emb_dim=8, n_heads=2, n_layers=1)
LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 ,.\n", stop_ids=(39,))
SAMPLING = {"temperature": 2.0, "key": jax.random.key(0)}
ANSWER = "(yes|no), [0-9]{1,3}"
PATTERNS = [ANSWER, "[a-f]+( [0-9]{2})*.", "(?s:.){0,30}", "a(bc)*d?"]


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def generate(params, pattern, new, prompts=("the answer is ", "a"), **options):
    return flaxgpt.generate_text(CFG, params, LETTERS, prompts, new, match=pattern, **options)


@pytest.mark.slow
def test_the_new_text_matches(params):
    for text in generate(params, ANSWER, 8, **SAMPLING):
        assert re.fullmatch(ANSWER, text)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.data(), st.integers(1, 24), st.sampled_from([0.0, 0.5, 5.0]), st.integers(0, 99))
def test_any_text_matches_whatever_its_length(params, data, new, temperature, seed):
    pattern = data.draw(
        st.sampled_from([ANSWER, "[a-f]+( [0-9]{2})*.", "(?s:.){0,30}", "a(bc)*d?"])
    )
    options = {"temperature": temperature, "key": jax.random.key(seed)}
    try:
        found = generate(params, pattern, new, **options)
    except ValueError as error:
        assert "too few" in str(error)
        assert new < 5
        return
    for text in found:
        assert re.fullmatch(pattern, text), text


@pytest.mark.slow
def test_a_stream_is_the_generated_text(params):
    new = CFG.context_length + 8
    pattern = "[a-z]{3}(, [a-z0-9]{2,5})*"
    whole = generate(params, pattern, new, ["the answer is "], **SAMPLING)
    pieces = flaxgpt.stream_text(
        CFG, params, LETTERS, "the answer is ", new, match=pattern, **SAMPLING
    )
    assert "".join(pieces) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window_step": 4}, {"top_k": 2, "top_p": 0.5}])
def test_a_match_can_be_longer_than_the_context(params, options):
    pattern = "[a-z ]{30,40}[.]"
    long = "a" * 20
    for text in generate(params, pattern, 50, [long, "b"], **options, **SAMPLING):
        assert re.fullmatch(pattern, text)


@pytest.mark.slow
def test_other_hooks_apply_too(params):
    def hook(ids, length, logits):
        return jnp.zeros_like(logits).at[:, 7].set(3.0).at[:, 9].set(2.0)  # h and j

    (text,) = generate(params, "[i-z]{4}", 8, ["a"], logits_fn=hook)
    assert text == "jjjj"


@pytest.mark.slow
def test_a_grammar_serves_ids_and_streams_of_ids(params):
    grammar = compile_grammar(ANSWER, LETTERS, CFG.vocab_size)
    prompts = [[1, 2, 3], [4]]
    rows = flaxgpt.generate(CFG, params, prompts, 20, match=grammar, **SAMPLING)
    for row in rows:
        assert row[-1] == 39
        assert re.fullmatch(ANSWER, LETTERS.decode(row[:-1]))
    assert list(flaxgpt.stream(CFG, params, prompts[0], 20, match=grammar, **SAMPLING)) == rows[0]


@pytest.mark.slow
def test_a_stop_id_is_no_part_of_the_text(params):
    (text,) = generate(params, "[a-z.]+", 20, ["a"], stop_ids=[38, 39], **SAMPLING)
    assert re.fullmatch("[a-z]+", text)


@pytest.mark.slow
def test_other_patterns_of_similar_size_compile_nothing(params, compilations):
    generate(params, "[ab]{3}", 5)
    del compilations[:]
    generate(params, "[cd]{3}", 5)
    assert compilations == []


def test_the_same_grammar_is_compiled_once():
    first = compile_grammar("[a-z]{2}", LETTERS, 300)
    assert compile_grammar("[a-z]{2}", LETTERS, 300) is first
    assert compile_grammar("[a-z]{2}", LETTERS, 301) is not first


@pytest.mark.slow
def test_gpt2s_vocabulary_takes_a_small_table():
    tokenizer = flaxgpt.load_tokenizer("gpt2")
    pattern = r'\{"name": "[^"\\]{1,40}", "age": [0-9]{1,3}, "tags": \["[a-z]+"(, "[a-z]+")*\]\}'
    grammar = compile_grammar(pattern, tokenizer, 50304)
    assert grammar.next_state.size < 100_000
    with pytest.raises(ValueError, match="too large for a vocabulary of 50256 tokens"):
        compile_grammar(".{0,1000}", tokenizer, 50304)


# --- Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "[0-9]{9}"}, "max_new_tokens=8 is too few: the shortest .* has 9 ids"),
        ({"match": "A"}, "no text of this tokenizer's tokens matches the pattern 'A'"),
        ({"match": "(a"}, "is not valid"),
        ({"match": 3}, "match=3 must be a grammar"),
        ({"match": "a", "stop": ["b"]}, "stop does not work with match"),
        ({"match": "a", "beams": 2}, "match does not work with beam search"),
        ({"match": "a", "min_new_tokens": 2}, "min_new_tokens does not work with match"),
        ({"match": compile_grammar("a", LETTERS, 40)}, "for vocab_size=40, but the model has"),
        (
            {"match": compile_grammar("a", LETTERS, 300), "stop_ids": [3]},
            "are not those of match",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(params, options, message):
    with pytest.raises(ValueError, match=message):
        flaxgpt.generate_text(CFG, params, LETTERS, ["a"], 8, **options)


def test_a_mask_of_ids_is_refused():
    with pytest.raises(ValueError, match="allowed does not work with match"):
        Sampling(match=compile_grammar("a", LETTERS, 300), allowed=np.ones(300, bool))


def test_a_pattern_has_to_be_a_text():
    with pytest.raises(ValueError, match=r"pattern \['a'\] must be a str"):
        compile_grammar(["a"], LETTERS, 300)


def test_a_tokenizer_without_text_matches_nothing():
    with pytest.raises(ValueError, match="no text of this tokenizer's tokens"):
        compile_grammar("a", Tokens([b""]), 2)


def test_a_tokenizer_without_stop_ids_needs_some():
    with pytest.raises(ValueError, match="match needs an id that ends a text"):
        compile_grammar("a", CharTokenizer("ab"), 2)
