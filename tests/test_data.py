"""Text files to a file of ids, and ids to batches."""

import errno
import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flaxgpt.data import (
    IdsFile,
    batches,
    check_same_source,
    corpus,
    count_windows,
    evaluation_windows,
    ids_file,
    read_ids,
    survey,
    write_ids,
)
from flaxgpt.data.ids_file import encode_range, tokenizer_fingerprint
from flaxgpt.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VERDICT = ROOT / "tests" / "data" / "verdict" / "the-verdict.txt"
SHARED = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
SHAKESPEARE = SHARED / "data" / "shakespeare" / "input.txt"

# What GPT-2's pattern treats unlike: contractions, digits, symbols, and white space of every kind
# (\x1c is white space to Python, and none to tiktoken).
FRAGMENTS = ["I", "they'll've", "'s", "'", "42", "...", "é", "汉字", "👩‍👩‍👧", "<|endoftext|>"]
FRAGMENTS += [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join) | st.text(max_size=30)
chunked_texts = st.lists(texts, max_size=8)


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for files that Hypothesis writes over and over."""
    return tmp_path_factory.mktemp("data")


def text_files(folder: Path, *contents: str | bytes) -> list[Path]:
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


def tokenized(
    paths: Sequence[Path], tokenizer: Tokenizer, start: int = 0, stop: int | None = None
) -> IdsFile:
    path = paths[0].with_name("a.ids")
    write_ids(path, survey(paths), tokenizer, start=start, stop=stop)
    return read_ids(path)


def encoded(
    paths: Sequence[Path], tokenizer: Tokenizer, start: int = 0, stop: int | None = None
) -> list[int]:
    source = survey(paths)
    stop = source.n_characters if stop is None else stop
    return [id for ids in encode_range(source, tokenizer, start, stop) for id in ids]


class TestSurvey:
    def test_tells_size_hash_and_characters(self, tmp_path: Path) -> None:
        text = "naïve 👍\r\n"
        found = survey(text_files(tmp_path, text))
        assert found.n_bytes == 13 and found.n_characters == 9
        assert found.alphabet == "\n\r aenvï👍".replace("n", "", 0)
        assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()

    def test_takes_several_files_as_one_text(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "ab", "bcd")
        found = survey(paths)
        assert found.n_bytes == found.n_characters == 5 and found.alphabet == "abcd"
        assert [(file.path, file.n_bytes) for file in found.files] == [(paths[0], 2), (paths[1], 3)]

    def test_the_hash_of_several_files_knows_where_one_ends(self, tmp_path: Path) -> None:
        assert survey(text_files(tmp_path, "ab", "c")) != survey(text_files(tmp_path, "a", "bc"))
        first = survey(text_files(tmp_path, "ab", "c")).sha256
        assert survey(text_files(tmp_path, "a", "bc")).sha256 != first
        assert survey(text_files(tmp_path, "ab", "c")).sha256 == first

    def test_reports_progress_in_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus, "_BLOCK", 4)
        seen: list[tuple[int, int]] = []
        survey(text_files(tmp_path, "abcdef", "é"), progress=lambda *pair: seen.append(pair))
        assert seen == [(4, 8), (6, 8), (8, 8)]

    @hypothesis.given(st.binary(max_size=20) | st.text(max_size=9).map(str.encode), st.integers(1))
    def test_replaces_what_is_not_utf8_as_python_does_for_the_whole_file(
        self, folder: Path, content: bytes, block: int
    ) -> None:
        (path,) = text_files(folder, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "_BLOCK", block % 7 + 1)
            text = "".join(text for _, text in corpus.read_blocks(path, "replace"))
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
    def test_names_the_byte_that_is_not_utf8_and_the_way_out(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        content: bytes | str,
        message: str,
        block: int,
    ) -> None:
        monkeypatch.setattr(corpus, "_BLOCK", block)
        raw = content.encode(errors="surrogateescape") if isinstance(content, str) else content
        with pytest.raises(ValueError, match=message + r".*; save .* --errors replace"):
            survey(text_files(tmp_path, raw))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist; give the path"):
            survey([*text_files(tmp_path, "a"), tmp_path / "nowhere.txt"])

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"{tmp_path} is a folder; give the files"):
            survey([tmp_path])

    def test_an_empty_file_is_refused_before_any_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"1\.txt is empty; give a file that holds text"):
            survey(text_files(tmp_path, b"\xff", ""))

    def test_a_pipe_is_refused_as_it_cannot_be_read_twice(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match=r"pipe is a pipe or device, .* use a file"):
            survey([tmp_path / "pipe"])

    def test_a_path_alone_is_told_from_a_list_of_paths(self) -> None:
        with pytest.raises(ValueError, match=r"paths must be .*: for one, \['a\.txt'\]"):
            survey("a.txt")
        with pytest.raises(ValueError, match="paths is empty"):
            survey([])

    def test_an_unknown_way_with_errors_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="errors='ignore' must be 'strict' or 'replace'"):
            survey(text_files(tmp_path, "a"), errors="ignore")  # type: ignore[arg-type]


class TestPieces:
    @hypothesis.settings(max_examples=300)
    @hypothesis.given(chunked_texts)
    def test_encoded_one_by_one_give_the_ids_of_the_whole(
        self, gpt2: BPETokenizer, chunks: list[str]
    ) -> None:
        pieces = list(corpus.pieces(chunks))
        assert "".join(pieces) == "".join(chunks)
        assert [id for piece in pieces for id in gpt2.encode(piece)] == gpt2.encode("".join(chunks))

    # cl100k_base's pattern (tiktoken_ext/openai_public.py), which joins newlines to what precedes.
    @hypothesis.given(chunked_texts)
    def test_of_text_with_lone_spaces_do_so_for_later_patterns_too(self, chunks: list[str]) -> None:
        later = BPETokenizer(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
            {bytes([byte]): byte for byte in range(256)} | {b".\n": 256, b" w": 257, b"\n\n": 258},
            {},
        )
        chunks = [f"v w{chunk}" for chunk in chunks]
        ids = [id for piece in corpus.pieces(chunks) for id in later.encode(piece)]
        assert ids == later.encode("".join(chunks))

    def test_end_before_the_last_lone_space_seen(self) -> None:
        assert list(corpus.pieces(["one two. \nth", "ree four\nfive"])) == [
            "one",
            " two. \nthree",
            " four\nfive",
        ]

    def test_end_before_other_white_space_where_there_is_no_lone_space(self) -> None:
        assert list(corpus.pieces(["汉字\r\n\r\n仮", "名"])) == ["汉字", "\r\n\r\n仮名"]

    def test_never_end_within_white_space(self) -> None:
        assert list(corpus.pieces(["a", " ", " ", "\n", " b"])) == ["a", "  \n b"]

    def test_never_end_before_what_python_alone_takes_for_white_space(self) -> None:
        assert list(corpus.pieces(["a\x1c", "b"])) == ["a\x1cb"]

    def test_end_anyhow_after_too_long_without_white_space(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus, "_LONGEST", 10)
        assert list(corpus.pieces(["abcd"] * 4)) == ["abcdabcdabcd", "abcd"]


class TestWritingIds:
    @pytest.mark.parametrize("block", [1, 7, 100, 4096, 2**20])
    def test_gives_the_ids_of_the_text_whatever_the_size_of_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: BPETokenizer, block: int
    ) -> None:
        text = VERDICT.read_bytes().decode()[:5000] + "👍é\r\n \x00" * 3
        monkeypatch.setattr(corpus, "_BLOCK", block)
        assert tokenized(text_files(tmp_path, text), gpt2).ids.tolist() == gpt2.encode(text)

    @hypothesis.given(st.text(min_size=1), st.data())
    def test_takes_any_range_of_characters(
        self, folder: Path, gpt2: BPETokenizer, text: str, data: st.DataObject
    ) -> None:
        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, len(text)))
        ids = encoded(text_files(folder, text), gpt2, start, stop)
        assert ids == gpt2.encode(text[start:stop])

    @hypothesis.given(st.lists(st.text("ab \n", min_size=1), min_size=1, max_size=4), st.data())
    def test_takes_a_range_across_files_of_a_tokenizer_without_end_of_text(
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
    def test_puts_no_end_of_text_at_the_edge_of_a_range(
        self, tmp_path: Path, gpt2: BPETokenizer, start: int, stop: int
    ) -> None:
        ids = encoded(text_files(tmp_path, "one", "two"), gpt2, start, stop)
        assert ids == gpt2.encode("onetwo"[start:stop])

    def test_reads_end_of_text_written_out_in_a_file_as_ordinary_text(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        ids = encoded(text_files(tmp_path, "a<|endoftext|>b"), gpt2)
        assert ids == gpt2.encode("a<|endoftext|>b") and 50256 not in ids

    def test_joins_files_into_one_text_where_bpe_has_no_end_of_text(self, tmp_path: Path) -> None:
        bytewise: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
        tokenizer = BPETokenizer(r"\S+|\s+", bytewise | {b"ab": 256}, {})
        assert encoded(text_files(tmp_path, "a", "b"), tokenizer) == [256]

    def test_replaces_what_is_not_utf8_where_the_survey_did(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        source = survey(text_files(tmp_path, b"caf\xe9"), errors="replace")
        write_ids(tmp_path / "a.ids", source, gpt2)
        assert read_ids(tmp_path / "a.ids").ids.tolist() == gpt2.encode("caf\ufffd")

    def test_uses_16_bits_an_id_where_the_vocabulary_fits_and_else_32(self, tmp_path: Path) -> None:
        characters = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10801))))
        for size, dtype in ((2**16, "<u2"), (2**16 + 1, "<u4")):
            text = characters[:size]
            ids = tokenized(text_files(tmp_path, text), CharTokenizer(text)).ids
            assert ids.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(ids, np.arange(size))

    def test_makes_a_file_laid_out_as_documented(self, tmp_path: Path) -> None:
        tokenized(text_files(tmp_path, "abba"), CharTokenizer("ab"))
        raw = (tmp_path / "a.ids").read_bytes()
        magic, version, begin = struct.unpack("<8sII", raw[:16])
        assert (magic, version, begin % 64) == (b"FLAXIDS\n", 1, 0)
        header = json.loads(raw[16:begin])
        assert header["dtype"] == "<u2" and header["count"] == 4
        assert np.frombuffer(raw[begin:], "<u2").tolist() == [0, 1, 1, 0]

    def test_leaves_room_in_the_header_for_the_number_of_ids(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ids_file, "_ALIGNMENT", 1)  # so that there is no room by chance
        assert len(tokenized(text_files(tmp_path, "ab" * 500), CharTokenizer("ab")).ids) == 1000

    def test_keeps_with_the_ids_where_they_come_from(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "abc", "cba")
        ids = tokenized(paths, CharTokenizer("abc"), 1, 5)
        assert (ids.vocab_size, ids.tokenizer, ids.start, ids.stop) == (3, "characters", 1, 5)
        assert (
            ids.files == ("0.txt", "1.txt")
            and str(tmp_path).encode() not in (tmp_path / "a.ids").read_bytes()
        )
        assert ids.sha256 == survey(paths).sha256
        assert ids.fingerprint == tokenizer_fingerprint(CharTokenizer("abc"))

    def test_fingerprints_tell_tokenizers_apart_by_what_defines_them(self) -> None:
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
        monkeypatch.setattr(corpus, "_BLOCK", 4)
        seen: list[tuple[int, int]] = []
        source = survey(text_files(tmp_path, "a b a b a"))
        write_ids(
            tmp_path / "a.ids",
            source,
            CharTokenizer(" ab"),
            start=1,
            progress=lambda *pair: seen.append(pair),
        )
        assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]

    def test_makes_the_folder_and_leaves_nothing_beside_the_file(self, tmp_path: Path) -> None:
        source = survey(text_files(tmp_path, "ab"))
        write_ids(tmp_path / "run" / "data" / "train.ids", source, CharTokenizer("ab"))
        assert os.listdir(tmp_path / "run" / "data") == ["train.ids"]

    def test_refuses_characters_that_the_tokenizer_lacks_before_it_writes(
        self, tmp_path: Path
    ) -> None:
        message = r"the tokenizer's 2 characters lack 2 of the text's: 'c' \(U\+0063\), 'é' \(U\+00"
        with pytest.raises(ValueError, match=message):
            tokenized(text_files(tmp_path, "abécé"), CharTokenizer("ab"))
        assert os.listdir(tmp_path) == ["0.txt"]

    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 2), (-1, 2), (0, 5), (3, 1)])
    def test_refuses_an_empty_range_and_one_beyond_the_text(
        self, tmp_path: Path, start: int, stop: int
    ) -> None:
        message = f"start={start} and stop={stop} must be a range of the text's 4 characters"
        with pytest.raises(ValueError, match=message):
            tokenized(text_files(tmp_path, "abab"), CharTokenizer("ab"), start, stop)

    def test_tells_where_the_text_could_not_be_split_into_words(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        text = "one two" + " " * 1_000_000 + "x"
        with pytest.raises(ValueError, match=r"characters 3 to 1000008 of the text: .*shorten"):
            tokenized(text_files(tmp_path, text), gpt2)

    def test_refuses_text_of_which_no_id_is_left(self, tmp_path: Path) -> None:
        blind = BPETokenizer(r"\p{N}", {bytes([byte]): byte for byte in range(256)}, {})
        with pytest.raises(ValueError, match="characters 0 to 3 encode to no ids at all"):
            tokenized(text_files(tmp_path, "abc"), blind)

    @pytest.mark.parametrize("now", ["abab", "abababababab", "éébbbb"])
    def test_notices_that_a_file_changed_since_the_survey(self, tmp_path: Path, now: str) -> None:
        (path,) = text_files(tmp_path, "abababab")
        source = survey([path])
        write_ids(tmp_path / "a.ids", source, CharTokenizer("abé"))
        before = (tmp_path / "a.ids").read_bytes()
        path.write_text(now, encoding="utf-8")
        with pytest.raises(ValueError, match=r"0\.txt changed while it was being read"):
            write_ids(tmp_path / "a.ids", source, CharTokenizer("abé"))
        assert (tmp_path / "a.ids").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.ids"]

    def test_blames_the_text_and_not_the_ids_for_a_text_that_went_away(
        self, tmp_path: Path
    ) -> None:
        (path,) = text_files(tmp_path, "ab")
        source = survey([path])
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"0\.txt") as caught:
            write_ids(tmp_path / "a.ids", source, CharTokenizer("ab"))
        assert "cannot be written" not in str(caught.value)
        assert os.listdir(tmp_path) == []

    def test_cannot_take_the_place_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a.ids").mkdir()
        source = survey(text_files(tmp_path, "ab"))
        with pytest.raises(OSError, match=r"a\.ids cannot be written: Is a directory; choose a"):
            write_ids(tmp_path / "a.ids", source, CharTokenizer("ab"))
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.ids"]

    def test_failing_to_reach_the_disk_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        source = survey(text_files(tmp_path, "ab"))
        write_ids(tmp_path / "a.ids", source, CharTokenizer("ab"))
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=r"a\.ids cannot be written: Input/output error; choose"):
            write_ids(tmp_path / "a.ids", source, CharTokenizer("ba"))
        assert read_ids(tmp_path / "a.ids").ids.tolist() == [0, 1]
        assert sorted(os.listdir(tmp_path)) == ["0.txt", "a.ids"]

    def test_a_full_disk_is_reported_and_left_clean(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system to fill cannot be mounted here: {error}")
        try:
            source = survey(text_files(tmp_path, "ab" * 50_000))
            message = r"a\.ids cannot be written: No space left on device; free some space there"
            with pytest.raises(OSError, match=message) as caught:
                write_ids(disk / "a.ids", source, CharTokenizer("ab"))
            assert caught.value.errno == errno.ENOSPC
            assert os.listdir(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


# The counts that nanoGPT prints (karpathy/nanoGPT, data/shakespeare and data/shakespeare_char).
@pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason=f"{SHAKESPEARE} is absent; FLAXGPT_SHARED names the folder that has data/",
)
@pytest.mark.parametrize(
    ("kind", "train", "val"), [("gpt2", 301_966, 36_059), ("characters", 1_003_854, 111_540)]
)
def test_shakespeare_has_as_many_ids_as_in_nanogpt(
    tmp_path: Path, gpt2: BPETokenizer, kind: str, train: int, val: int
) -> None:
    source = survey([SHAKESPEARE])
    tokenizer = gpt2 if kind == "gpt2" else CharTokenizer(source.alphabet)
    assert len(source.alphabet) == 65
    middle = int(0.9 * source.n_characters)
    write_ids(tmp_path / "train.ids", source, tokenizer, stop=middle)
    write_ids(tmp_path / "val.ids", source, tokenizer, start=middle)
    assert len(read_ids(tmp_path / "train.ids").ids) == train
    assert len(read_ids(tmp_path / "val.ids").ids) == val


# Peak memory of this process, in MiB, before and after the work that `sys.argv` asks for.
FRUGAL = """
import resource, sys
from flaxgpt.data import read_ids, survey, write_ids
from flaxgpt.tokenizer import CharTokenizer, load_tokenizer

def peak():
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

text, target, kind = sys.argv[1:]
tokenizer = load_tokenizer("gpt2") if kind == "gpt2" else CharTokenizer("\\n ,abcdehlorw")
tokenizer.encode("hello world")
before = peak()
source = survey([text])
write_ids(target, source, tokenizer, stop=int(0.9 * source.n_characters))
print(peak() - before, len(read_ids(target).ids))
"""


def extra_memory(folder: Path, line: str, megabytes: int, kind: str) -> tuple[float, int]:
    block = line * (10**6 // len(line.encode()))
    with (folder / "big.txt").open("w", encoding="utf-8") as file:
        for _ in range(megabytes):
            file.write(block)
    output = subprocess.run(
        [sys.executable, "-c", FRUGAL, folder / "big.txt", folder / "big.ids", kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return float(output[0]), int(output[1])


def test_a_text_need_not_fit_in_memory(tmp_path: Path) -> None:
    extra, count = extra_memory(tmp_path, "hello world, or a bold bear cowered\n", 16, "characters")
    assert count > 14 * 10**6
    assert extra < 150  # in one piece: 16 of text, 110 and more for the list of ids, 28 of array


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["hello world\n", "👩‍👩‍👧é汉字"]
)  # words; a text without any white space
def test_a_large_text_takes_no_more_memory_than_a_small_one(tmp_path: Path, line: str) -> None:
    extra, count = extra_memory(tmp_path, line, 128, "gpt2")
    assert count > 20 * 10**6
    assert extra < 200


class TestReadingIds:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tokenized(text_files(tmp_path, "ab" * 100), CharTokenizer("ab")).path

    def test_maps_them_into_memory_unchangeable(self, path: Path) -> None:
        ids = read_ids(str(path)).ids
        assert isinstance(ids, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"b\.ids does not exist; write_ids makes it"):
            read_ids(tmp_path / "b.ids")

    @pytest.mark.parametrize("length", [17, 100, -400, -1])
    def test_a_file_cut_short_is_refused(self, path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"a\.ids is damaged: .*; delete it and have the text"):
            read_ids(path)

    def test_a_file_whose_count_is_not_its_size_is_refused(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\0\0")
        with pytest.raises(ValueError, match="promises 200 ids of 2 bytes behind 320 of its own, "):
            read_ids(path)

    def test_a_file_of_no_ids_is_refused(self, path: Path) -> None:
        header = path.read_bytes()[:-400]
        path.write_bytes(header.replace(b'"count": 200', b'"count": 0  '))
        with pytest.raises(ValueError, match="damaged: the header promises 0 ids of 2 bytes"):
            read_ids(path)

    @pytest.mark.parametrize("content", [b"", b"FLAX", b"\x93NUMPY\x01\x00v\x00" + b" " * 100])
    def test_another_kind_of_file_is_refused(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.ids is no file of ids: it begins with b'"):
            read_ids(path)

    def test_another_version_is_refused(self, path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"\n\x01", b"\n\x02", 1))
        with pytest.raises(ValueError, match=r"has version 2 of the format, .* reads version 1"):
            read_ids(path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'{"dtype"', b'["dtype"'),
            (b'"count": 200', b'"coont": 200'),
            (b'"count": 200', b'"count": -20'),
            (b'"<u2"', b'"<f2"'),
            (b'"<u2"', b'"|O8"'),
            (b'"vocab_size"', b'"vocab_sise"'),
            (b'["0.txt"]', b" 123456.0"),
        ],
    )
    def test_a_garbled_header_is_refused(self, path: Path, old: bytes, new: bytes) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(ValueError, match=r"a\.ids is damaged: .*; delete it and have the text"):
            read_ids(path)

    def test_the_source_is_the_same_if_the_bytes_are(self, tmp_path: Path) -> None:
        paths = text_files(tmp_path, "ab", "ba")
        ids = tokenized(paths, CharTokenizer("ab"))
        moved = [path.rename(path.with_suffix(".text")) for path in paths]
        check_same_source(ids, survey(moved))

    def test_a_source_that_changed_is_refused_with_both_hashes(self, tmp_path: Path) -> None:
        ids = tokenized(text_files(tmp_path, "ab"), CharTokenizer("ab"))
        old, new = (hashlib.sha256(text).hexdigest()[:12] for text in (b"ab", b"ba"))
        message = rf"a\.ids was made from .* {old}\.\.\., and .*0\.txt now has {new}\.\.\.: put the"
        with pytest.raises(ValueError, match=message):
            check_same_source(ids, survey(text_files(tmp_path, "ba")))


def take(iterator: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate(list(itertools.islice(iterator, count)))


class TestBatches:
    def test_are_int32_rows_of_one_more_than_the_context_length(self) -> None:
        ids = np.arange(65_000, 65_536, dtype=np.uint16)
        batch = next(batches(ids, length=64, batch_size=4, seed=0))
        assert batch.shape == (4, 65) and batch.dtype == np.int32
        assert (np.diff(batch) == 1).all() and batch.min() >= 65_000

    @hypothesis.given(st.data())
    def test_meet_every_window_once_an_epoch(self, data: st.DataObject) -> None:
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

    def test_without_shuffle_and_shift_are_the_books_loader(self) -> None:
        ids = np.arange(13)
        plain = batches(ids, length=4, batch_size=2, seed=0, shuffle=False, shift=False)
        assert [batch[:, 0].tolist() for batch in itertools.islice(plain, 3)] == [
            [0, 4],
            [8, 0],  # the epoch's end, filled up from the next
            [4, 8],
        ]

    def test_are_shuffled_anew_each_epoch(self) -> None:
        drawn = take(batches(np.arange(401), length=4, batch_size=100, seed=0, shift=False), 2)
        first, second = drawn[:100, 0].tolist(), drawn[100:, 0].tolist()
        assert sorted(first) == sorted(second) == list(range(0, 400, 4))
        assert first != second and sorted(first) != first

    def test_cut_the_text_elsewhere_each_epoch(self) -> None:
        drawn = batches(np.arange(401), length=4, batch_size=100, seed=0, shuffle=False)
        offsets = [int(batch[0, 0]) for batch in itertools.islice(drawn, 40)]
        assert set(offsets) == {0, 1, 2, 3}

    def test_depend_on_the_seed_alone(self) -> None:
        def drawn(seed: int) -> list[int]:
            return take(batches(np.arange(99), length=2, batch_size=5, seed=seed), 9)[:, 0].tolist()

        assert drawn(1) == drawn(1) and drawn(1) != drawn(2)

    def test_are_the_same_whatever_the_version_of_numpy(self) -> None:
        drawn = take(batches(np.arange(100), length=8, batch_size=6, seed=123), 3)
        first_epoch = [31, 87, 15, 47, 7, 71, 55, 39, 23, 63, 79, 91]
        assert drawn[:, 0].tolist() == [*first_epoch, 91, 60, 68, 20, 76, 12]

    def test_come_from_a_file_of_ids_as_from_memory(
        self, tmp_path: Path, gpt2: BPETokenizer
    ) -> None:
        ids = tokenized([*text_files(tmp_path, VERDICT.read_bytes())], gpt2).ids
        mapped = batches(ids, length=32, batch_size=8, seed=5)
        memory = batches(np.array(ids), length=32, batch_size=8, seed=5)
        np.testing.assert_array_equal(take(mapped, 30), take(memory, 30))

    @pytest.mark.parametrize("process_count", [2, 3, 6])
    def test_of_several_processes_join_to_those_of_one(self, process_count: int) -> None:
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

    def test_go_on_in_another_process_where_they_stopped(self) -> None:
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
    def test_can_be_taken_back_to_an_earlier_state(self, prefetch: int) -> None:
        iterator = batches(np.arange(500), length=3, batch_size=12, seed=9, prefetch=prefetch)
        beginning = iterator.get_state()
        first = take(iterator, 20)
        iterator.set_state(beginning)
        np.testing.assert_array_equal(take(iterator, 20), first)
        iterator.close()

    def test_need_a_window_of_ids(self) -> None:
        message = r"64 ids do not fill one window: a context of 64 takes 65 .*give more text, or"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(64), length=64, batch_size=1, seed=0)

    def test_cannot_exceed_the_data(self) -> None:
        message = "batch_size=3 exceeds the data: 12 ids are 2 windows of 5; choose a smaller batch"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(12), length=4, batch_size=3, seed=0)

    def test_must_divide_among_the_processes(self) -> None:
        message = "batch_size=10 must be a multiple of the 4 processes, such as 12"
        with pytest.raises(ValueError, match=message):
            batches(np.arange(99), length=4, batch_size=10, seed=0, process_count=4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"length": 0}, "length=0 must be a whole number, 1 or more"),
            ({"batch_size": 2.5}, r"batch_size=2\.5 must be a whole number"),
            ({"seed": -1}, "seed=-1 must be a whole number, 0 or more"),
            ({"seed": None}, "seed=None must be a whole number"),
            ({"prefetch": -2}, "prefetch=-2 must be"),
            ({"process_count": 0}, "process_count=0 must be"),
            ({"process_index": 1}, "process_index=1 must be 0 to 0"),
            ({"ids": np.zeros((9, 9), int)}, r"ids of shape \(9, 9\) and dtype int64 must be a fl"),
            ({"ids": np.zeros(99)}, r"ids of shape \(99,\) and dtype float64 must be"),
        ],
    )
    def test_refuse_an_argument_out_of_its_range(
        self, change: dict[str, object], message: str
    ) -> None:
        good = {"ids": np.arange(99), "length": 4, "batch_size": 2, "seed": 0}
        with pytest.raises(ValueError, match=message):
            batches(**good | change)  # type: ignore[arg-type]

    def test_say_how_to_get_grain_where_it_is_missing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "grain", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'flaxgpt\[train\]'"):
            batches(np.arange(99), length=4, batch_size=2, seed=0)


class TestEvaluationWindows:
    def test_lie_side_by_side_from_the_first_id(self) -> None:
        windows = evaluation_windows(np.arange(12, dtype=np.uint16), 4)
        assert windows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
        assert windows.dtype == np.int32

    def test_are_spread_evenly_where_they_are_limited(self) -> None:
        assert evaluation_windows(np.arange(41), 4, limit=5)[:, 0].tolist() == [0, 8, 16, 24, 32]
        assert evaluation_windows(np.arange(41), 4, limit=4)[:, 0].tolist() == [0, 8, 20, 28]

    def test_are_all_there_are_where_the_limit_is_higher(self) -> None:
        assert len(evaluation_windows(np.arange(41), 4, limit=99)) == 10

    @hypothesis.given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 500))
    def test_never_repeat_and_never_leave_the_ids(self, limit: int, length: int, more: int) -> None:
        windows = evaluation_windows(np.arange(length + 1 + more), length, limit=limit)
        assert len(windows) == min(limit, count_windows(length + 1 + more, length))
        assert (np.diff(windows[:, 0]) >= length).all()

    def test_need_a_window_of_ids(self) -> None:
        with pytest.raises(ValueError, match="4 ids do not fill one window: a context of 4 takes"):
            evaluation_windows(np.arange(4), 4)

    def test_refuse_a_limit_of_none_at_all(self) -> None:
        with pytest.raises(ValueError, match="limit=0 must be a whole number, 1 or more"):
            evaluation_windows(np.arange(9), 4, limit=0)
