"""Training data: text files to ids to batches."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flaxgpt.data import (
    TokenFile,
    batches,
    check_same_source,
    corpus,
    count_windows,
    documents,
    evaluation_windows,
    read_ids,
    scan_texts,
    write_ids,
)
from flaxgpt.data.token_file import encode_range
from flaxgpt.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from flaxgpt.tokenizer.folder import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parent.parent
VERDICT = ROOT / "tests" / "data" / "verdict" / "the-verdict.txt"
SHARED = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
SHAKESPEARE = SHARED / "data" / "shakespeare" / "input.txt"

# GPT-2's pattern distinguishes contractions, digits, symbols and several kinds of white space.
# Python considers \x1c white space, but tiktoken does not.
FRAGMENTS = ["I", "they'll've", "'s", "'", "42", "...", "é", "汉字", "👩‍👩‍👧", "<|endoftext|>"]
FRAGMENTS += [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join) | st.text(max_size=30)
chunked_texts = st.lists(texts, max_size=8)


TOKENIZERS = ROOT / "tests" / "golden" / "tokenizers"


def llama_like() -> HuggingFaceTokenizer:
    """Return a tokenizer that puts a space before any text, even before another space."""
    definition = json.loads((TOKENIZERS / "unigram" / "tokenizer.json").read_text(encoding="utf-8"))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, space]
    definition |= {"normalizer": {"type": "Sequence", "normalizers": steps}}
    definition |= {"pre_tokenizer": None}
    tokenizer = HuggingFaceTokenizer(json.dumps(definition))
    assert tokenizer.encode(" the")[0] == tokenizer.encode("▁")[0]
    return tokenizer


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that Hypothesis writes repeatedly."""
    return tmp_path_factory.mktemp("data")


def change(path: Path, **changes: Any) -> None:
    """Change entries of the description of an array; None removes one."""
    path = path.with_suffix(".json")
    description = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in description.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def text_files(folder: Path, *contents: str | bytes) -> list[Path]:
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


def token_file(
    paths: Sequence[Path], tokenizer: Tokenizer, start: int = 0, stop: int | None = None
) -> TokenFile:
    path = paths[0].with_name("a.npy")
    write_ids(path, scan_texts(paths), tokenizer, start=start, stop=stop)
    return read_ids(path)


def encoded(
    paths: Sequence[Path], tokenizer: Tokenizer, start: int = 0, stop: int | None = None
) -> list[int]:
    source = scan_texts(paths)
    stop = source.n_characters if stop is None else stop
    return [id for ids in encode_range(source, tokenizer, start, stop) for id in ids]


class TestScanningTexts:
    def test_returns_size_hash_and_characters(self, tmp_path: Path) -> None:
        text = "naïve 👍\r\n"
        found = scan_texts(text_files(tmp_path, text))
        assert found.n_bytes == 13 and found.n_characters == 9
        assert found.alphabet == "\n\r aenvï👍".replace("n", "", 0)
        assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()

    def test_concatenates_several_files(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "ab", "bcd")
        found = scan_texts(paths)
        assert found.n_bytes == found.n_characters == 5 and found.alphabet == "abcd"
        assert [(file.path, file.n_bytes) for file in found.files] == [(paths[0], 2), (paths[1], 3)]

    def test_the_hash_of_several_files_depends_on_their_boundaries(self, tmp_path: Path) -> None:
        assert scan_texts(text_files(tmp_path, "ab", "c")) != scan_texts(
            text_files(tmp_path, "a", "bc")
        )
        first = scan_texts(text_files(tmp_path, "ab", "c")).sha256
        assert scan_texts(text_files(tmp_path, "a", "bc")).sha256 != first
        assert scan_texts(text_files(tmp_path, "ab", "c")).sha256 == first

    def test_reports_progress_in_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(documents, "_BLOCK", 4)
        seen: list[tuple[int, int]] = []
        scan_texts(text_files(tmp_path, "abcdef", "é"), progress=lambda *pair: seen.append(pair))
        assert seen == [(4, 8), (6, 8), (8, 8)]

    @hypothesis.given(st.binary(max_size=20) | st.text(max_size=9).map(str.encode), st.integers(1))
    def test_replaces_invalid_bytes_as_python_does_for_the_whole_file(
        self, folder: Path, content: bytes, block: int
    ) -> None:
        # A byte-order mark is not text, and other forms of files are recognized by their start.
        hypothesis.assume(
            not content.startswith((*documents._FOREIGN, b"\x1f\x8b", b"\xef\xbb\xbf"))
        )
        (path,) = text_files(folder, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "_BLOCK", block % 7 + 1)
            with documents.open_hashed(path) as file:
                read = list(documents.read_documents(file, "replace", "text", ""))
            text = "".join(text for (text,) in read)
        assert text == content.decode(errors="replace")

    @pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"caf\xe9 noir", r"0\.txt is not UTF-8: byte 0xe9 at position 3 \(invalid continua"),
            (b"abc \xf0\x9f\x91", r"byte 0xf0 at position 4 \(unexpected end of data\)"),
            ("é" * 4 + "\udcff", r"byte 0xff at position 8 \(invalid start byte\)"),
        ],
    )
    def test_names_the_first_byte_that_is_not_utf8_and_the_remedy(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        content: bytes | str,
        message: str,
        block: int,
    ) -> None:
        monkeypatch.setattr(documents, "_BLOCK", block)
        raw = content.encode(errors="surrogateescape") if isinstance(content, str) else content
        with pytest.raises(ValueError, match=message + r".*; save .* --errors replace"):
            scan_texts(text_files(tmp_path, raw))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist; pass the path"):
            scan_texts([*text_files(tmp_path, "a"), tmp_path / "nowhere.txt"])

    def test_a_folder_without_files_raises_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"{tmp_path} is a folder without text files"):
            scan_texts([tmp_path])

    def test_an_empty_file_raises_an_error_before_any_file_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"1\.txt is empty; pass a file that contains text"):
            scan_texts(text_files(tmp_path, b"\xff", ""))

    def test_a_pipe_raises_an_error(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match=r"pipe is a pipe or device, .* pass a file"):
            scan_texts([tmp_path / "pipe"])

    def test_paths_must_be_a_nonempty_list(self) -> None:
        with pytest.raises(
            ValueError, match=r"paths must be a list; for one file, pass \['a\.txt'\]"
        ):
            scan_texts("a.txt")
        with pytest.raises(ValueError, match="paths is empty"):
            scan_texts([])

    def test_an_unknown_value_of_errors_raises_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match="errors='ignore' is not valid; expected 'strict' or 'replace'"
        ):
            scan_texts(text_files(tmp_path, "a"), errors="ignore")  # type: ignore[arg-type]


class TestPieces:
    @hypothesis.settings(max_examples=300)
    @hypothesis.given(chunked_texts)
    def test_have_the_ids_of_the_whole_text_with_gpt2(
        self, gpt2: BPETokenizer, chunks: list[str]
    ) -> None:
        pieces = list(corpus.pieces(chunks))
        assert "".join(pieces) == "".join(chunks)
        assert [id for piece in pieces for id in gpt2.encode(piece)] == gpt2.encode("".join(chunks))

    # cl100k_base's pattern (tiktoken_ext/openai_public.py) puts newlines with what precedes them.
    @hypothesis.given(chunked_texts)
    def test_have_the_ids_of_the_whole_text_with_later_patterns(self, chunks: list[str]) -> None:
        later = BPETokenizer(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
            {bytes([byte]): byte for byte in range(256)} | {b".\n": 256, b" w": 257, b"\n\n": 258},
            {},
        )
        chunks = [f"v w{chunk}" for chunk in chunks]
        ids = [id for piece in corpus.pieces(chunks) for id in later.encode(piece)]
        assert ids == later.encode("".join(chunks))

    def test_end_before_the_last_single_space(self) -> None:
        assert list(corpus.pieces(["one two. \nth", "ree four\nfive"])) == [
            "one",
            " two. \nthree",
            " four\nfive",
        ]

    def test_end_before_other_white_space_if_there_is_no_single_space(self) -> None:
        assert list(corpus.pieces(["汉字\r\n\r\n仮", "名"])) == ["汉字", "\r\n\r\n仮名"]

    def test_never_end_within_white_space(self) -> None:
        assert list(corpus.pieces(["a", " ", " ", "\n", " b"])) == ["a", "  \n b"]

    def test_never_end_before_white_space_that_only_python_recognizes(self) -> None:
        assert list(corpus.pieces(["a\x1c", "b"])) == ["a\x1cb"]

    def test_end_after_a_maximum_length_without_white_space(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus, "_LONGEST", 10)
        assert list(corpus.pieces(["abcd"] * 4)) == ["abcdabcdabcd", "abcd"]


class TestWritingIds:
    @pytest.mark.parametrize("block", [1, 7, 100, 4096, 2**20])
    def test_ids_do_not_depend_on_the_block_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: BPETokenizer, block: int
    ) -> None:
        text = VERDICT.read_bytes().decode()[:5000] + "👍é\r\n \x00" * 3
        monkeypatch.setattr(documents, "_BLOCK", block)
        assert token_file(text_files(tmp_path, text), gpt2).ids.tolist() == gpt2.encode(text)

    @hypothesis.given(st.text(min_size=1), st.data())
    def test_encodes_any_range_of_characters(
        self, folder: Path, gpt2: BPETokenizer, text: str, data: st.DataObject
    ) -> None:
        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, len(text)))
        ids = encoded(text_files(folder, text), gpt2, start, stop)
        assert ids == gpt2.encode(text[start:stop])

    @hypothesis.given(st.lists(st.text("ab \n", min_size=1), min_size=1, max_size=4), st.data())
    def test_encodes_a_range_across_files_without_an_end_of_text_token(
        self, folder: Path, contents: list[str], data: st.DataObject
    ) -> None:
        text = "".join(contents)
        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, len(text)))
        ids = encoded(text_files(folder, *contents), CharTokenizer("\n ab"), start, stop)
        assert ids == CharTokenizer("\n ab").encode(text[start:stop])

    @hypothesis.given(st.lists(texts.filter(len), min_size=1, max_size=4))
    def test_puts_end_of_text_between_files_and_nowhere_else(
        self, folder: Path, gpt2: BPETokenizer, contents: list[str]
    ) -> None:
        contents = [content.replace("<|endoftext|>", "") or "-" for content in contents]
        whole = gpt2.encode("<|endoftext|>".join(contents), allowed_special="all")
        assert encoded(text_files(folder, *contents), gpt2) == whole

    @pytest.mark.parametrize(("start", "stop"), [(0, 3), (3, 6), (1, 2), (3, 4)])
    def test_puts_no_end_of_text_at_the_edges_of_a_range(
        self, tmp_path: Path, gpt2: BPETokenizer, start: int, stop: int
    ) -> None:
        ids = encoded(text_files(tmp_path, "one", "two"), gpt2, start, stop)
        assert ids == gpt2.encode("onetwo"[start:stop])

    def test_end_of_text_within_a_file_is_ordinary_text(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        ids = encoded(text_files(tmp_path, "a<|endoftext|>b"), gpt2)
        assert ids == gpt2.encode("a<|endoftext|>b") and 50256 not in ids

    def test_concatenates_files_if_there_is_no_end_of_text_token(self, tmp_path: Path) -> None:
        bytewise: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
        tokenizer = BPETokenizer(r"\S+|\s+", bytewise | {b"ab": 256}, {})
        assert encoded(text_files(tmp_path, "a", "b"), tokenizer) == [256]

    @pytest.mark.parametrize("name", ["byte-level-added", "unigram", "wordpiece", "llama"])
    def test_ids_do_not_depend_on_the_block_size_for_hugging_face_tokenizers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        text = VERDICT.read_bytes().decode()[:3000]
        tokenizer = llama_like() if name == "llama" else load_tokenizer(TOKENIZERS / name)
        monkeypatch.setattr(documents, "_BLOCK", 50)
        tokens = token_file(text_files(tmp_path, text), tokenizer)
        assert tokens.ids.tolist() == tokenizer.encode(text)
        assert tokens.tokenizer == "huggingface"
        assert tokens.fingerprint == tokenizer_fingerprint(tokenizer)

    def test_replaces_invalid_bytes_if_the_scan_did(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        source = scan_texts(text_files(tmp_path, b"caf\xe9"), errors="replace")
        write_ids(tmp_path / "a.npy", source, gpt2)
        assert read_ids(tmp_path / "a.npy").ids.tolist() == gpt2.encode("caf\ufffd")

    def test_uses_16_bits_per_id_if_the_vocabulary_fits_and_else_32(self, tmp_path: Path) -> None:
        characters = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10801))))
        for size, dtype in ((2**16, "<u2"), (2**16 + 1, "<u4")):
            text = characters[:size]
            ids = token_file(text_files(tmp_path, text), CharTokenizer(text)).ids
            assert ids.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(ids, np.arange(size))

    def test_writes_an_array_and_a_description(self, tmp_path: Path) -> None:
        tokens = token_file(text_files(tmp_path, "abba"), CharTokenizer("ab"))
        assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 1, 0]
        assert tokens.ids.offset % 64 == 0  # type: ignore[attr-defined]
        description = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert (description["version"], description["dtype"], description["count"]) == (1, "<u2", 4)

    def test_requires_a_name_that_ends_in_npy(self, tmp_path: Path) -> None:
        source = scan_texts(text_files(tmp_path, "ab"))
        with pytest.raises(ValueError, match=r"a\.ids is not a valid name .* expected one in"):
            write_ids(tmp_path / "a.ids", source, CharTokenizer("ab"))

    @pytest.mark.parametrize("renamed", ["a.json", "a.npy"])
    def test_a_crash_leaves_no_array_without_its_description(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: str
    ) -> None:
        class Crash(BaseException): ...

        def crash(source: Path, target: Path) -> None:
            if target.name == renamed:
                raise Crash
            os.rename(source, target)

        source = scan_texts(text_files(tmp_path, "ab"))
        write_ids(tmp_path / "a.npy", source, CharTokenizer("ab"))
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(Crash):
            write_ids(tmp_path / "a.npy", source, CharTokenizer("ba"))
        assert not (tmp_path / "a.npy").exists()
        monkeypatch.undo()
        write_ids(tmp_path / "a.npy", source, CharTokenizer("ba"))
        assert read_ids(tmp_path / "a.npy").ids.tolist() == [1, 0]

    def test_ids_that_do_not_read_back_get_no_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_, **__: np.zeros(9, "<u2"))
        with pytest.raises(ValueError, match=r"is damaged: it has shape \(9,\) .* expected 2 ids"):
            token_file(text_files(tmp_path, "ab"), CharTokenizer("ab"))
        assert os.listdir(tmp_path) == ["0.txt"]

    def test_describes_where_the_ids_come_from(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "abc", "cba")
        ids = token_file(paths, CharTokenizer("abc"), 1, 5)
        assert (ids.vocab_size, ids.tokenizer, ids.start, ids.stop) == (3, "characters", 1, 5)
        assert ids.files == ("0.txt", "1.txt") and str(tmp_path) not in (
            tmp_path / "a.json"
        ).read_text(encoding="utf-8")
        assert ids.sha256 == scan_texts(paths).sha256
        assert ids.fingerprint == tokenizer_fingerprint(CharTokenizer("abc"))

    def test_fingerprints_differ_between_tokenizers(self) -> None:
        ranks = {bytes([byte]): byte for byte in range(256)}
        tokenizer = BPETokenizer(r"\w+|\W+", ranks, {})
        same = BPETokenizer(r"\w+|\W+", dict(reversed(ranks.items())), {})
        others = [
            BPETokenizer(r"\w+|\W", ranks, {}),
            BPETokenizer(r"\w+|\W+", ranks | {b"ab": 256}, {}),
            BPETokenizer(r"\w+|\W+", ranks, {"<|endoftext|>": 256}),
            CharTokenizer("ab"),
            CharTokenizer("ba"),
        ]
        assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
        assert len({tokenizer_fingerprint(one) for one in [tokenizer, *others]}) == 6

    def test_reports_progress_in_characters_of_the_range(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(documents, "_BLOCK", 4)
        seen: list[tuple[int, int]] = []
        source = scan_texts(text_files(tmp_path, "a b a b a"))
        write_ids(
            tmp_path / "a.npy",
            source,
            CharTokenizer(" ab"),
            start=1,
            progress=lambda *pair: seen.append(pair),
        )
        assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]

    def test_creates_the_folder_and_leaves_no_other_files(self, tmp_path: Path) -> None:
        source = scan_texts(text_files(tmp_path, "ab"))
        write_ids(tmp_path / "run" / "data" / "train.npy", source, CharTokenizer("ab"))
        assert sorted(os.listdir(tmp_path / "run" / "data")) == ["train.json", "train.npy"]

    def test_rejects_unknown_characters_before_it_writes(self, tmp_path: Path) -> None:
        message = r"2 characters of the text are not among the tokenizer's 2: 'c' \(U\+0063\), 'é'"
        with pytest.raises(ValueError, match=message):
            token_file(text_files(tmp_path, "abécé"), CharTokenizer("ab"))
        assert os.listdir(tmp_path) == ["0.txt"]

    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 2), (-1, 2), (0, 5), (3, 1)])
    def test_rejects_an_empty_range_and_one_beyond_the_text(
        self, tmp_path: Path, start: int, stop: int
    ) -> None:
        message = f"start={start} and stop={stop} are not a valid range; .* the text's 4 characters"
        with pytest.raises(ValueError, match=message):
            token_file(text_files(tmp_path, "abab"), CharTokenizer("ab"), start, stop)

    def test_names_the_characters_that_cannot_be_split_into_words(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        text = "one two" + " " * 1_000_000 + "x"
        with pytest.raises(ValueError, match=r"characters 3 to 1000008 of the text: .*shorten"):
            token_file(text_files(tmp_path, text), gpt2)

    def test_rejects_text_without_any_ids(self, tmp_path: Path) -> None:
        blind = BPETokenizer(r"\p{N}", {bytes([byte]): byte for byte in range(256)}, {})
        with pytest.raises(ValueError, match="characters 0 to 3 encode to no ids"):
            token_file(text_files(tmp_path, "abc"), blind)

    @pytest.mark.parametrize("now", ["abab", "abababababab", "éébbbb"])
    def test_notices_that_a_file_has_changed(self, tmp_path: Path, now: str) -> None:
        (path,) = text_files(tmp_path, "abababab")
        source = scan_texts([path])
        write_ids(tmp_path / "a.npy", source, CharTokenizer("abé"))
        before = (tmp_path / "a.npy").read_bytes()
        path.write_text(now, encoding="utf-8")
        with pytest.raises(ValueError, match=r"0\.txt has changed since it was scanned"):
            write_ids(tmp_path / "a.npy", source, CharTokenizer("abé"))
        assert (tmp_path / "a.npy").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.json", "a.npy"]

    def test_names_a_text_file_that_has_disappeared(self, tmp_path: Path) -> None:
        (path,) = text_files(tmp_path, "ab")
        source = scan_texts([path])
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"0\.txt") as caught:
            write_ids(tmp_path / "a.npy", source, CharTokenizer("ab"))
        assert "cannot be written" not in str(caught.value)
        assert os.listdir(tmp_path) == []

    def test_does_not_replace_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.npy").mkdir()
        source = scan_texts(text_files(tmp_path, "ab"))
        with pytest.raises(OSError, match=r"a\.npy cannot be written: Is a directory; choose a"):
            write_ids(tmp_path / "a.npy", source, CharTokenizer("ab"))
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.npy"]

    def test_a_failed_write_leaves_the_old_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        source = scan_texts(text_files(tmp_path, "ab"))
        write_ids(tmp_path / "a.npy", source, CharTokenizer("ab"))
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=r"a\.npy cannot be written: Input/output error; choose"):
            write_ids(tmp_path / "a.npy", source, CharTokenizer("ba"))
        assert read_ids(tmp_path / "a.npy").ids.tolist() == [0, 1]
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.json", "a.npy"]

    def test_a_full_disk_raises_an_error_and_nothing_remains(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system to fill cannot be mounted here: {error}")
        try:
            source = scan_texts(text_files(tmp_path, "ab" * 50_000))
            message = r"a\.npy cannot be written: No space left on device; free some space there"
            with pytest.raises(OSError, match=message) as caught:
                write_ids(disk / "a.npy", source, CharTokenizer("ab"))
            assert caught.value.errno == errno.ENOSPC
            assert os.listdir(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


# The counts printed by nanoGPT (karpathy/nanoGPT, data/shakespeare and data/shakespeare_char).
@pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason=f"{SHAKESPEARE} is missing; FLAXGPT_SHARED is the folder that has data/",
)
@pytest.mark.parametrize(
    ("kind", "train", "val"), [("gpt2", 301_966, 36_059), ("characters", 1_003_854, 111_540)]
)
def test_shakespeare_has_as_many_ids_as_in_nanogpt(
    tmp_path: Path, gpt2: BPETokenizer, kind: str, train: int, val: int
) -> None:
    source = scan_texts([SHAKESPEARE])
    tokenizer = gpt2 if kind == "gpt2" else CharTokenizer(source.alphabet)
    assert len(source.alphabet) == 65
    middle = int(0.9 * source.n_characters)
    write_ids(tmp_path / "train.npy", source, tokenizer, stop=middle)
    write_ids(tmp_path / "val.npy", source, tokenizer, start=middle)
    assert len(read_ids(tmp_path / "train.npy").ids) == train
    assert len(read_ids(tmp_path / "val.npy").ids) == val


# Print by how many MiB tokenizing raises the peak memory of the process, and the number of ids.
FRUGAL = """
import resource, sys
from flaxgpt.data import read_ids, scan_texts, write_ids
from flaxgpt.tokenizer import CharTokenizer, load_tokenizer

def peak():
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

text, target, kind = sys.argv[1:]
tokenizer = load_tokenizer("gpt2") if kind == "gpt2" else CharTokenizer("\\n ,abcdehlorw")
tokenizer.encode("hello world")
before = peak()
source = scan_texts([text])
write_ids(target, source, tokenizer, stop=int(0.9 * source.n_characters))
print(peak() - before, len(read_ids(target).ids))
"""


def extra_memory(folder: Path, line: str, megabytes: int, kind: str) -> tuple[float, int]:
    block = line * (10**6 // len(line.encode()))
    with (folder / "big.txt").open("w", encoding="utf-8") as file:
        for _ in range(megabytes):
            file.write(block)
    output = subprocess.run(
        [sys.executable, "-c", FRUGAL, folder / "big.txt", folder / "big.npy", kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return float(output[0]), int(output[1])


@pytest.mark.slow
def test_a_text_need_not_fit_in_memory(tmp_path: Path) -> None:
    extra, count = extra_memory(tmp_path, "hello world, or a bold bear cowered\n", 16, "characters")
    assert count > 14 * 10**6
    assert extra < 150  # at once, it would be 16 for text, 110 for ids, 28 for the array


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["hello world\n", "👩‍👩‍👧é汉字"]
)  # words, and a text without white space
def test_a_large_text_takes_no_more_memory_than_a_small_one(tmp_path: Path, line: str) -> None:
    extra, count = extra_memory(tmp_path, line, 128, "gpt2")
    assert count > 20 * 10**6
    assert extra < 200


class TestReadingIds:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return token_file(text_files(tmp_path, "ab" * 100), CharTokenizer("ab")).path

    def test_ids_are_a_read_only_memory_map(self, path: Path) -> None:
        ids = read_ids(str(path)).ids
        assert isinstance(ids, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"b\.npy does not exist; write_ids creates it"):
            read_ids(tmp_path / "b.npy")

    def test_a_missing_description_is_named(self, path: Path) -> None:
        path.with_suffix(".json").unlink()
        with pytest.raises(
            ValueError, match=r"a\.npy has no a\.json beside it.*; delete it and to"
        ):
            read_ids(path)

    @pytest.mark.parametrize("length", [0, 17, 100, -400, -1])
    def test_a_truncated_file_raises_an_error(self, path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"a\.npy is damaged: .*; delete it and tokenize the"):
            read_ids(path)

    def test_a_file_with_extra_bytes_raises_an_error(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\0\0")
        with pytest.raises(ValueError, match="damaged: it has 530 bytes; expected 528; delete it"):
            read_ids(path)

    @pytest.mark.parametrize("start", [0, 3, 9, 20, 128, 150, 527])
    def test_an_altered_file_raises_an_error(self, path: Path, start: int) -> None:
        contents = bytearray(path.read_bytes())
        contents[start] ^= 5
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"a\.npy is damaged: .*; delete it and tokenize the"):
            read_ids(path)

    def test_the_description_of_another_array_raises_an_error(self, path: Path) -> None:
        description = path.with_suffix(".json").read_bytes()
        other = token_file(text_files(path.parent, "ba" * 100), CharTokenizer("ab"))
        path.with_suffix(".json").write_bytes(description)
        with pytest.raises(ValueError, match=r"its contents are not those that a\.json describes"):
            read_ids(other.path)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros(300, "<u2"), r"it has shape \(300,\) and dtype uint16; expected 200 ids"),
            (np.zeros(200, "<u4"), "dtype uint32; expected 200 ids of uint16"),
            (np.zeros((200, 2), "<u2"), r"shape \(200, 2\)"),
            (np.array([None] * 300), "Python objects"),
        ],
    )
    def test_an_array_of_another_kind_raises_an_error(
        self, path: Path, array: np.ndarray, message: str
    ) -> None:
        np.save(path, array)
        with pytest.raises(ValueError, match=r"a\.npy is damaged: .*" + message):
            read_ids(path)

    def test_another_version_raises_an_error(self, path: Path) -> None:
        change(path, version=2)
        with pytest.raises(ValueError, match=r"a\.json has version 2 of the format, .* version 1"):
            read_ids(path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"count": None},
            {"count": 0},
            {"count": -200},
            {"count": 10**30},
            {"count": "200"},
            {"dtype": "<f2"},
            {"dtype": "|O8"},
            {"dtype": "<u4"},
            {"files": 1.5},
            {"edges_sha256": None},
            {"unknown": 1},
        ],
        ids=repr,
    )
    def test_an_altered_description_raises_an_error(
        self, path: Path, changes: dict[str, Any]
    ) -> None:
        change(path, **changes)
        with pytest.raises(ValueError, match=r"a\.npy is damaged: .*; delete it and tokenize the"):
            read_ids(path)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff"], ids=repr)
    def test_a_damaged_description_raises_an_error(self, path: Path, content: bytes) -> None:
        path.with_suffix(".json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json is damaged: .*; delete a\.npy and tokenize"):
            read_ids(path)

    def test_the_source_is_the_same_if_its_bytes_are(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "ab", "ba")
        ids = token_file(paths, CharTokenizer("ab"))
        moved = [path.rename(path.with_suffix(".text")) for path in paths]
        check_same_source(ids, scan_texts(moved))

    def test_a_changed_source_raises_an_error_with_both_hashes(self, tmp_path: Path) -> None:
        ids = token_file(text_files(tmp_path, "ab"), CharTokenizer("ab"))
        old, new = (hashlib.sha256(text).hexdigest()[:12] for text in (b"ab", b"ba"))
        message = rf"a\.npy was made from .* {old}\.\.\., but .*0\.txt now has {new}\.\.\.; restore"
        with pytest.raises(ValueError, match=message):
            check_same_source(ids, scan_texts(text_files(tmp_path, "ba")))


def take(iterator: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate(list(itertools.islice(iterator, count)))


class TestBatches:
    def test_are_int32_rows_of_context_length_plus_one(self) -> None:
        ids = np.arange(65_000, 65_536, dtype=np.uint16)
        batch = next(batches(ids, length=64, batch_size=4, seed=0))
        assert batch.shape == (4, 65) and batch.dtype == np.int32
        assert (np.diff(batch) == 1).all() and batch.min() >= 65_000

    @hypothesis.given(st.data())
    def test_visit_every_window_once_per_epoch(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(1, 9), "length")
        n_ids = data.draw(st.integers(length + 1, 80), "n_ids")
        windows = count_windows(n_ids, length)
        size = data.draw(st.integers(1, windows), "batch_size")
        seed = data.draw(st.integers(0, 2**40), "seed")
        ids = np.arange(n_ids)
        drawn = take(batches(ids, length=length, batch_size=size, seed=seed), 3 * windows)
        assert (drawn == drawn[:, :1] + np.arange(length + 1)).all()
        for epoch in range(3):
            starts = sorted(drawn[epoch * windows : (epoch + 1) * windows, 0].tolist())
            cuts = [
                [min(i * length + offset, n_ids - length - 1) for i in range(windows)]
                for offset in range(length)
            ]
            assert starts in cuts

    def test_match_the_book_without_shuffle_and_shift(self) -> None:
        ids = np.arange(13)
        plain = batches(ids, length=4, batch_size=2, seed=0, shuffle=False, shift=False)
        assert [batch[:, 0].tolist() for batch in itertools.islice(plain, 3)] == [
            [0, 4],
            [8, 0],  # the end of the epoch, completed from the next
            [4, 8],
        ]

    def test_have_another_order_in_each_epoch(self) -> None:
        drawn = take(batches(np.arange(401), length=4, batch_size=100, seed=0, shift=False), 2)
        first, second = drawn[:100, 0].tolist(), drawn[100:, 0].tolist()
        assert sorted(first) == sorted(second) == list(range(0, 400, 4))
        assert first != second and sorted(first) != first

    def test_cut_the_text_in_other_places_in_each_epoch(self) -> None:
        drawn = batches(np.arange(401), length=4, batch_size=100, seed=0, shuffle=False)
        offsets = [int(batch[0, 0]) for batch in itertools.islice(drawn, 40)]
        assert set(offsets) == {0, 1, 2, 3}

    def test_depend_only_on_the_seed(self) -> None:
        def drawn(seed: int) -> list[int]:
            return take(batches(np.arange(99), length=2, batch_size=5, seed=seed), 9)[:, 0].tolist()

        assert drawn(1) == drawn(1) and drawn(1) != drawn(2)

    def test_do_not_depend_on_the_version_of_numpy(self) -> None:
        drawn = take(batches(np.arange(100), length=8, batch_size=6, seed=123), 3)
        first_epoch = [31, 87, 15, 47, 7, 71, 55, 39, 23, 63, 79, 91]
        assert drawn[:, 0].tolist() == [*first_epoch, 91, 60, 68, 20, 76, 12]

    def test_are_the_same_from_a_file_and_from_memory(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        ids = token_file([*text_files(tmp_path, VERDICT.read_bytes())], gpt2).ids
        mapped = batches(ids, length=32, batch_size=8, seed=5)
        memory = batches(np.array(ids), length=32, batch_size=8, seed=5)
        np.testing.assert_array_equal(take(mapped, 30), take(memory, 30))

    @pytest.mark.parametrize("process_count", [2, 3, 6])
    def test_of_several_processes_concatenate_to_those_of_one(self, process_count: int) -> None:
        ids = np.arange(100)
        whole = batches(ids, length=7, batch_size=6, seed=3)
        shares = [
            batches(
                ids,
                length=7,
                batch_size=6,
                seed=3,
                process_index=index,
                process_count=process_count,
            )
            for index in range(process_count)
        ]
        for batch in itertools.islice(whole, 7):
            np.testing.assert_array_equal(np.concatenate([next(one) for one in shares]), batch)

    def test_resume_in_another_process(self) -> None:
        iterator = batches(np.arange(500), length=3, batch_size=12, seed=9, prefetch=3)
        take(iterator, 17)
        state = json.dumps(iterator.get_state())
        expected = take(iterator, 30)
        program = (
            "import itertools, json, sys, numpy as np; from flaxgpt.data import batches\n"
            "iterator = batches(np.arange(500), length=3, batch_size=12, seed=9)\n"
            "iterator.set_state(json.loads(sys.argv[1]))\n"
            "print(json.dumps(np.concatenate(list(itertools.islice(iterator, 30))).tolist()))"
        )
        output = subprocess.run(
            [sys.executable, "-c", program, state],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        ).stdout
        np.testing.assert_array_equal(json.loads(output), expected)
        iterator.close()

    @pytest.mark.parametrize("prefetch", [0, 1, 4])
    def test_can_be_reset_to_an_earlier_state(self, prefetch: int) -> None:
        iterator = batches(np.arange(500), length=3, batch_size=12, seed=9, prefetch=prefetch)
        beginning = iterator.get_state()
        first = take(iterator, 20)
        iterator.set_state(beginning)
        np.testing.assert_array_equal(take(iterator, 20), first)
        iterator.close()

    def test_need_enough_ids_for_a_window(self) -> None:
        message = r"64 ids do not fill one window; a context of 64 needs 65 .*provide more text"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(64), length=64, batch_size=1, seed=0)

    def test_cannot_exceed_the_data(self) -> None:
        message = "batch_size=3 exceeds the data: 12 ids are 2 windows of 5; choose a smaller batch"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(12), length=4, batch_size=3, seed=0)

    def test_must_be_divisible_among_the_processes(self) -> None:
        message = "batch_size=10 is not a multiple of the 4 processes; choose one such as 12"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(99), length=4, batch_size=10, seed=0, process_count=4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"length": 0}, "length=0"),
            ({"batch_size": 2.5}, r"batch_size=2\.5"),
            ({"seed": -1}, "seed=-1"),
            ({"seed": None}, "seed=None"),
            ({"prefetch": -2}, "prefetch=-2"),
            ({"process_count": 0}, "process_count=0"),
            ({"process_index": 1}, "process_index=1 is out of range; expected 0 to 0"),
            ({"ids": np.zeros((9, 9), int)}, r"ids has shape \(9, 9\) and dtype int64; expected"),
            ({"ids": np.zeros(99)}, r"ids has shape \(99,\) and dtype float64"),
        ],
    )
    def test_reject_an_argument_out_of_range(self, change: dict[str, object], message: str) -> None:
        good = {"ids": np.arange(99), "length": 4, "batch_size": 2, "seed": 0}
        with pytest.raises(ValueError, match=message):
            batches(**good | change)  # type: ignore[arg-type]

    def test_explain_how_to_install_grain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "grain", None)
        with pytest.raises(ImportError, match=r"pip install 'flaxgpt\[train\]'"):
            batches(np.arange(99), length=4, batch_size=2, seed=0)


class TestEvaluationWindows:
    def test_lie_side_by_side_from_the_first_id(self) -> None:
        windows = evaluation_windows(np.arange(12, dtype=np.uint16), 4)
        assert windows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
        assert windows.dtype == np.int32

    def test_are_spread_evenly_if_limited(self) -> None:
        assert evaluation_windows(np.arange(41), 4, limit=5)[:, 0].tolist() == [0, 8, 16, 24, 32]
        assert evaluation_windows(np.arange(41), 4, limit=4)[:, 0].tolist() == [0, 8, 20, 28]

    def test_are_all_returned_if_the_limit_is_higher(self) -> None:
        assert len(evaluation_windows(np.arange(41), 4, limit=99)) == 10

    @hypothesis.given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 500))
    def test_never_repeat_or_exceed_the_ids(self, limit: int, length: int, more: int) -> None:
        windows = evaluation_windows(np.arange(length + 1 + more), length, limit=limit)
        assert len(windows) == min(limit, count_windows(length + 1 + more, length))
        assert (np.diff(windows[:, 0]) >= length).all()

    def test_need_enough_ids_for_a_window(self) -> None:
        with pytest.raises(ValueError, match="4 ids do not fill one window; a context of 4 needs"):
            evaluation_windows(np.arange(4), 4)

    def test_reject_a_limit_of_0(self) -> None:
        with pytest.raises(ValueError, match="limit=0"):
            evaluation_windows(np.arange(9), 4, limit=0)
