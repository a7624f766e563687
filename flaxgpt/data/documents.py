"""Text files of several forms, read block by block as a stream of documents.

| form | recognized by | documents |
| --- | --- | --- |
| text in UTF-8 | anything else | the file |
| JSON Lines | names in .jsonl or .ndjson, before .gz | one field of each line |
| gzip | the first two bytes, or names in .gz | those of the compressed file |
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from flaxgpt._checks import listed

Errors = Literal["strict", "replace"]

_BLOCK = 2**20  # bytes; larger blocks are no faster and give longer lists of ids
_HEAD = 4  # bytes that tell the form of a file
_GZIP = b"\x1f\x8b"
_SURROGATES = re.compile("[\ud800-\udfff]")

# First bytes of files that are not text, and what to do with them.
_FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"BZh": ("compressed with bzip2", "decompress it with bunzip2"),
    b"\xfd7zX": ("compressed with xz", "decompress it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it with unzstd"),
    b"PAR1": ("a Parquet file", "convert it to JSON Lines"),
    b"%PDF": ("a PDF", "convert it with pdftotext"),
    codecs.BOM_UTF32_LE: ("UTF-32", "convert it with: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF32_BE: ("UTF-32", "convert it with: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "convert it with: iconv -f UTF-16 -t UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it with: iconv -f UTF-16 -t UTF-8"),
}


class HashedFile:
    """A file, open for reading, that counts and hashes the bytes that are read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.n_bytes, self._digest = 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, and raise OSError with the name of the file if that fails."""
        try:
            block = self._file.read(size)
        except OSError as error:  # unlike an error of opening, it does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.n_bytes += len(block)
        self._digest.update(block)
        return block

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far, hexadecimal."""
        return self._digest.hexdigest()


@contextlib.contextmanager
def open_hashed(path: Path) -> Iterator[HashedFile]:
    """Open a file for `read_documents`."""
    with path.open("rb") as file:
        yield HashedFile(path, file)


def read_documents(
    file: HashedFile, errors: Errors, text_field: str, separator: str
) -> Iterator[list[str]]:
    """Yield the text of a file block by block, split into documents.

    Each list is the text of one block. Documents end between its entries; the last entry is
    continued by the first of the next list.

    Args:
        file: read to its end.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        text_field: the field that holds the text, for JSON Lines.
        separator: text that separates documents within a file; "" for none.

    Raises:
        ValueError: the file is not text in UTF-8, is damaged, or lacks the field in some line.
        OSError: the file cannot be read.
    """
    texts: Iterator[list[str]] = ([text] for text in _decode(file, _decompressed(file), errors))
    if is_json_lines(file.path):
        lines = _lines(text for (text,) in texts)
        texts = (
            [document, ""]
            for number, line in enumerate(lines, start=1)
            if (document := _field(file.path, number, line, text_field, errors))
        )
    return _split(texts, separator) if separator else texts


def is_json_lines(path: Path) -> bool:
    """Return whether a file has the name of a JSON Lines file, compressed or not."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def is_binary(path: Path) -> bool:
    """Return whether a file starts like one that is not text, such as a picture."""
    with open_hashed(path) as file:
        try:
            first = next(_decompressed(file), b"")[:8192]
        except ValueError:  # damaged, which reading it reports
            return False
    first = first.removeprefix(codecs.BOM_UTF8)
    return b"\0" in first or first.startswith(tuple(_FOREIGN))


def _decompressed(file: HashedFile) -> Iterator[bytes]:
    """Yield the contents of a file in blocks, decompressed."""
    block = file.read(max(_BLOCK, _HEAD))
    if not block.startswith(_GZIP) and file.path.suffix.lower() != ".gz":
        while block:
            yield block
            block = file.read(_BLOCK)
        return
    try:
        with gzip.GzipFile(mode="rb", fileobj=_Prefixed(block, file)) as unzipped:
            block = unzipped.read(max(_BLOCK, _HEAD))
            while block:
                yield block
                block = unzipped.read(_BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = "it ends too early" if isinstance(error, EOFError) else str(error)
        raise ValueError(
            f"{file.path} is a damaged gzip file ({reason}): download or compress it again"
        ) from error


class _Prefixed(io.RawIOBase):
    """A file whose first bytes have already been read."""

    def __init__(self, first: bytes, file: HashedFile) -> None:
        self._first, self._file = first, file

    def read(self, size: int = -1, /) -> bytes:
        block, self._first = self._first[:size], self._first[size:]
        return block or self._file.read(size)


def _decode(file: HashedFile, blocks: Iterator[bytes], errors: Errors) -> Iterator[str]:
    """Yield the text that each block completes, without a byte-order mark at the start."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    first = next(blocks, b"")
    for start, (what, advice) in _FOREIGN.items():
        if first.startswith(start):
            raise ValueError(f"{file.path} is {what}, not text in UTF-8: {advice}")
    read = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    blocks = itertools.chain([first[read:]], blocks)
    for block, is_last in itertools.chain(zip(blocks, itertools.repeat(False)), [(b"", True)]):
        read += len(block)
        try:
            text = decoder.decode(block, final=is_last)
        except UnicodeDecodeError as error:
            # error.object is what the decoder kept of the block before, and this block.
            place = read - len(error.object) + error.start
            raise ValueError(
                f"{file.path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                f"{place} ({error.reason}); save the file as UTF-8, or replace such bytes by "
                'U+FFFD with --errors replace (in Python, errors="replace")'
            ) from None
        if text or not is_last:
            yield text


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield lines, which end with a newline only: JSON allows other separators within strings."""
    pending: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        pending.append(first)
        for line in others:
            yield "".join(pending)
            pending = [line]
    yield "".join(pending)


def _field(path: Path, number: int, line: str, name: str, errors: Errors) -> str:
    """Return the text in a line of JSON, or an empty string for an empty line."""
    if not line.strip():
        return ""
    where = f"{path}, line {number}"
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}, is not JSON ({error}): repair or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}, is not a JSON object but {line[:40]!r}: repair the line")
    if name not in record:
        raise ValueError(
            f"{where}, has no field {name!r} but {listed(list(map(repr, record))) or 'none'}: name "
            'the field of the text with --text-field (in Python, text_field="...")'
        )
    if not isinstance(text := record[name], str):
        raise ValueError(f"{where}: field {name!r} is {str(text)[:40]}, not a string: repair it")
    if errors == "replace":
        return _SURROGATES.sub("\ufffd", text)
    if lone := _SURROGATES.search(text):
        raise ValueError(
            f"{where}: field {name!r} has a lone surrogate, {lone[0]!r}, which UTF-8 cannot "
            "encode: repair it, or use --errors replace"
        )
    return text


def _split(texts: Iterable[list[str]], separator: str) -> Iterator[list[str]]:
    """Split documents at a separator, also where it spans blocks."""
    pending = ""
    for block in texts:
        found: list[str] = []
        for number, text in enumerate(block):
            if number:  # the end of a document, which a separator does not span
                found[-1] += pending
                pending = ""
            parts = (pending + text).split(separator)
            held = _overlap(parts[-1], separator)
            pending = parts[-1][len(parts[-1]) - held :]
            parts[-1] = parts[-1][: len(parts[-1]) - held]
            found += parts
        yield found
    yield [pending]


def _overlap(text: str, separator: str) -> int:
    """Return the length of the longest end of a text that a separator could start with."""
    longest = min(len(text), len(separator) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(separator[:n])), 0)
