"""Tokenizers: text to ids and back, and their files."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
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
from flaxgpt.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from flaxgpt.tokenizer.bpe import shipped_tokenizer
from flaxgpt.tokenizer.folder import (
    read_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_recipe,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
RANKS = Path(flaxgpt.__file__).parent / "vocab" / "gpt2.tiktoken"
VERDICT = ROOT / "tests" / "data" / "verdict" / "the-verdict.txt"
# The names of OpenAI's files in tiktoken's cache: the SHA-1 of their URLs.
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
plain_text = st.text()  # Hypothesis excludes surrogates from st.text().
gpt2_ids = st.lists(st.integers(0, 50256))
padded_gpt2_ids = st.lists(st.integers(0, 50256) | st.integers(50257, 50303))


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not path.exists(),
        reason=f"{path} is missing; FLAXGPT_SHARED is the folder that has it",
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
    def test_the_prompt_of_the_book_encodes_to_the_ids_in_the_book(self, gpt2: Tokenizer) -> None:
        assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]

    def test_the_verdict_has_5145_tokens_as_in_the_book(self, gpt2: Tokenizer) -> None:
        assert len(gpt2.encode(VERDICT.read_text(encoding="utf-8"))) == 5145

    def test_the_vocabulary_has_50257_ids_and_the_last_is_special(self, gpt2: Tokenizer) -> None:
        assert gpt2.vocab_size == 50257
        assert gpt2.special_tokens == {"<|endoftext|>": 50256}
        assert gpt2.token_bytes(50256) == b"<|endoftext|>"

    def test_the_dict_of_special_tokens_is_a_copy(self, gpt2: Tokenizer) -> None:
        gpt2.special_tokens.clear()
        assert load_tokenizer().special_tokens == {"<|endoftext|>": 50256}

    def test_the_shipped_vocabulary_is_openais_r50k_base(self) -> None:
        # tiktoken_ext/openai_public.py, r50k_base(): the same vocabulary in the same format.
        expected = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
        assert hashlib.sha256(RANKS.read_bytes()).hexdigest() == expected

    def test_the_shipped_vocabulary_comes_with_its_license(self) -> None:
        licence = (RANKS.parent / "LICENSE").read_text(encoding="utf-8")
        assert "gpt2.tiktoken" in licence
        assert "Modified MIT License\n\nSoftware Copyright (c) 2019 OpenAI" in licence

    def test_loading_uses_neither_network_nor_cache(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        fresh = shipped_tokenizer.__wrapped__("gpt2")
        assert fresh.encode("Hello, I am") == [15496, 11, 314, 716]
        assert list(tmp_path.iterdir()) == []

    def test_loading_twice_returns_the_same_object(self, gpt2: BPETokenizer) -> None:
        assert load_tokenizer() is gpt2
        assert load_tokenizer("gpt2") is gpt2

    @hypothesis.given(plain_text)
    def test_any_text_without_surrogates_decodes_to_itself(self, text: str) -> None:
        gpt2 = load_tokenizer()
        assert gpt2.decode(gpt2.encode(text)) == text

    @hypothesis.given(plain_text)
    def test_the_token_bytes_of_a_text_join_to_its_utf8(self, text: str) -> None:
        gpt2 = load_tokenizer()
        assert b"".join(map(gpt2.token_bytes, gpt2.encode(text))) == text.encode("utf-8")

    def test_a_lone_surrogate_decodes_to_u_fffd(self, gpt2: Tokenizer) -> None:
        assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"

    def test_an_incomplete_character_decodes_to_u_fffd(self, gpt2: Tokenizer) -> None:
        first, *rest = gpt2.encode("👍")
        assert rest
        assert gpt2.decode([first]) == "\ufffd"

    def test_text_that_the_regex_engine_cannot_split_is_rejected_with_advice(
        self, gpt2: Tokenizer
    ) -> None:
        with pytest.raises(ValueError, match=r"a text of 1000001 characters .* shorten its runs"):
            gpt2.encode(" " * 1_000_000 + "x")


@needs(ENCODER_JSON)
class TestAgainstTiktoken:
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
    def test_ids_match(self, gpt2: Tokenizer, reference: tiktoken.Encoding, text: str) -> None:
        assert gpt2.encode(text) == reference.encode(text, disallowed_special=())
        assert gpt2.encode(text, allowed_special="all") == reference.encode(
            text, allowed_special="all"
        )

    @needs(SHAKESPEARE)
    def test_ids_match_for_a_megabyte_of_shakespeare(
        self, gpt2: Tokenizer, reference: tiktoken.Encoding
    ) -> None:
        text = SHAKESPEARE.read_text(encoding="utf-8")
        ids = gpt2.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert gpt2.decode(ids) == text

    @hypothesis.given(any_text)
    @hypothesis.example("\ud800")
    def test_ids_match_for_any_string_including_surrogates(
        self, reference: tiktoken.Encoding, text: str
    ) -> None:
        assert load_tokenizer().encode(text) == reference.encode_ordinary(text)

    @hypothesis.given(gpt2_ids)
    def test_decoded_text_matches_for_any_ids(
        self, reference: tiktoken.Encoding, ids: list[int]
    ) -> None:
        assert load_tokenizer().decode(ids) == reference.decode(ids)

    def test_the_vocabulary_matches(self, gpt2: BPETokenizer, reference: tiktoken.Encoding) -> None:
        assert gpt2.ranks == reference._mergeable_ranks

    def test_the_build_script_reproduces_the_shipped_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        out = tmp_path / "gpt2.tiktoken"
        script = load_build_script()
        monkeypatch.setattr("sys.argv", ["build", str(ENCODER_JSON.parent), "--out", str(out)])
        script.main()
        assert out.read_bytes() == RANKS.read_bytes()
        assert list(tmp_path.iterdir()) == [out]

    def test_the_build_script_rejects_altered_input(self, tmp_path: Path) -> None:
        (tmp_path / VOCAB_BPE.name).write_bytes(VOCAB_BPE.read_bytes())
        (tmp_path / ENCODER_JSON.name).write_bytes(ENCODER_JSON.read_bytes() + b" ")
        with pytest.raises(ValueError, match=r"\(encoder.json\) has SHA-256 .*; expected 196139"):
            load_build_script().build(tmp_path)


def test_the_build_script_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\(encoder.json\) does not exist; pass a folder"):
        load_build_script().build(tmp_path)


def load_build_script() -> Any:
    spec = importlib.util.spec_from_file_location("build", ROOT / "scripts/build_gpt2_vocab.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class TestLoading:
    def test_an_unknown_name_raises_an_error_with_a_similar_one(self) -> None:
        with pytest.raises(ValueError, match=r"'GPT-2': did you mean 'gpt2'\?"):
            load_tokenizer("GPT-2")

    @pytest.mark.parametrize("source", ["sentencepiece", "", None, Path("gpt2")], ids=repr)
    def test_any_other_unknown_name_raises_an_error_with_what_exists(self, source: Any) -> None:
        with pytest.raises(ValueError, match="expected 'gpt2' or 'tales', or the path of a folder"):
            load_tokenizer(source)

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_folder_is_read(self, tmp_path: Path, kind: Callable[[Path], Any]) -> None:
        save_tokenizer(CharTokenizer("ab"), tmp_path)
        assert load_tokenizer(kind(tmp_path)) == CharTokenizer("ab")

    def test_a_shipped_name_takes_precedence_over_a_folder(
        self, gpt2: BPETokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        save_tokenizer(CharTokenizer("ab"), tmp_path / "gpt2")
        monkeypatch.chdir(tmp_path)
        assert load_tokenizer("gpt2") is gpt2
        assert load_tokenizer("./gpt2") == load_tokenizer(Path("gpt2")) == CharTokenizer("ab")

    def test_a_folder_without_a_tokenizer_raises_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="contains no tokenizer; expected flaxgpt_tokenizer"):
            load_tokenizer(tmp_path)

    @pytest.mark.slow  # test_cli.py checks all heavy libraries at once
    def test_importing_flaxgpt_does_not_import_the_tokenizers_library(self) -> None:
        program = "import sys, flaxgpt; assert 'tokenizers' not in sys.modules"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)


class TestSpecialTokens:
    def test_a_special_token_in_text_is_ordinary_text(self, gpt2: Tokenizer) -> None:
        ids = gpt2.encode("<|endoftext|>")
        assert ids == [27, 91, 437, 1659, 5239, 91, 29]
        assert gpt2.decode(ids) == "<|endoftext|>"

    @pytest.mark.parametrize("allowed", ["all", {"<|endoftext|>"}, ["<|endoftext|>"]])
    def test_an_allowed_special_token_is_one_id(self, gpt2: Tokenizer, allowed: Any) -> None:
        assert gpt2.encode("a<|endoftext|>", allowed_special=allowed) == [64, 50256]

    def test_only_allowed_special_tokens_are_recognized(self) -> None:
        tokenizer = bytes_only({"<a>": 256, "<b>": 257})
        ids = tokenizer.encode("<a><b>", allowed_special={"<b>"})
        assert ids == [*b"<a>", 257]

    def test_allowing_an_unknown_special_token_raises_an_error(self, gpt2: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"contains \['<pad>'\]; .* \['<\|endoftext\|>'\]"):
            gpt2.encode("a", allowed_special={"<pad>", "<|endoftext|>"})

    def test_a_string_is_not_a_collection_of_special_tokens(self, gpt2: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"'<\|endoftext\|>' is a str; expected 'all' or"):
            gpt2.encode("a", allowed_special="<|endoftext|>")

    def test_a_character_tokenizer_has_no_special_tokens(self) -> None:
        tokenizer = CharTokenizer("ab")
        assert tokenizer.special_tokens == {}
        assert tokenizer.encode("ab", allowed_special="all") == [0, 1]
        with pytest.raises(ValueError, match=r"contains \['a'\]"):
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
    def test_sequences_and_arrays_of_any_integer_type_decode_alike(
        self, tokenizer: Tokenizer, convert: Callable[[list[int]], Sequence[int]]
    ) -> None:
        assert tokenizer.decode(convert([1, 15, 3])) == tokenizer.decode([1, 15, 3])

    @pytest.mark.parametrize("scalar", [3, np.int32(3), np.array(3), jnp.array(3)])
    def test_token_bytes_accepts_any_integer_type(self, tokenizer: Tokenizer, scalar: Any) -> None:
        assert tokenizer.token_bytes(scalar) == tokenizer.decode([3]).encode()

    def test_no_ids_decode_to_an_empty_text(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode([]) == ""

    def test_an_empty_array_decodes_to_an_empty_text(self, tokenizer: Tokenizer) -> None:
        empty: Any = np.array([], dtype=np.int32)
        assert tokenizer.decode(empty) == ""

    @pytest.mark.parametrize("convert", [list, np.array], ids=["list", "NumPy"])
    def test_a_negative_id_raises_an_error_with_its_index(
        self, tokenizer: Tokenizer, convert: Any
    ) -> None:
        last = tokenizer.vocab_size - 1
        expected = f"id -1 at index 2 is not in the vocabulary; expected an id from 0 to {last}$"
        with pytest.raises(ValueError, match=expected):
            tokenizer.decode(convert([0, 1, -1, 2]))

    @pytest.mark.parametrize("convert", [list, np.array], ids=["list", "NumPy"])
    def test_an_id_beyond_the_vocabulary_decodes_to_u_fffd(
        self, tokenizer: Tokenizer, convert: Any
    ) -> None:
        first, second = tokenizer.decode([0, 1]), tokenizer.decode([2])
        assert tokenizer.decode(convert([0, 1, 10**6, 2])) == f"{first}\ufffd{second}"

    def test_vocab_size_is_the_first_id_outside_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        tokenizer.token_bytes(size - 1)
        with pytest.raises(ValueError, match=f"id {size} is not in .* from 0 to {size - 1}"):
            tokenizer.token_bytes(size)

    @pytest.mark.parametrize(
        "value", [True, np.True_, jnp.array(True), 1.0, np.float32(1), "1", None, [1]], ids=repr
    )
    def test_a_value_that_is_not_an_integer_raises_an_error_with_its_index(
        self, tokenizer: Tokenizer, value: Any
    ) -> None:
        with pytest.raises(ValueError, match="at index 1 is not an integer; expected an id from 0"):
            tokenizer.decode([0, value])
        with pytest.raises(ValueError, match="is not an integer; expected an id from 0"):
            tokenizer.token_bytes(value)

    @pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), "1"], ids=repr)
    def test_a_sequence_of_other_values_raises_an_error(
        self, tokenizer: Tokenizer, ids: Any
    ) -> None:
        with pytest.raises(ValueError, match="at index 0 is not an integer"):
            tokenizer.decode(ids)

    def test_a_batch_raises_an_error_with_advice(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"\[1, 2\] at index 0 .* decode one row at a time"):
            tokenizer.decode(np.array([[1, 2], [3, 4]]))  # type: ignore[arg-type]

    @pytest.mark.parametrize("lone", [5, np.array(5)], ids=repr)
    def test_a_single_id_raises_an_error_with_advice(self, tokenizer: Tokenizer, lone: Any) -> None:
        with pytest.raises(ValueError, match=r"is not a sequence of ids; for one id, pass \["):
            tokenizer.decode(lone)

    @pytest.mark.parametrize("text", [b"abc", ["a", "b"], None, 5], ids=repr)
    def test_only_a_str_can_be_encoded(self, tokenizer: Tokenizer, text: Any) -> None:
        with pytest.raises(TypeError, match=f"text has type {type(text).__name__}; expected a str"):
            tokenizer.encode(text)


class TestCharacters:
    def test_ids_are_positions_among_the_characters(self) -> None:
        tokenizer = CharTokenizer("xé👍")
        assert tokenizer.encode("👍xé") == [2, 0, 1]
        assert tokenizer.decode([2, 0, 1]) == "👍xé"
        assert tokenizer.token_bytes(2) == "👍".encode()
        assert tokenizer.vocab_size == 3

    def test_from_text_sorts_the_characters_of_the_text(self) -> None:
        assert CharTokenizer.from_text("hello\n") == CharTokenizer("\nehlo")

    @hypothesis.given(plain_text.filter(bool))
    def test_a_text_decodes_to_itself(self, text: str) -> None:
        tokenizer = CharTokenizer.from_text(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_character_outside_the_vocabulary_raises_an_error_with_its_position(self) -> None:
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
    def test_invalid_characters_raise_an_error(self, characters: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CharTokenizer(characters)


class TestStreaming:
    @hypothesis.given(padded_gpt2_ids)
    @hypothesis.example([*load_tokenizer().encode("👩‍👩‍👧‍👦")[:-1]])
    @hypothesis.example([*load_tokenizer().encode("👍")[:1], 64])
    def test_the_pieces_join_to_the_decoded_text_and_none_is_empty(self, ids: list[int]) -> None:
        pieces = list(load_tokenizer().decode_stream(ids))
        assert "".join(pieces) == load_tokenizer().decode(ids)
        assert "" not in pieces

    @hypothesis.given(st.lists(st.integers(0, 255), max_size=12))
    def test_the_pieces_of_arbitrary_bytes_join_to_the_decoded_text(self, ids: list[int]) -> None:
        tokenizer = bytes_only({})
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)

    def test_a_piece_arrives_as_soon_as_its_character_is_complete(self) -> None:
        taken: list[int] = []
        ids = (taken.append(id) or id for id in "a👍b".encode())  # type: ignore[func-returns-value]
        pieces = bytes_only({}).decode_stream(ids)
        assert [(next(pieces), len(taken)) for _ in range(3)] == [("a", 1), ("👍", 5), ("b", 6)]

    def test_an_incomplete_end_becomes_one_replacement_character(self) -> None:
        assert list(bytes_only({}).decode_stream("a👍".encode()[:-1])) == ["a", "\ufffd"]

    def test_characters_arrive_one_by_one(self) -> None:
        assert list(CharTokenizer("aé").decode_stream([1, 0, 1])) == ["é", "a", "é"]

    def test_an_invalid_id_raises_an_error_with_its_index_after_the_text_before_it(self) -> None:
        pieces = load_tokenizer().decode_stream([64, 65, -1])
        assert [next(pieces), next(pieces)] == ["a", "b"]
        with pytest.raises(ValueError, match="id -1 at index 2 of the stream is not in the"):
            next(pieces)


def bytes_only(special_tokens: dict[str, int]) -> BPETokenizer:
    """Return a tokenizer without merges, in which each byte is its own id."""
    return BPETokenizer(GPT2_PATTERN, {bytes([b]): b for b in range(256)}, special_tokens)


class TestVocabularies:
    """Vocabularies that `BPETokenizer` does not accept."""

    @pytest.mark.parametrize(
        ("ranks", "special_tokens", "message"),
        [
            ({b"b": None}, {}, "1 of the 256 bytes have no token, the first 0x62"),
            ({b"ab": 97}, {}, "id 97 belongs to both b'a' and b'ab'"),
            ({}, {"<s>": 97}, "id 97 belongs to both b'a' and b'<s>'"),
            ({b"ab": -1}, {}, "token b'ab' has id -1; expected a nonnegative"),
            ({b"ab": 256.0}, {}, "token b'ab' has id 256.0"),
            ({b"ab": True}, {}, "token b'ab' has id True"),
            ({}, {"<s": 256, "<s>": 257}, "special token '<s' is a prefix of special token '<s>'"),
            ({}, {"": 256}, "a special token is empty"),
        ],
    )
    def test_an_inconsistent_vocabulary_raises_an_error(
        self, ranks: dict[bytes, Any], special_tokens: dict[str, int], message: str
    ) -> None:
        full = {bytes([b]): b for b in range(256)} | ranks
        usable = {token: id for token, id in full.items() if id is not None}
        with pytest.raises(ValueError, match=message):
            BPETokenizer(GPT2_PATTERN, usable, special_tokens)

    def test_an_invalid_pattern_raises_an_error(self) -> None:
        with pytest.raises(ValueError, match="parenthesis"):
            BPETokenizer("(", bytes_only({}).ranks, {})

    def test_an_unused_id_below_vocab_size_raises_an_error(self) -> None:
        tokenizer = bytes_only({"<s>": 300})
        assert tokenizer.vocab_size == 301
        with pytest.raises(ValueError, match=r"id 280 is not .* 0 to 300 that a token has"):
            tokenizer.token_bytes(280)


FOLDERS = Path(__file__).parent / "golden" / "tokenizers"
NAMES = ["byte-level-added", "unigram", "wordpiece"]
GOLDEN = pytest.mark.parametrize("name", NAMES)


@functools.cache
def read_golden(name: str) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(FOLDERS / name)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def golden_rows(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDERS / name / "expected.json").read_text(encoding="utf-8"))["rows"]


def edited(name: str, **changes: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(json.loads(read_golden(name).definition) | changes))


def byte_fallback() -> HuggingFaceTokenizer:
    """Return a Unigram tokenizer with byte fallback and a decoder like that of Llama."""
    definition = json.loads(read_golden("unigram").definition)
    definition["model"]["byte_fallback"] = True
    definition["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    parts += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    parts += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    definition["decoder"] = {"type": "Sequence", "decoders": parts}
    return HuggingFaceTokenizer(json.dumps(definition))


class TestHuggingFaceTokenizers:
    @GOLDEN
    def test_ids_and_decoded_texts_match_the_library(self, name: str) -> None:
        tokenizer = read_golden(name)
        for row in golden_rows(name):
            assert tokenizer.encode(row["text"], allowed_special="all") == row["ids"]
            assert tokenizer.decode(row["ids"]) == row["decoded"]

    @pytest.mark.parametrize(("name", "size"), [*zip(NAMES, [503, 400, 400], strict=True)])
    def test_vocab_size_includes_added_tokens(self, name: str, size: int) -> None:
        assert read_golden(name).vocab_size == size

    def test_special_tokens_are_the_added_tokens_marked_special(self) -> None:
        tokens = read_golden("byte-level-added").special_tokens
        assert tokens == {"<|endoftext|>": 0, "<pad>": 500, "<|user|>": 501}
        assert read_golden("unigram").special_tokens == {"<unk>": 0, "</s>": 1}

    @GOLDEN
    @hypothesis.given(st.data())
    def test_text_never_encodes_to_a_special_token_that_is_not_allowed(
        self, name: str, data: st.DataObject
    ) -> None:
        tokenizer = read_golden(name)
        fragments = [*tokenizer.special_tokens, "<|bot|>", "a", " ", "<", "</s", ">", "[", "]"]
        text = "".join(data.draw(st.lists(st.sampled_from(fragments) | plain_text, max_size=9)))
        allowed = data.draw(st.sets(st.sampled_from(list(tokenizer.special_tokens))))
        unknown = {"<unk>", "[UNK]"}  # stands for text outside the vocabulary
        forbidden = {
            id for token, id in tokenizer.special_tokens.items() if token not in allowed | unknown
        }
        assert forbidden.isdisjoint(tokenizer.encode(text, allowed_special=allowed))

    def test_a_special_token_in_the_vocabulary_of_the_model_is_ordinary_text(self) -> None:
        # The Unigram model itself would produce id 1 here.
        tokenizer = read_golden("unigram")
        assert 1 not in tokenizer.encode("a</s>b")
        assert 1 in tokenizer.encode("a</s>b", allowed_special={"</s>"})

    def test_a_special_token_that_merges_make_is_ordinary_text(self) -> None:
        definition = json.loads(read_golden("byte-level-added").definition)
        definition["added_tokens"][0] |= {"id": definition["model"]["vocab"]["he"], "content": "he"}
        tokenizer = HuggingFaceTokenizer(json.dumps(definition))
        (he,) = tokenizer.encode("he", allowed_special="all")
        assert tokenizer.special_tokens["he"] == he
        assert he not in tokenizer.encode("he the")
        assert tokenizer.decode(tokenizer.encode("he the")) == "he the"

    def test_allowing_some_special_tokens_keeps_the_others_ordinary(self) -> None:
        tokenizer = read_golden("byte-level-added")
        ids = tokenizer.encode("<pad><|user|>", allowed_special=["<|user|>"])
        assert ids[-1] == 501 and 500 not in ids and tokenizer.decode(ids) == "<pad><|user|>"

    def test_an_added_token_that_is_not_special_is_always_recognized(self) -> None:
        assert read_golden("byte-level-added").encode("<|bot|>") == [502]

    def test_truncation_padding_templates_and_dropout_do_not_apply(self) -> None:
        definition = json.loads(read_golden("byte-level-added").definition)
        truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
        padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
        padding |= {"pad_id": 500, "pad_type_id": 0, "pad_token": "<pad>"}
        template = {"type": "BertProcessing", "sep": ["<pad>", 500], "cls": ["<|user|>", 501]}
        tokenizer = edited(
            "byte-level-added",
            truncation=truncation | {"stride": 0},
            padding=padding,
            post_processor=template,
            model=definition["model"] | {"dropout": 0.9},
        )
        for row in golden_rows("byte-level-added"):
            assert tokenizer.encode(row["text"], allowed_special="all") == row["ids"]

    @GOLDEN
    @hypothesis.given(text=any_text)
    @hypothesis.example(text="\ud83d\ude00\ud800")
    def test_surrogates_are_joined_or_replaced(self, name: str, text: str) -> None:
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert read_golden(name).encode(text) == read_golden(name).encode(joined)

    @pytest.mark.parametrize("name", [*NAMES, "byte fallback"])
    @hypothesis.given(data=st.data())
    def test_streamed_pieces_join_to_the_decoded_text(self, name: str, data: st.DataObject) -> None:
        tokenizer = byte_fallback() if name == "byte fallback" else read_golden(name)
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 20)))
        pieces = list(tokenizer.decode_stream(ids))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "" not in pieces

    @GOLDEN
    @hypothesis.given(data=st.data())
    def test_a_stream_continues_the_text_of_the_ids_before_it(
        self, name: str, data: st.DataObject
    ) -> None:
        tokenizer = read_golden(name)
        text = "I HAD always thought Jack Gisburn rather a cheap genius"
        ids = tokenizer.encode(text)
        cut = data.draw(st.integers(0, len(ids)))
        rest = "".join(tokenizer.decode_stream(ids[cut:], after=ids[:cut]))
        assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)

    def test_a_piece_arrives_with_its_token(self) -> None:
        pieces = read_golden("wordpiece").decode_stream(
            read_golden("wordpiece").encode("I am here")
        )
        assert [next(pieces), next(pieces)] == ["i", " am"]

    def test_the_bytes_of_a_character_are_held_back_until_it_is_complete(self) -> None:
        tokenizer = read_golden("byte-level-added")
        ids = tokenizer.encode("a😀b")
        assert len(ids) > 3
        assert list(tokenizer.decode_stream(ids)) == ["a", "😀", "b"]

    def test_an_invalid_id_raises_an_error_with_its_index(self) -> None:
        pieces = read_golden("unigram").decode_stream([9, -1])
        assert next(pieces) == "o"
        with pytest.raises(ValueError, match="id -1 at index 1 of the stream is not in the"):
            next(pieces)
        with pytest.raises(ValueError, match=r"id -1 at index 1 is not in .* from 0 to 399"):
            read_golden("unigram").decode([9, -1])

    @GOLDEN
    def test_token_bytes_join_to_the_decoded_text_except_for_a_space_before_it(
        self, name: str
    ) -> None:
        tokenizer = read_golden(name)
        for row in golden_rows(name):
            joined = b"".join(map(tokenizer.token_bytes, row["ids"])).decode()
            space = "" if name == "byte-level-added" or not row["ids"] else " "
            assert joined == space + row["decoded"]

    def test_token_bytes_of_byte_tokens_are_bytes(self) -> None:
        tokenizer = byte_fallback()
        assert [tokenizer.token_bytes(id) for id in (400, 655)] == [b"\0", b"\xff"]

    def test_a_byte_outside_an_incomplete_vocabulary_raises_an_error(self) -> None:
        definition = json.loads(read_golden("byte-level-added").definition)
        definition["model"]["vocab"]["\u0100" * 9] = definition["model"]["vocab"].pop("é")
        tokenizer = HuggingFaceTokenizer(json.dumps(definition))
        assert tokenizer.decode(tokenizer.encode("Jack")) == "Jack"
        with pytest.raises(ValueError, match="has no token for byte 0xe9 of the text; remove"):
            tokenizer.encode("\u9000")

    def test_equal_definitions_are_equal_tokenizers(self) -> None:
        assert edited("unigram") == edited("unigram") != edited("wordpiece")
        assert "400 ids" in repr(edited("unigram"))


# A small vocabulary as Hugging Face trains them: the special token first, then bytes, then merges.
PRINTABLE = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
LETTERS = PRINTABLE + "".join(map(chr, range(256, 256 + 256 - len(PRINTABLE))))
MERGES = [("#", "#"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©")]


def vocab_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    tokens = ["<|endoftext|>", *LETTERS, *(a + b for a, b in merges)]
    return {token: id for id, token in enumerate(tokens)}


def write_pair(
    folder: Path, vocab: Any, merges: Sequence[tuple[str, str]], header: bool = True
) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2"] * header + [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_settings(folder: Path, name: str = "tokenizer_config.json", **settings: Any) -> None:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")


def merged(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """Apply GPT-2's rule (openai/gpt-2, src/encoder.py, bpe): one pair per sweep."""
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


class TestFolders:
    @pytest.mark.parametrize("header", [True, False])
    @pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
    def test_vocab_json_with_merges_txt_is_byte_level_bpe(
        self, tmp_path: Path, header: bool, newline: str
    ) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES, header)
        merges = tmp_path / "merges.txt"
        merges.write_bytes(merges.read_bytes().replace(b"\n", newline.encode()))
        tokenizer = load_tokenizer(tmp_path)
        words = ["hello", "Ġw", "Ã©", "##", "hell"]
        assert tokenizer.encode("hello wé##hell") == [vocab_of(MERGES)[word] for word in words]
        assert tokenizer.decode(tokenizer.encode("hello wé\n👍")) == "hello wé\n👍"
        assert tokenizer.special_tokens == {"<|endoftext|>": 0}
        assert tokenizer.vocab_size == len(vocab_of(MERGES))

    @hypothesis.given(st.data())
    def test_ids_follow_the_order_of_the_merges(self, data: st.DataObject) -> None:
        tokens, merges = list("ab"), []
        for _ in range(data.draw(st.integers(0, 6), label="merges")):
            pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
            if pair[0] + pair[1] not in tokens:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
        with tempfile.TemporaryDirectory() as folder:
            write_pair(Path(folder), vocab_of(merges), merges)
            tokenizer = load_tokenizer(folder)
        word = data.draw(st.text("ab", max_size=30), label="word")
        assert tokenizer.encode(word) == [vocab_of(merges)[part] for part in merged(word, merges)]

    @pytest.mark.slow  # the merges of two vocabularies of 50,257 tokens
    @needs(ENCODER_JSON)
    def test_openais_files_under_the_names_of_hugging_face_are_gpt2(
        self, gpt2: BPETokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "vocab.json").write_bytes(ENCODER_JSON.read_bytes())
        (tmp_path / "merges.txt").write_bytes(VOCAB_BPE.read_bytes())
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.special_tokens == gpt2.special_tokens
        for text in TEXTS.values():
            assert tokenizer.encode(text) == gpt2.encode(text)
            ids = gpt2.encode(text, allowed_special="all")
            assert tokenizer.encode(text, allowed_special="all") == ids
            assert tokenizer.decode(ids) == gpt2.decode(ids)
            assert list(map(tokenizer.token_bytes, ids)) == list(map(gpt2.token_bytes, ids))

    def test_added_tokens_json_contains_tokens_that_are_always_recognized(
        self, tmp_path: Path
    ) -> None:
        size = len(vocab_of(MERGES))
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, "added_tokens.json", **{"<é>": size + 1, "<b>": size})
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.special_tokens == {"<|endoftext|>": 0}
        assert tokenizer.encode("<b><é>") == [size, size + 1]

    @pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
    def test_added_tokens_that_the_settings_name_are_special(
        self, tmp_path: Path, name: str
    ) -> None:
        size = len(vocab_of(MERGES))
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, "added_tokens.json", **{"<b>": size, "<c>": size + 1})
        write_settings(tmp_path, name, pad_token="<b>", additional_special_tokens=["<c>"])
        tokens = load_tokenizer(tmp_path).special_tokens
        assert tokens == {"<|endoftext|>": 0, "<b>": size, "<c>": size + 1}

    def test_tokenizer_config_says_which_added_tokens_are_not_special(self, tmp_path: Path) -> None:
        size = len(vocab_of(MERGES))
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, "added_tokens.json", **{"<b>": size})
        flags = {"content": "<b>", "special": False, "lstrip": True}
        write_settings(tmp_path, added_tokens_decoder={str(size): flags})
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.special_tokens == {"<|endoftext|>": 0}
        assert tokenizer.encode("hello  <b>") == [vocab_of(MERGES)["hello"], size]

    def test_tokenizer_config_says_whether_a_space_is_added(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, tokenizer_class="RobertaTokenizer", add_prefix_space=True)
        assert load_tokenizer(tmp_path).encode("w") == [vocab_of(MERGES)["Ġw"]]

    def test_vocab_txt_of_bert_is_wordpiece(self, tmp_path: Path) -> None:
        vocab = json.loads(read_golden("wordpiece").definition)["model"]["vocab"]
        words = sorted(vocab, key=vocab.__getitem__)
        (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        write_settings(tmp_path, tokenizer_class="BertTokenizerFast")
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.special_tokens == read_golden("wordpiece").special_tokens
        for row in golden_rows("wordpiece"):
            assert tokenizer.encode(row["text"], allowed_special="all") == row["ids"]
            assert tokenizer.decode(row["ids"]) == row["decoded"]
        write_settings(tmp_path, tokenizer_class="BertTokenizer", do_lower_case=False)
        assert load_tokenizer(tmp_path).encode("A") == [vocab["[UNK]"]]

    def test_tokenizer_json_takes_precedence(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, tokenizer_class="T5Tokenizer")
        shutil.copy(FOLDERS / "unigram" / "tokenizer.json", tmp_path)
        assert load_tokenizer(tmp_path) == read_golden("unigram")

    @pytest.mark.parametrize("kind", [None, "GPT2Tokenizer", "GPT2TokenizerFast"])
    def test_a_folder_without_a_tokenizer_may_need_that_of_gpt2(
        self, tmp_path: Path, kind: str | None
    ) -> None:
        write_settings(tmp_path, "config.json", model_type="gpt2")
        assert read_tokenizer(tmp_path) is None
        write_settings(tmp_path, tokenizer_class=kind)
        assert read_tokenizer(tmp_path) is None

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
    @pytest.mark.parametrize("kind", ["T5Tokenizer", "BertTokenizer", "RobertaTokenizer"])
    def test_a_folder_that_names_another_kind_of_tokenizer_raises_an_error(
        self, tmp_path: Path, name: str, kind: str
    ) -> None:
        write_settings(tmp_path, name, tokenizer_class=kind)
        message = rf"{name}: the model needs a {kind}, which cannot be read without a tokenizer\.js"
        with pytest.raises(ValueError, match=message + r".*save_pretrained\("):
            read_tokenizer(tmp_path)

    def test_vocab_json_of_another_kind_is_not_read_as_gpt2s(self, tmp_path: Path) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, tokenizer_class="CLIPTokenizer")
        with pytest.raises(ValueError, match="the model needs a CLIPTokenizer"):
            read_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        "name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"]
    )
    def test_a_folder_with_only_files_of_another_kind_raises_an_error(
        self, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name}: this is another kind of tokenizer"):
            read_tokenizer(tmp_path)

    @pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
    def test_both_vocab_json_and_merges_txt_are_required(
        self, tmp_path: Path, missing: str
    ) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / missing).unlink()
        with pytest.raises(ValueError, match=f"{missing} is missing; .* cannot be read without"):
            read_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("vocab", "merges", "message"),
        [
            (vocab_of(MERGES), [*MERGES, ("o", "o")], "`oo` out of vocabulary"),
            (vocab_of([]) | {"<pad>": "x"}, [], "token '<pad>' has id 'x'; expected a nonneg"),
            (vocab_of([]) | {"<pad>": -1}, [], "token '<pad>' has id -1"),
            (vocab_of([]) | {"a": None}, [], "token 'a' has id None"),
            (vocab_of([]) | {"<pad>": 5}, [], r"id 5 belongs to \['%', '<pad>'\]; expected one"),
            (vocab_of([]), [("a", "")], "cannot read this tokenizer: .*`` out of vocabulary"),
            (vocab_of([]), [("a", "b c")], "cannot read this tokenizer: "),
            (vocab_of(MERGES), MERGES[:-1], r"token 'Ã©' \(id 263\) is made by no merge"),
            ([1, 2], [], "found a JSON list; expected an object"),
        ],
    )
    def test_an_inconsistent_vocabulary_raises_an_error_with_its_file(
        self, tmp_path: Path, vocab: Any, merges: list[tuple[str, str]], message: str
    ) -> None:
        write_pair(tmp_path, vocab, merges)
        with pytest.raises(ValueError, match=message) as caught:
            read_tokenizer(tmp_path)
        assert str(tmp_path / "vocab.json") in str(caught.value)

    @pytest.mark.parametrize("added", [{"<|endoftext|>": 999}, {"<b>": 999}, {"<b>": 3}])
    def test_an_added_token_with_another_id_raises_an_error(
        self, tmp_path: Path, added: dict[str, int]
    ) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        write_settings(tmp_path, "added_tokens.json", **added)
        ((token, id),) = added.items()
        message = f"added token '{re.escape(token)}' has id {id}, but the library gives it"
        with pytest.raises(ValueError, match=message):
            read_tokenizer(tmp_path)

    def test_an_added_token_in_tokenizer_json_with_another_id_raises_an_error(self) -> None:
        added = json.loads(read_golden("byte-level-added").definition)["added_tokens"]
        added[-1]["id"] = 600
        with pytest.raises(ValueError, match=r"'<\|bot\|>' has id 600, but .* gives it 502"):
            edited("byte-level-added", added_tokens=added)

    @pytest.mark.parametrize(
        "name",
        ["tokenizer.json", "vocab.json", "flaxgpt_tokenizer.json", "tokenizer_config.json"],
    )
    @pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"null", b"\xff"], ids=repr)
    def test_a_damaged_file_is_named(self, tmp_path: Path, name: str, contents: bytes) -> None:
        write_pair(tmp_path, vocab_of(MERGES), MERGES)
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError) as caught:
            read_tokenizer(tmp_path)
        assert str(tmp_path / name) in str(caught.value)

    @pytest.mark.parametrize("name", [*NAMES, "flaxgpt"])
    @hypothesis.given(data=st.data())
    def test_a_damaged_file_is_read_or_rejected_but_never_crashes(
        self, name: str, data: st.DataObject
    ) -> None:
        junk = st.sampled_from([None, True, -1, 0, 1.5, "x", "", [], [None], {}, {"type": 1}])
        if name == "flaxgpt":
            file = "flaxgpt_tokenizer.json"
            contents = tokenizer_recipe(bytes_only({"<s>": 256}))
        else:
            file, contents = "tokenizer.json", json.loads(read_golden(name).definition)
        node: Any = contents
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys), label="key")
            if not node[key] or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = data.draw(junk, label="value")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            path.write_text(json.dumps(contents), encoding="utf-8")
            try:
                tokenizer = read_tokenizer(Path(folder))
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert tokenizer is not None
                with contextlib.suppress(ValueError):
                    tokenizer.decode(tokenizer.encode("Hello </s> [PAD]"))


class TestSavedTokenizers:
    def test_gpt2_is_saved_as_its_name(self, gpt2: BPETokenizer, tmp_path: Path) -> None:
        save_tokenizer(gpt2, tmp_path)
        saved = json.loads((tmp_path / "flaxgpt_tokenizer.json").read_text(encoding="utf-8"))
        assert saved == {"kind": "gpt2"}
        assert read_tokenizer(tmp_path) is gpt2

    def test_a_character_tokenizer_is_restored(self, tmp_path: Path) -> None:
        tokenizer = CharTokenizer('zé\n"\\\x00👍a\u2028')
        save_tokenizer(tokenizer, tmp_path)
        assert read_tokenizer(tmp_path) == tokenizer

    def test_any_other_byte_level_vocabulary_is_restored(self, tmp_path: Path) -> None:
        ranks = bytes_only({}).ranks | {b"he": 300, b"hello": 301}
        tokenizer = BPETokenizer(r"\w+|\W", ranks, {"<s>": 256})
        save_tokenizer(tokenizer, tmp_path / "new" / "folder")
        again = read_tokenizer(tmp_path / "new" / "folder")
        assert isinstance(again, BPETokenizer)
        assert again.ranks == tokenizer.ranks
        assert again.pattern == tokenizer.pattern
        assert again.special_tokens == tokenizer.special_tokens
        assert again.encode("hello wé") == tokenizer.encode("hello wé")

    @GOLDEN
    def test_a_hugging_face_tokenizer_is_restored(self, tmp_path: Path, name: str) -> None:
        tokenizer = read_golden(name)
        save_tokenizer(tokenizer, tmp_path)
        definition = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
        assert definition == (FOLDERS / name / "tokenizer.json").read_text(encoding="utf-8")
        again = read_tokenizer(tmp_path)
        assert again == tokenizer
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)

    def test_a_hugging_face_tokenizer_replaces_an_earlier_file(self, tmp_path: Path) -> None:
        save_tokenizer(CharTokenizer("ab"), tmp_path)
        save_tokenizer(read_golden("unigram"), tmp_path)
        assert read_tokenizer(tmp_path) == read_golden("unigram")

    def test_fingerprints_depend_on_the_definition_alone(self) -> None:
        definition = read_golden("unigram").definition
        same = HuggingFaceTokenizer(json.dumps(json.loads(definition), indent=1))
        other = HuggingFaceTokenizer(definition.replace("-3.531268917718899", "-3.5"))
        assert tokenizer_recipe(same)["kind"] == "huggingface"
        expected = tokenizer_fingerprint(read_golden("unigram"))
        assert tokenizer_fingerprint(same) == expected != tokenizer_fingerprint(other)

    def test_gpt2_with_another_special_token_is_not_saved_as_gpt2(
        self, gpt2: BPETokenizer, tmp_path: Path
    ) -> None:
        special_tokens = gpt2.special_tokens | {"<pad>": 50257}
        save_tokenizer(BPETokenizer(gpt2.pattern, gpt2.ranks, special_tokens), tmp_path)
        again = read_tokenizer(tmp_path)
        assert again is not None
        assert again.encode("Hello<pad>", allowed_special="all") == [15496, 50257]

    def test_the_file_of_flaxgpt_takes_precedence(self, tmp_path: Path) -> None:
        save_tokenizer(read_golden("unigram"), tmp_path)
        save_tokenizer(CharTokenizer("ab"), tmp_path)
        assert read_tokenizer(tmp_path) == CharTokenizer("ab")

    def test_a_failed_save_leaves_only_the_old_file(
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

    def test_a_tokenizer_of_another_type_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="type Encoding cannot be stored; expected one that"):
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
    def test_an_invalid_file_raises_an_error_with_its_name(
        self, tmp_path: Path, recipe: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "flaxgpt_tokenizer.json"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            read_tokenizer(tmp_path)
        assert str(path) in str(caught.value)
