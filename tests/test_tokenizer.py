"""Text to ids and back, and tokenizers in model folders."""

import base64
import hashlib
import importlib.util
import itertools
import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
from hypothesis import strategies as st

import flaxgpt.tokenizer
from flaxgpt.generation.text import stream_text
from flaxgpt.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)
from flaxgpt.tokenizer.folder import read_tokenizer, save_tokenizer, tokenizer_from_huggingface

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
RANKS = Path(flaxgpt.__file__).parent / "vocab" / "gpt2.tiktoken"
VERDICT = ROOT / "tests" / "data" / "verdict" / "the-verdict.txt"
# The names tiktoken's cache gives OpenAI's files: the SHA-1 of their addresses.
ENCODER_JSON = SHARED / "tiktoken_cache" / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
VOCAB_BPE = SHARED / "tiktoken_cache" / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
SHAKESPEARE = SHARED / "data" / "shakespeare" / "input.txt"

TEXTS = {
    "English": "It's the Gisburn's, they'll've said: I'D rather not -- a 3rd time, in 1905!",
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # \\d+\r\n\n\n    pass",
    "emoji": "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 thumb, e\u0301 combining",
    "CJK": "汉字と仮名、한국어。",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff\ufffe\x00",
    "special token": "<|endoftext|>a<|endoftext|>",
    "white space": "   \n\n\t \u3000 a  \xa0b   ",
    "lone surrogates": "a\ud800b\udfffc\ud83d\ude00",
    "nothing": "",
}
any_text = st.text(st.characters(exclude_categories=[]))
plain_text = st.text()  # Hypothesis leaves surrogates out of st.text().
gpt2_ids = st.lists(st.integers(0, 50256))


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not path.exists(), reason=f"{path} is absent; FLAXGPT_SHARED names the folder that has it"
    )


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        return tiktoken.get_encoding("gpt2")


class TestGPT2:
    def test_the_books_prompt_has_the_books_ids(self, gpt2: Tokenizer) -> None:
        assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]

    def test_the_verdict_has_the_5145_tokens_the_book_counts(self, gpt2: Tokenizer) -> None:
        assert len(gpt2.encode(VERDICT.read_text(encoding="utf-8"))) == 5145

    def test_the_vocabulary_has_50257_ids_of_which_the_last_is_special(
        self, gpt2: Tokenizer
    ) -> None:
        assert gpt2.vocab_size == 50257
        assert gpt2.special_tokens == {"<|endoftext|>": 50256}
        assert gpt2.token_bytes(50256) == b"<|endoftext|>"

    def test_changing_what_special_tokens_returned_changes_no_tokenizer(
        self, gpt2: Tokenizer
    ) -> None:
        gpt2.special_tokens.clear()
        assert load_tokenizer().special_tokens == {"<|endoftext|>": 50256}

    def test_the_shipped_ranks_are_the_ones_openai_publishes_as_r50k_base(self) -> None:
        # tiktoken_ext/openai_public.py, r50k_base(): the same vocabulary in the same format.
        expected = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
        assert hashlib.sha256(RANKS.read_bytes()).hexdigest() == expected

    def test_the_shipped_ranks_carry_their_licence(self) -> None:
        licence = (RANKS.parent / "LICENSE").read_text(encoding="utf-8")
        assert "gpt2.tiktoken" in licence
        assert "Modified MIT License\n\nSoftware Copyright (c) 2019 OpenAI" in licence

    def test_loading_opens_no_socket_and_writes_no_cache(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        fresh = flaxgpt.tokenizer._shipped.__wrapped__("gpt2")
        assert fresh.encode("Hello, I am") == [15496, 11, 314, 716]
        assert list(tmp_path.iterdir()) == []

    def test_loading_twice_gives_the_same_tokenizer(self, gpt2: BPETokenizer) -> None:
        assert load_tokenizer() is gpt2
        assert load_tokenizer(name="gpt2") is gpt2

    @hypothesis.given(plain_text)
    def test_any_text_without_surrogates_survives_a_round_trip(self, text: str) -> None:
        gpt2 = load_tokenizer()
        assert gpt2.decode(gpt2.encode(text)) == text

    @hypothesis.given(plain_text)
    def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(self, text: str) -> None:
        gpt2 = load_tokenizer()
        assert b"".join(map(gpt2.token_bytes, gpt2.encode(text))) == text.encode("utf-8")

    def test_a_lone_surrogate_decodes_to_the_replacement_character(self, gpt2: Tokenizer) -> None:
        assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"

    def test_half_a_character_decodes_to_the_replacement_character(self, gpt2: Tokenizer) -> None:
        first, *rest = gpt2.encode("👍")
        assert rest
        assert gpt2.decode([first]) == "\ufffd"

    def test_text_that_overwhelms_the_regex_engine_is_refused_with_advice(
        self, gpt2: Tokenizer
    ) -> None:
        with pytest.raises(ValueError, match=r"a text of 1000001 characters .* shorten its runs"):
            gpt2.encode(" " * 1_000_000 + "x")


@needs(ENCODER_JSON)
class TestAgainstTiktoken:
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
    def test_ids_are_tiktokens(
        self, gpt2: Tokenizer, reference: tiktoken.Encoding, text: str
    ) -> None:
        assert gpt2.encode(text) == reference.encode(text, disallowed_special=())
        assert gpt2.encode(text, allowed_special="all") == reference.encode(
            text, allowed_special="all"
        )

    @needs(SHAKESPEARE)
    def test_ids_of_a_megabyte_of_shakespeare_are_tiktokens(
        self, gpt2: Tokenizer, reference: tiktoken.Encoding
    ) -> None:
        text = SHAKESPEARE.read_text(encoding="utf-8")
        ids = gpt2.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert gpt2.decode(ids) == text

    @hypothesis.given(any_text)
    @hypothesis.example("\ud800")
    def test_ids_of_any_string_even_with_surrogates_are_tiktokens(
        self, reference: tiktoken.Encoding, text: str
    ) -> None:
        assert load_tokenizer().encode(text) == reference.encode_ordinary(text)

    @hypothesis.given(gpt2_ids)
    def test_any_ids_decode_to_tiktokens_text(
        self, reference: tiktoken.Encoding, ids: list[int]
    ) -> None:
        assert load_tokenizer().decode(ids) == reference.decode(ids)

    def test_the_whole_vocabulary_is_tiktokens(
        self, gpt2: BPETokenizer, reference: tiktoken.Encoding
    ) -> None:
        assert gpt2.ranks == reference._mergeable_ranks

    def test_the_build_script_makes_the_shipped_file_byte_for_byte(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        out = tmp_path / "gpt2.tiktoken"
        script = load_build_script()
        monkeypatch.setattr("sys.argv", ["build", str(ENCODER_JSON.parent), "--out", str(out)])
        script.main()
        assert out.read_bytes() == RANKS.read_bytes()
        assert list(tmp_path.iterdir()) == [out]

    def test_the_build_script_refuses_altered_input(self, tmp_path: Path) -> None:
        (tmp_path / VOCAB_BPE.name).write_bytes(VOCAB_BPE.read_bytes())
        (tmp_path / ENCODER_JSON.name).write_bytes(ENCODER_JSON.read_bytes() + b" ")
        with pytest.raises(ValueError, match=r"\(encoder.json\) has SHA-256 .*; expected 196139"):
            load_build_script().build(tmp_path)


def test_the_build_script_says_which_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\(encoder.json\) is not there; give a folder"):
        load_build_script().build(tmp_path)


def load_build_script() -> Any:
    spec = importlib.util.spec_from_file_location("build", ROOT / "scripts/build_gpt2_vocab.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class TestLoading:
    def test_an_unknown_name_is_answered_with_a_near_one(self) -> None:
        with pytest.raises(
            ValueError, match=r"'GPT-2'; did you mean 'gpt2'\? flaxgpt ships 'gpt2'"
        ):
            load_tokenizer("GPT-2")

    def test_a_far_fetched_name_is_answered_with_what_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"'sentencepiece'; flaxgpt ships 'gpt2'"):
            load_tokenizer("sentencepiece")


class TestSpecialTokens:
    def test_a_special_token_in_text_is_ordinary_text(self, gpt2: Tokenizer) -> None:
        ids = gpt2.encode("<|endoftext|>")
        assert ids == [27, 91, 437, 1659, 5239, 91, 29]
        assert gpt2.decode(ids) == "<|endoftext|>"

    @pytest.mark.parametrize("allowed", ["all", {"<|endoftext|>"}, ["<|endoftext|>"]])
    def test_a_special_token_is_one_id_where_allowed(self, gpt2: Tokenizer, allowed: Any) -> None:
        assert gpt2.encode("a<|endoftext|>", allowed_special=allowed) == [64, 50256]

    def test_only_the_allowed_special_tokens_are_recognised(self) -> None:
        tokenizer = bytes_only({"<a>": 256, "<b>": 257})
        ids = tokenizer.encode("<a><b>", allowed_special={"<b>"})
        assert ids == [*b"<a>", 257]

    def test_allowing_an_unknown_special_token_is_refused(self, gpt2: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"\['<pad>'\].*are \['<\|endoftext\|>'\]"):
            gpt2.encode("a", allowed_special={"<pad>", "<|endoftext|>"})

    def test_a_bare_string_is_not_taken_for_a_collection_of_letters(self, gpt2: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"'<\|endoftext\|>'; expected 'all' or a collection"):
            gpt2.encode("a", allowed_special="<|endoftext|>")

    def test_characters_have_no_special_tokens_to_allow(self) -> None:
        tokenizer = CharTokenizer("ab")
        assert tokenizer.special_tokens == {}
        assert tokenizer.encode("ab", allowed_special="all") == [0, 1]
        with pytest.raises(ValueError, match="names \\['a'\\]"):
            tokenizer.encode("ab", allowed_special=["a"])


BOTH = pytest.mark.parametrize(
    "tokenizer", [load_tokenizer(), CharTokenizer("abcdefghijklmnop")], ids=["gpt2", "characters"]
)


@BOTH
class TestIds:
    @pytest.mark.parametrize(
        "convert",
        [
            tuple,
            np.array,
            jnp.array,
            lambda ids: np.array(ids, dtype=np.uint16),
            lambda ids: list(np.array(ids, dtype=np.int64)),
            lambda ids: list(jnp.array(ids)),
        ],
        ids=["tuple", "NumPy", "JAX", "uint16", "NumPy scalars", "JAX scalars"],
    )
    def test_integers_of_every_make_decode_alike(
        self, tokenizer: Tokenizer, convert: Callable[[list[int]], Sequence[int]]
    ) -> None:
        assert tokenizer.decode(convert([1, 15, 3])) == tokenizer.decode([1, 15, 3])

    @pytest.mark.parametrize("scalar", [3, np.int32(3), np.array(3), jnp.array(3)])
    def test_token_bytes_takes_integers_of_every_make(
        self, tokenizer: Tokenizer, scalar: Any
    ) -> None:
        assert tokenizer.token_bytes(scalar) == tokenizer.decode([3]).encode()

    def test_no_ids_are_no_text(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode([]) == ""

    def test_an_empty_array_is_no_text(self, tokenizer: Tokenizer) -> None:
        empty: Any = np.array([], dtype=np.int32)
        assert tokenizer.decode(empty) == ""

    @pytest.mark.parametrize("convert", [list, np.array], ids=["list", "NumPy"])
    @pytest.mark.parametrize("id", [-1, 10**6])
    def test_an_id_outside_the_vocabulary_is_named_with_its_place(
        self, tokenizer: Tokenizer, convert: Any, id: int
    ) -> None:
        last = tokenizer.vocab_size - 1
        expected = f"id {id} at index 2 is not in the vocabulary; expected an id from 0 to {last}$"
        with pytest.raises(ValueError, match=expected):
            tokenizer.decode(convert([0, 1, id, 2]))

    def test_the_first_id_past_the_last_is_outside(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        tokenizer.token_bytes(size - 1)
        with pytest.raises(ValueError, match=f"id {size} is not in .* from 0 to {size - 1}"):
            tokenizer.token_bytes(size)

    @pytest.mark.parametrize(
        "value", [True, np.True_, jnp.array(True), 1.0, np.float32(1), "1", None, [1]], ids=repr
    )
    def test_what_is_no_integer_is_named_with_its_place(
        self, tokenizer: Tokenizer, value: Any
    ) -> None:
        with pytest.raises(ValueError, match="at index 1 is not an integer; expected an id from 0"):
            tokenizer.decode([0, value])
        with pytest.raises(ValueError, match="is not an integer; expected an id from 0"):
            tokenizer.token_bytes(value)

    @pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), "1"], ids=repr)
    def test_a_sequence_of_anything_but_integers_is_refused(
        self, tokenizer: Tokenizer, ids: Any
    ) -> None:
        with pytest.raises(ValueError, match="at index 0 is not an integer"):
            tokenizer.decode(ids)

    def test_a_batch_is_refused_with_advice(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"\[1, 2\] at index 0 .* decode rows one by one"):
            tokenizer.decode(np.array([[1, 2], [3, 4]]))  # type: ignore[arg-type]

    @pytest.mark.parametrize("lone", [5, np.array(5)], ids=repr)
    def test_a_lone_id_is_refused_with_advice(self, tokenizer: Tokenizer, lone: Any) -> None:
        with pytest.raises(ValueError, match=r"expected a sequence of ids: pass \["):
            tokenizer.decode(lone)

    @pytest.mark.parametrize("text", [b"abc", ["a", "b"], None, 5], ids=repr)
    def test_what_is_no_text_is_not_encoded(self, tokenizer: Tokenizer, text: Any) -> None:
        with pytest.raises(TypeError, match=f"encode takes .* str; got {type(text).__name__}"):
            tokenizer.encode(text)


class TestCharacters:
    def test_ids_are_places_among_the_characters(self) -> None:
        tokenizer = CharTokenizer("xé👍")
        assert tokenizer.encode("👍xé") == [2, 0, 1]
        assert tokenizer.decode([2, 0, 1]) == "👍xé"
        assert tokenizer.token_bytes(2) == "👍".encode()
        assert tokenizer.vocab_size == 3

    def test_from_text_sorts_the_characters_of_the_text(self) -> None:
        assert CharTokenizer.from_text("hello\n") == CharTokenizer("\nehlo")

    @hypothesis.given(plain_text.filter(bool))
    def test_a_text_survives_a_round_trip_through_its_own_characters(self, text: str) -> None:
        tokenizer = CharTokenizer.from_text(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_character_outside_the_vocabulary_is_named_with_its_position(self) -> None:
        with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) at position 2 .* 2 char"):
            CharTokenizer("ab").encode("abéaé")

    @pytest.mark.parametrize(
        ("characters", "message"),
        [
            ("", "expected at least one character"),
            ("abcb", "character 'b' is at positions 1 and 3"),
            ("a\ud800", r"'\\ud800' at position 1 is a lone surrogate"),
            (["a", "b"], r"\['a', 'b'\]; expected at least one"),
        ],
    )
    def test_unusable_characters_are_refused(self, characters: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CharTokenizer(characters)


class TestStreaming:
    @hypothesis.given(gpt2_ids)
    @hypothesis.example([*load_tokenizer().encode("👩‍👩‍👧‍👦")[:-1]])
    @hypothesis.example([*load_tokenizer().encode("👍")[:1], 64])
    def test_the_pieces_joined_are_the_decoded_text_and_none_is_empty(self, ids: list[int]) -> None:
        pieces = list(stream_text(load_tokenizer(), ids))
        assert "".join(pieces) == load_tokenizer().decode(ids)
        assert "" not in pieces

    @hypothesis.given(st.lists(st.integers(0, 255), max_size=12))
    def test_the_same_holds_for_arbitrary_bytes(self, ids: list[int]) -> None:
        tokenizer = bytes_only({})
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)

    @hypothesis.given(plain_text)
    def test_valid_text_is_never_split_within_a_character(self, text: str) -> None:
        pieces = stream_text(load_tokenizer(), load_tokenizer().encode(text + "👍"))
        assert "".join(pieces) == text + "👍"

    def test_a_piece_comes_as_soon_as_its_character_is_whole(self) -> None:
        tokenizer = bytes_only({})
        taken: list[int] = []
        ids = (taken.append(id) or id for id in "a👍b".encode())  # type: ignore[func-returns-value]
        pieces = stream_text(tokenizer, ids)
        assert [(next(pieces), len(taken)) for _ in range(3)] == [("a", 1), ("👍", 5), ("b", 6)]

    def test_an_incomplete_end_becomes_one_replacement_character(self) -> None:
        assert list(stream_text(bytes_only({}), "a👍".encode()[:-1])) == ["a", "\ufffd"]

    def test_characters_stream_one_by_one(self) -> None:
        assert list(stream_text(CharTokenizer("aé"), [1, 0, 1])) == ["é", "a", "é"]

    def test_a_wrong_id_is_named_with_its_place_after_the_text_before_it(self) -> None:
        pieces = stream_text(load_tokenizer(), [64, 65, 50257])
        assert [next(pieces), next(pieces)] == ["a", "b"]
        with pytest.raises(ValueError, match="at index 2 of the stream: id 50257 is not in the"):
            next(pieces)


def bytes_only(special_tokens: dict[str, int]) -> BPETokenizer:
    """A vocabulary without merges, in which each byte is its own id."""
    return BPETokenizer(GPT2_PATTERN, {bytes([b]): b for b in range(256)}, special_tokens)


class TestVocabularies:
    """What `BPETokenizer` refuses to be built from."""

    @pytest.mark.parametrize(
        ("ranks", "special_tokens", "message"),
        [
            ({b"b": None}, {}, "1 of the 256 bytes have no token, the first 0x62"),
            ({b"ab": 97}, {}, "id 97 stands for both b'a' and b'ab'"),
            ({}, {"<s>": 97}, "id 97 stands for both b'a' and b'<s>'"),
            ({b"ab": -1}, {}, "token b'ab' has id -1; expected an integer from 0"),
            ({b"ab": 256.0}, {}, "token b'ab' has id 256.0"),
            ({b"ab": True}, {}, "token b'ab' has id True"),
            ({}, {"<s": 256, "<s>": 257}, "special token '<s' begins special token '<s>'"),
            ({}, {"": 256}, "a special token is empty"),
        ],
    )
    def test_a_contradictory_vocabulary_is_refused(
        self, ranks: dict[bytes, Any], special_tokens: dict[str, int], message: str
    ) -> None:
        full = {bytes([b]): b for b in range(256)} | ranks
        usable = {token: id for token, id in full.items() if id is not None}
        with pytest.raises(ValueError, match=message):
            BPETokenizer(GPT2_PATTERN, usable, special_tokens)

    def test_an_invalid_pattern_is_refused(self) -> None:
        with pytest.raises(ValueError, match="parenthesis"):
            BPETokenizer("(", bytes_only({}).ranks, {})

    def test_an_id_in_a_gap_of_the_vocabulary_is_refused(self) -> None:
        tokenizer = bytes_only({"<s>": 300})
        assert tokenizer.vocab_size == 301
        with pytest.raises(ValueError, match=r"id 280 at index 1 .* 0 to 300, and no token has"):
            tokenizer.decode([97, 280])


# A small vocabulary as Hugging Face trains them: special token first, then bytes, then merges.
PRINTABLE = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
LETTERS = PRINTABLE + "".join(map(chr, range(256, 256 + 256 - len(PRINTABLE))))
MERGES = [("#", "#"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]


def vocab_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    tokens = ["<|endoftext|>", *LETTERS, *(a + b for a, b in merges)]
    return {token: id for id, token in enumerate(tokens)}


def tokenizer_json(merges: Sequence[Any] = MERGES) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": True, "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocab_of(MERGES),
            "merges": list(merges),
        },
    }


def write_pair(
    folder: Path, vocab: dict[str, Any], merges: Sequence[tuple[str, str]], header: bool = True
) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2"] * header + [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_whole(folder: Path, contents: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")


def from_huggingface(folder: Path) -> BPETokenizer:
    tokenizer = tokenizer_from_huggingface(folder)
    assert tokenizer is not None
    return tokenizer


def listed_merges(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """GPT-2's own rule (openai/gpt-2, src/encoder.py, bpe): sweep after sweep, one pair each."""
    parts = list(word)
    while present := set(itertools.pairwise(parts)).intersection(merges):
        first, second = min(present, key=merges.index)
        swept = []
        while parts:
            size = 2 if parts[:2] == [first, second] else 1
            swept.append("".join(parts[:size]))
            parts = parts[size:]
        parts = swept
    return parts


class TestHuggingFaceFolders:
    @pytest.mark.parametrize("kind", ["vocab.json", "pairs", "strings", "no model type", "no #"])
    def test_a_small_vocabulary_encodes_by_its_merges(self, tmp_path: Path, kind: str) -> None:
        if kind in ("vocab.json", "no #"):
            write_pair(tmp_path, vocab_of(MERGES), MERGES, header=kind == "vocab.json")
        else:
            contents = tokenizer_json(
                [" ".join(m) for m in MERGES] if kind == "strings" else MERGES
            )
            if kind == "no model type":
                del contents["model"]["type"]
            write_whole(tmp_path, contents)
        tokenizer = from_huggingface(tmp_path)
        vocab = vocab_of(MERGES)
        words = ["hello", "Ġw", "Ã©", "##", "hell"]
        assert tokenizer.encode("hello wé##hell") == [vocab[word] for word in words]
        assert tokenizer.decode(tokenizer.encode("hello wé\n👍")) == "hello wé\n👍"
        assert tokenizer.special_tokens == {"<|endoftext|>": 0}
        assert tokenizer.vocab_size == len(vocab)

    def test_windows_line_ends_in_merges_do_not_matter(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        merges = tmp_path / "merges.txt"
        merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
        assert from_huggingface(tmp_path).encode("hello") == [vocab_of(MERGES)["hello"]]

    def test_added_tokens_of_either_layout_become_special_tokens(self, tmp_path: Path) -> None:
        size = len(vocab_of(MERGES))
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<é>": size}), encoding="utf-8")
        expected = {"<|endoftext|>": 0, "<é>": size}
        tokenizer = from_huggingface(tmp_path)
        assert tokenizer.special_tokens == expected
        assert tokenizer.encode("<é>", allowed_special="all") == [size]
        contents = tokenizer_json()
        contents["added_tokens"].append({"id": size, "content": "<é>"})
        write_whole(tmp_path, contents)
        assert from_huggingface(tmp_path).special_tokens == expected

    def test_a_template_that_adds_no_tokens_is_read(self, tmp_path: Path) -> None:
        # What transformers 5 writes for GPT-2.
        template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}
        write_whole(
            tmp_path, tokenizer_json() | {"post_processor": template | {"special_tokens": {}}}
        )
        assert from_huggingface(tmp_path).encode("hello") == [vocab_of(MERGES)["hello"]]

    def test_tokenizer_json_is_read_before_vocab_json(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of([]), [])
        write_whole(tmp_path, tokenizer_json())
        assert from_huggingface(tmp_path).vocab_size == len(vocab_of(MERGES))

    def test_an_empty_folder_has_no_tokenizer(self, tmp_path: Path) -> None:
        assert tokenizer_from_huggingface(tmp_path) is None
        assert read_tokenizer(tmp_path) is None

    @needs(ENCODER_JSON)
    def test_openais_files_under_hugging_faces_names_are_gpt2(
        self, gpt2: BPETokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "vocab.json").write_bytes(ENCODER_JSON.read_bytes())
        (tmp_path / "merges.txt").write_bytes(VOCAB_BPE.read_bytes())
        tokenizer = from_huggingface(tmp_path)
        assert tokenizer.ranks == gpt2.ranks
        assert tokenizer.special_tokens == gpt2.special_tokens
        for text in TEXTS.values():
            assert tokenizer.encode(text) == gpt2.encode(text)

    @hypothesis.given(st.data())
    def test_ids_are_those_of_the_listed_merges_or_the_vocabulary_is_refused(
        self, data: st.DataObject
    ) -> None:
        tokens, merges = list("ab"), []
        for _ in range(data.draw(st.integers(0, 6), label="merges")):
            pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
            if pair[0] + pair[1] not in tokens:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
        with tempfile.TemporaryDirectory() as folder:
            write_pair(Path(folder), vocab_of(merges), merges)
            try:
                tokenizer = from_huggingface(Path(folder))
            except ValueError as error:
                assert "would encode some texts otherwise" in str(error)
                assert any(listed_merges(a + b, merges) != [a + b] for a, b in merges)
                return
        word = data.draw(st.text("ab", max_size=30), label="word")
        expected = [vocab_of(merges)[part] for part in listed_merges(word, merges)]
        assert tokenizer.encode(word) == expected

    def test_a_token_its_own_merges_do_not_reach_is_refused(self, tmp_path: Path) -> None:
        # "abc" alone becomes "a" "bc", which only tiktoken would go on to merge.
        merges = [("b", "c"), ("a", "b"), ("ab", "c")]
        write_pair(tmp_path, vocab_of(merges), merges)
        with pytest.raises(ValueError, match=r"makes 'abc', yet that encodes to \['a', 'bc'\]"):
            tokenizer_from_huggingface(tmp_path)

    @pytest.mark.parametrize(
        ("vocab", "merges", "message"),
        [
            (vocab_of(MERGES) | {"ll": 600}, MERGES, "'he' 'll' makes id .* after id 600; .* rise"),
            (vocab_of(MERGES), [*MERGES, ("o", "o")], "'o' 'o' makes 'oo', which is not in"),
            (vocab_of(MERGES), [("he", "ll"), *MERGES], "'he' 'll' needs 'he', which no earlier"),
            (vocab_of(MERGES), MERGES[:-1], r"token 'Ã©' \(id 263\) is made by no merge"),
            ({"a": 0, "b": 1}, [], "254 of the 256 bytes have no token, the first '!'"),
            (vocab_of([]) | {"<pad>": "x"}, [], "token '<pad>' has id 'x'; expected an integer"),
            (vocab_of([]) | {"a": None}, [], "token 'a' has id None"),
            (vocab_of([]) | {"<pad>": 5}, [], "id 5 stands for both"),
            ([1, 2], [], "vocab.json: holds a JSON list; expected an object"),
        ],
    )
    def test_an_unusable_vocabulary_is_refused_with_its_file(
        self, tmp_path: Path, vocab: Any, merges: list[tuple[str, str]], message: str
    ) -> None:
        write_pair(tmp_path, vocab, merges)
        with pytest.raises(ValueError, match=message) as refusal:
            tokenizer_from_huggingface(tmp_path)
        assert str(tmp_path / "vocab.json") in str(refusal.value)

    def test_an_added_token_may_not_contradict_the_vocabulary(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 999}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"'<\|endoftext\|>' has id 999, but 0 in the"):
            tokenizer_from_huggingface(tmp_path)

    @pytest.mark.parametrize("line", ["a", "a b c", " a", "a  b"])
    def test_a_merge_that_is_not_two_tokens_is_named_with_its_line(
        self, tmp_path: Path, line: str
    ) -> None:
        write_pair(tmp_path, vocab_of([]), [])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\nh e\n{line}\n", encoding="utf-8")
        with pytest.raises(
            ValueError, match=f"merges.txt: line 3 is '{line}'; expected two tokens"
        ):
            tokenizer_from_huggingface(tmp_path)

    @pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
    def test_one_file_of_the_pair_is_not_enough(self, tmp_path: Path, missing: str) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / missing).unlink()
        with pytest.raises(ValueError, match=f"{missing} is missing, though"):
            tokenizer_from_huggingface(tmp_path)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("model", None, "'model' is 'None'; expected dict"),
            ("model.type", "Unigram", 'model.type is "Unigram"; only "BPE" is supported'),
            ("model.dropout", 0.1, "model.dropout is 0.1; only null"),
            ("model.end_of_word_suffix", "</w>", 'model.end_of_word_suffix is "</w>"'),
            ("model.vocab", [], r"'vocab' is '\[\]'; expected dict"),
            ("model.merges", None, "'merges' is 'None'; expected list"),
            (
                "model.merges.0",
                ["h", "e", "l"],
                r"model.merges\[0\] is \['h', 'e', 'l'\]; expected",
            ),
            ("model.merges.1", "ll", r"model.merges\[1\] is 'll'; expected two tokens"),
            ("normalizer", {"type": "NFC"}, 'normalizer is {"type": "NFC"}; only null'),
            ("pre_tokenizer", None, 'pre_tokenizer.type is null; only "ByteLevel"'),
            ("pre_tokenizer.add_prefix_space", True, "add_prefix_space is true; only false"),
            ("pre_tokenizer.use_regex", False, "pre_tokenizer.use_regex is false; only true"),
            ("post_processor.type", "BertProcessing", "post_processor.type is"),
            (
                "post_processor.special_tokens",
                {"</s>": {}},
                'is {"</s>": {}}; only {} is supported',
            ),
            ("decoder.type", "Metaspace", "decoder.type is"),
            ("added_tokens.0.lstrip", True, r"added token '<\|endoftext\|>' has lstrip"),
            ("added_tokens.0.id", "0", "'id' is '0'; expected int"),
        ],
    )
    def test_an_unsupported_tokenizer_json_is_refused_with_the_reason(
        self, tmp_path: Path, path: str, value: object, message: str
    ) -> None:
        contents = tokenizer_json()
        *way, last = path.split(".")
        node: Any = contents
        for key in way:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(last) if isinstance(node, list) else last] = value
        write_whole(tmp_path, contents)
        with pytest.raises(ValueError, match=message) as refusal:
            tokenizer_from_huggingface(tmp_path)
        assert str(tmp_path / "tokenizer.json") in str(refusal.value)

    @pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "flaxgpt_tokenizer.json"])
    @pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"null", b"\xff"], ids=repr)
    def test_a_broken_file_is_named(self, tmp_path: Path, name: str, contents: bytes) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError) as refusal:
            read_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(refusal.value)

    @hypothesis.given(st.data())
    def test_a_damaged_file_is_read_or_refused_but_never_crashes(self, data: st.DataObject) -> None:
        junk = st.sampled_from([None, True, -1, 0, 1.5, "x", "", [], [None], {}, {"type": 1}])
        recipe = {"kind": "bpe", "pattern": GPT2_PATTERN, "special_tokens": {"<s>": 256}}
        recipe["ranks"] = {base64.b64encode(bytes([b])).decode(): b for b in range(256)}
        name, contents = data.draw(
            st.sampled_from(
                [("tokenizer.json", tokenizer_json()), ("flaxgpt_tokenizer.json", recipe)]
            )
        )
        node: Any = contents
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys), label="key")
            if not node[key] or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = data.draw(junk, label="value")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(json.dumps(contents), encoding="utf-8")
            try:
                assert read_tokenizer(Path(folder)) is not None
            except ValueError as error:
                assert str(path) in str(error)


class TestSavedTokenizers:
    def test_gpt2_is_saved_as_its_name(self, gpt2: BPETokenizer, tmp_path: Path) -> None:
        save_tokenizer(gpt2, tmp_path)
        saved = json.loads((tmp_path / "flaxgpt_tokenizer.json").read_text(encoding="utf-8"))
        assert saved == {"kind": "gpt2"}
        assert read_tokenizer(tmp_path) is gpt2

    def test_characters_are_read_back_in_their_order(self, tmp_path: Path) -> None:
        tokenizer = CharTokenizer('zé\n"\\\x00👍a\u2028')
        save_tokenizer(tokenizer, tmp_path)
        assert read_tokenizer(tmp_path) == tokenizer

    def test_any_other_vocabulary_is_read_back_whole(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        tokenizer = from_huggingface(tmp_path)
        save_tokenizer(tokenizer, tmp_path / "new" / "folder")
        again = read_tokenizer(tmp_path / "new" / "folder")
        assert isinstance(again, BPETokenizer)
        assert again.ranks == tokenizer.ranks
        assert again.pattern == tokenizer.pattern
        assert again.special_tokens == tokenizer.special_tokens
        assert again.encode("hello wé") == tokenizer.encode("hello wé")

    def test_gpt2_with_another_special_token_is_not_saved_as_gpt2(
        self, gpt2: BPETokenizer, tmp_path: Path
    ) -> None:
        special_tokens = gpt2.special_tokens | {"<pad>": 50257}
        save_tokenizer(BPETokenizer(gpt2.pattern, gpt2.ranks, special_tokens), tmp_path)
        again = read_tokenizer(tmp_path)
        assert again is not None
        assert again.encode("Hello<pad>", allowed_special="all") == [15496, 50257]

    def test_flaxgpts_file_is_read_before_hugging_faces(self, tmp_path: Path) -> None:
        write_whole(tmp_path, tokenizer_json())
        fallback = read_tokenizer(tmp_path)
        assert fallback is not None
        assert fallback.vocab_size == len(vocab_of(MERGES))
        save_tokenizer(CharTokenizer("ab"), tmp_path)
        assert read_tokenizer(tmp_path) == CharTokenizer("ab")

    def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        save_tokenizer(CharTokenizer("ab"), tmp_path)
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_tokenizer(CharTokenizer("xyz"), tmp_path)
        assert read_tokenizer(tmp_path) == CharTokenizer("ab")
        assert [path.name for path in tmp_path.iterdir()] == ["flaxgpt_tokenizer.json"]

    def test_a_tokenizer_of_unknown_type_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="type Encoding; expected a BPETokenizer or a Char"):
            save_tokenizer(bytes_only({})._encoding, tmp_path)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"kind": "words"}, "kind is 'words'; expected one of 'gpt2', 'tales', 'charac"),
            ({}, "kind is None"),
            ({"kind": "characters"}, "'characters' is 'None'; expected str"),
            ({"kind": "characters", "characters": "aa"}, "'a' is at positions 0 and 1"),
            ({"kind": "bpe", "pattern": "."}, "'ranks' is 'None'; expected dict"),
            ({"kind": "bpe", "pattern": ".", "ranks": {"?": 0}}, "base64"),
        ],
    )
    def test_an_unusable_file_is_refused_with_its_name(
        self, tmp_path: Path, recipe: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "flaxgpt_tokenizer.json"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as refusal:
            read_tokenizer(tmp_path)
        assert str(path) in str(refusal.value)
