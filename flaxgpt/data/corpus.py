"""Text files, read a block at a time: what they hold, and pieces that can be encoded alone."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flaxgpt.typing import Progress

Errors = Literal["strict", "replace"]

_BLOCK = 2**20  # bytes: tokenizers gain nothing from more, and their lists of ids stay small
_LONGEST = 2**19  # characters held back in search of a place to cut

# The last place of either kind in a text. Only white space that every regex engine knows counts as
# such after a cut; before it, whatever Python takes for white space is avoided.
_LAST_LONE_SPACE = re.compile(r"(?s).*\S(?= \S)")
_LAST_END_OF_WORD = re.compile(r"(?s).*\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class TextFile:
    """One file of a `Survey`.

    Attributes:
        path: as it was given.
        sha256: of its bytes, hexadecimal, as `sha256sum` prints it.
        n_bytes: its size.
        n_characters: Unicode characters, each replaced byte sequence counting as one.
    """

    path: Path
    sha256: str
    n_bytes: int
    n_characters: int


@dataclass(frozen=True)
class Survey:
    """What some text files hold, taken as one text in the order given.

    Attributes:
        files: one entry a file.
        alphabet: every character of the text once, sorted by code point.
        errors: "strict", or "replace" where bytes that are not UTF-8 are read as U+FFFD.
    """

    files: tuple[TextFile, ...]
    alphabet: str
    errors: Errors

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_characters(self) -> int:
        """Length of the text."""
        return sum(file.n_characters for file in self.files)

    @property
    def sha256(self) -> str:
        """One file's own SHA-256; for several, the SHA-256 of theirs one after another."""
        digests = [file.sha256 for file in self.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def survey(
    paths: Sequence[str | os.PathLike[str]],
    *,
    errors: Errors = "strict",
    progress: Progress | None = None,
) -> Survey:
    """Reads text files once, from end to end, in little memory.

    Args:
        paths: files of UTF-8 text.
        errors: what to do about bytes that are not UTF-8: "strict" refuses the file, "replace"
            reads them as U+FFFD.
        progress: called with the bytes read so far and those there are.

    Returns:
        Hash, size and characters of the files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no paths, or a path to a folder, to an empty file, or to one that is not UTF-8;
            says which, where in it, and what to do.
        OSError: a file cannot be read.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths must be a list of files: for one, [{os.fspath(paths)!r}]")
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} must be 'strict' or 'replace'")
    total = sum(_text_size(Path(path)) for path in paths)
    if not total:
        raise ValueError("paths is empty: give at least one file of text")
    files, alphabet, done = [], set[str](), 0
    for path in map(Path, paths):
        digest, n_bytes, n_characters = hashlib.sha256(), 0, 0
        for block, text in read_blocks(path, errors):
            digest.update(block)
            alphabet.update(text)
            n_bytes += len(block)
            n_characters += len(text)
            if progress:
                progress(done + n_bytes, total)
        done += n_bytes
        files.append(TextFile(path, digest.hexdigest(), n_bytes, n_characters))
    return Survey(tuple(files), "".join(sorted(alphabet)), errors)


def _text_size(path: Path) -> int:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the path of a file of UTF-8 text")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the files of text in it one by one")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or device, which cannot be read twice; use a file")
    if not (size := path.stat().st_size):
        raise ValueError(f"{path} is empty; give a file that holds text")
    return size


def read_blocks(path: Path, errors: Errors) -> Iterator[tuple[bytes, str]]:
    """Yields a file's bytes, block by block, and the text that they complete.

    Raises:
        ValueError: bytes that are not UTF-8, unless `errors` is "replace".
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = 0
    with path.open("rb") as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except OSError as error:  # which, unlike that of opening, names no file
                raise OSError(error.errno, error.strerror, str(path)) from error
            read += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.object is the block behind what the decoder had kept of the one before.
                place = read - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{place} ({error.reason}); save the file as UTF-8, or have such bytes "
                    'replaced by U+FFFD with --errors replace (in Python, errors="replace")'
                ) from None
            if block or text:
                yield block, text
            if not block:
                return


def read_texts(source: Survey, start: int, stop: int) -> Iterator[Iterator[str]]:
    """Yields one iterator of text a file, for those that have some of characters [start, stop).

    Raises:
        ValueError: a file is no longer what was surveyed.
    """
    begin = 0
    for file in source.files:
        end = begin + file.n_characters
        if start < end and begin < stop:
            yield _clipped(file, source.errors, max(start - begin, 0), min(stop, end) - begin)
        begin = end


def _clipped(file: TextFile, errors: Errors, start: int, stop: int) -> Iterator[str]:
    begin = 0
    for _, text in read_blocks(file.path, errors):
        end = begin + len(text)
        if start < end:
            yield text[max(start - begin, 0) : stop - begin]
        begin = end
        if begin >= stop:
            break
    if begin < stop or file.path.stat().st_size != file.n_bytes:
        raise ValueError(f"{file.path} changed while it was being read; start again")


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Joins a text and cuts it where a tokenizer cuts too, so that pieces can be encoded alone.

    A piece ends before a lone space between two words, or, where a block of text has none, before
    other white space that follows a word. GPT-2's pattern never matches across either, and looks
    at nothing before a match, so the pieces' ids are those of the text. Other tiktoken patterns
    likewise leave a lone space to the word behind it, but some take newlines with the word before.
    After half a million characters (`_LONGEST`) without such a place the piece ends anyhow, where
    the whole text might have had one longer token.
    """
    pending = ""
    for text in texts:
        pending += text
        place = _LAST_LONE_SPACE.match(pending) or _LAST_END_OF_WORD.match(pending)
        if place:
            yield pending[: place.end()]
            pending = pending[place.end() :]
        elif len(pending) >= _LONGEST:
            yield pending
            pending = ""
    if pending:
        yield pending
