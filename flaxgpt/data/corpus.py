"""Text files, read block by block and cut into pieces that can be encoded separately."""

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

_BLOCK = 2**20  # bytes; larger blocks are no faster and give longer lists of ids
_LONGEST = 2**19  # characters held back in search of a place to cut

# The last place to cut a text, of either kind. Only white space that all regex engines recognize
# follows a cut; nothing that Python considers white space precedes it.
_LAST_LONE_SPACE = re.compile(r"(?s).*\S(?= \S)")
_LAST_END_OF_WORD = re.compile(r"(?s).*\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class TextFile:
    """One file of a `TextScan`.

    Attributes:
        path: the path passed to `scan_texts`.
        sha256: of the file, hexadecimal.
        n_bytes: size of the file.
        n_characters: number of Unicode characters; a replaced byte sequence counts as one.
    """

    path: Path
    sha256: str
    n_bytes: int
    n_characters: int


@dataclass(frozen=True)
class TextScan:
    """Size, hash and characters of some text files, concatenated in the given order.

    Attributes:
        files: one entry per file.
        alphabet: the distinct characters of the text, sorted by code point.
        errors: "strict", or "replace" if bytes that are not UTF-8 are read as U+FFFD.
    """

    files: tuple[TextFile, ...]
    alphabet: str
    errors: Errors

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_characters(self) -> int:
        """Number of characters of all files together."""
        return sum(file.n_characters for file in self.files)

    @property
    def sha256(self) -> str:
        """SHA-256 of a single file; for several, the SHA-256 of their concatenated digests."""
        digests = [file.sha256 for file in self.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def scan_texts(
    paths: Sequence[str | os.PathLike[str]],
    *,
    errors: Errors = "strict",
    progress: Progress | None = None,
) -> TextScan:
    """Return the hash, size and characters of text files, which are read block by block.

    Args:
        paths: files of UTF-8 text.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        progress: called with (bytes read, bytes in total).

    Raises:
        ValueError: there are no paths, or a path is a folder, an empty file, or a file that is not
            UTF-8; the message says which one and where.
        OSError: a file does not exist or cannot be read.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths must be a list; for one file, pass [{os.fspath(paths)!r}]")
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} is not valid; expected 'strict' or 'replace'")
    total = sum(_text_size(Path(path)) for path in paths)
    if not total:
        raise ValueError("paths is empty; pass at least one text file")
    files, alphabet, done = [], set[str](), 0
    for path in map(Path, paths):
        digest, before, n_characters = hashlib.sha256(), done, 0
        for block, text in read_blocks(path, errors):
            digest.update(block)
            alphabet.update(text)
            done += len(block)
            n_characters += len(text)
            if progress:
                progress(done, total)
        files.append(TextFile(path, digest.hexdigest(), done - before, n_characters))
    return TextScan(tuple(files), "".join(sorted(alphabet)), errors)


def _text_size(path: Path) -> int:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the path of a UTF-8 text file")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the text files in it one by one")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or device, which cannot be read twice; pass a file")
    if size := path.stat().st_size:
        return size
    raise ValueError(f"{path} is empty; pass a file that contains text")


def read_blocks(path: Path, errors: Errors) -> Iterator[tuple[bytes, str]]:
    """Yield the bytes of a file block by block, with the text that each block completes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = 0
    with path.open("rb") as file:
        while True:
            try:
                block = file.read(_BLOCK)
            except OSError as error:  # unlike an error of opening, it does not name the file
                raise OSError(error.errno, error.strerror, str(path)) from error
            read += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.object is what the decoder kept of the block before, and this block.
                place = read - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{place} ({error.reason}); save the file as UTF-8, or replace such bytes by "
                    'U+FFFD with --errors replace (in Python, errors="replace")'
                ) from None
            if block or text:
                yield block, text
            if not block:
                return


def read_texts(source: TextScan, start: int, stop: int) -> Iterator[Iterator[str]]:
    """Yield an iterator over the text of each file that contains characters of [start, stop)."""
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
        raise ValueError(f"{file.path} has changed since it was scanned; start again")


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Concatenate blocks of text and cut them where tokenizers do, for encoding piece by piece.

    A piece ends before a single space between two words or, if a block of text has none, before
    other white space that follows a word. GPT-2's pattern never matches across such a place, so the
    ids of the pieces are those of the whole text; some other patterns put a newline with the word
    before it. A piece of `_LONGEST` characters without such a place is cut at its end, where the
    whole text might have a longer token.
    """
    pending = ""
    for text in texts:
        pending += text
        place = _LAST_LONE_SPACE.match(pending) or _LAST_END_OF_WORD.match(pending)
        if place or len(pending) >= _LONGEST:
            end = place.end() if place else len(pending)
            yield pending[:end]
            pending = pending[end:]
    if pending:
        yield pending
