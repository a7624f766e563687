"""Text files, read block by block and cut into pieces that can be encoded separately."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flaxgpt._checks import listed
from flaxgpt.data.documents import Errors, is_binary, open_hashed, read_documents
from flaxgpt.tokenizer.protocol import END_OF_TEXT
from flaxgpt.typing import Progress

_LONGEST = 2**19  # characters held back in search of a place to cut

# The last place to cut a text, of either kind. Only white space that all regex engines recognize
# follows a cut; nothing that Python considers white space precedes it.
_LAST_LONE_SPACE = re.compile(r"(?s).*\S(?= \S)")
_LAST_END_OF_WORD = re.compile(r"(?s).*\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class TextFile:
    """One file of a `TextScan`.

    Attributes:
        path: the path passed to `scan_texts`, or of a file in a folder that was.
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
        text_field: the field that holds the text, for JSON Lines.
        document_separator: text that separates documents within a file; "" for none.
        n_end_of_text: how often the documents contain the characters "<|endoftext|>".
    """

    files: tuple[TextFile, ...]
    alphabet: str
    errors: Errors
    text_field: str
    document_separator: str
    n_end_of_text: int

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_characters(self) -> int:
        """Number of characters of all files together."""
        return sum(file.n_characters for file in self.files)

    @property
    def notes(self) -> list[str]:
        """What a user may want to know before the text is tokenized, one line each."""
        notes = [f"reading {len(self.files)} text files"] if len(self.files) > 1 else []
        if self.n_end_of_text:
            notes.append(
                f"the text contains {END_OF_TEXT} {self.n_end_of_text} times as ordinary "
                "characters; to end a document there instead, use "
                f"--document-separator '{END_OF_TEXT}'"
            )
        return notes

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
    text_field: str = "text",
    document_separator: str = "",
    progress: Progress | None = None,
) -> TextScan:
    """Return the hash, size and characters of text files, which are read block by block.

    Args:
        paths: files of UTF-8 text or, with names in `.jsonl` or `.ndjson`, of JSON Lines; each may
            be compressed with gzip. A folder stands for all files in it and its subfolders, sorted
            by name, except hidden and empty ones. `~` is the home folder.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        text_field: the field that holds the text, for JSON Lines.
        document_separator: text that separates documents within a file, such as "<|endoftext|>",
            and is not part of them; "" for none.
        progress: called with (bytes read, bytes in total).

    Raises:
        ValueError: there are no paths, or a path is an empty file, a file of another form or a
            folder without text; the message says which one and where.
        OSError: a file does not exist or cannot be read.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths must be a list; for one file, pass [{os.fspath(paths)!r}]")
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} is not valid; expected 'strict' or 'replace'")
    found = [file for path in paths for file in _files(Path(os.path.expanduser(path)))]
    total = sum(map(_text_size, found))
    if not total:
        raise ValueError("paths is empty; pass at least one text file")
    files, alphabet, done, n_end_of_text = [], set[str](), 0, 0
    for path in found:
        with open_hashed(path) as file:
            n_characters, tail = 0, ""
            for texts in read_documents(file, errors, text_field, document_separator):
                for number, text in enumerate(texts):
                    n_characters += len(text)
                    alphabet.update(text)
                    tail = text if number else tail + text
                    n_end_of_text += tail.count(END_OF_TEXT)
                    tail = tail[1 - len(END_OF_TEXT) :]
                if progress:
                    progress(done + file.n_bytes, total)
            done += file.n_bytes
        if not n_characters:
            raise ValueError(f"{path} contains no text; pass a file that does")
        files.append(TextFile(path, file.sha256, file.n_bytes, n_characters))
    characters = "".join(sorted(alphabet))
    return TextScan(tuple(files), characters, errors, text_field, document_separator, n_end_of_text)


def _files(path: Path) -> list[Path]:
    """Return a path, or the text files in a folder."""
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [file for file in visible if file.is_file() and file.stat().st_size]
    found.sort(key=lambda file: file.relative_to(path).parts)
    if not found:
        raise ValueError(f"{path} is a folder without text files; pass one that contains text")
    if binary := [str(file.relative_to(path)) for file in found if is_binary(file)]:
        raise ValueError(
            f"the folder {path} also holds files that are not text in UTF-8: {listed(binary)}; "
            "move or convert them, or pass the text files one by one"
        )
    return found


def _text_size(path: Path) -> int:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the path of a UTF-8 text file")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or device, which cannot be read twice; pass a file")
    if size := path.stat().st_size:
        return size
    raise ValueError(f"{path} is empty; pass a file that contains text")


def read_texts(source: TextScan, start: int, stop: int) -> Iterator[Iterator[str]]:
    """Yield an iterator over the text of each document with characters of [start, stop).

    Each must be read to its end before the next.
    """
    texts = _document_texts(source, start, stop)
    for first in texts:
        if first is not None:
            yield itertools.chain([first], iter(functools.partial(next, texts, None), None))


def _document_texts(source: TextScan, start: int, stop: int) -> Iterator[str | None]:
    """Yield the characters of [start, stop) block by block, and None where a document ends."""
    begin = 0
    for file in source.files:
        end = begin + file.n_characters
        if start < end and begin < stop:
            yield from _clipped(source, file, max(start - begin, 0), min(stop, end) - begin)
            yield None
        begin = end


def _clipped(source: TextScan, file: TextFile, start: int, stop: int) -> Iterator[str | None]:
    begin = 0
    with open_hashed(file.path) as opened:
        for texts in read_documents(
            opened, source.errors, source.text_field, source.document_separator
        ):
            for number, text in enumerate(texts):
                if number:
                    yield None
                if clipped := text[max(start - begin, 0) : max(stop - begin, 0)]:
                    yield clipped
                begin += len(text)
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
