"""A text as one file of token ids: a header, then the ids as they lie in memory.

    bytes 0 to 7     the word FLAXIDS and a newline
    bytes 8 to 11    version, uint32
    bytes 12 to 15   where the ids start, uint32, a multiple of 64
    from byte 16     a JSON object, padded with spaces: `dtype` and `count` of the ids,
                     `vocab_size`, `tokenizer` and `fingerprint`, `sha256` and `files` of the text,
                     and which of its characters are here, from `start` to before `stop`
    then             the ids: uint16 where the vocabulary fits, else uint32

All numbers are little-endian.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxgpt._checks import listed
from flaxgpt.data.corpus import Survey, pieces, read_texts
from flaxgpt.tokenizer import CharTokenizer, Tokenizer
from flaxgpt.tokenizer.folder import tokenizer_recipe
from flaxgpt.typing import Progress

END_OF_TEXT = "<|endoftext|>"

_MAGIC, _VERSION, _ALIGNMENT = b"FLAXIDS\n", 1, 64
_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True, eq=False)
class IdsFile:
    """A file of ids, mapped into memory, and what its header says.

    Attributes:
        path: the file.
        ids: uint16 or uint32 [count], read-only. Reading a slice reads only that from disk.
        vocab_size: that of the tokenizer: every id is below it.
        tokenizer: its kind, such as "gpt2" or "characters".
        fingerprint: the SHA-256 of all that defines it; see `tokenizer_fingerprint`.
        sha256: that of the text; see `Survey.sha256`.
        files: names of the text's files, without folders.
        start: the first character of the text that is here.
        stop: one after the last.
    """

    path: Path
    ids: np.ndarray
    vocab_size: int
    tokenizer: str
    fingerprint: str
    sha256: str
    files: tuple[str, ...]
    start: int
    stop: int


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of what `save_tokenizer` would write: equal for equal tokenizers."""
    return _fingerprint(tokenizer_recipe(tokenizer))


def _fingerprint(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def write_ids(
    path: str | os.PathLike[str],
    source: Survey,
    tokenizer: Tokenizer,
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Tokenizes text files, or a range of their characters, into a file for `read_ids`.

    The ids are those of `tokenizer.encode` on the range as a whole; see `corpus.pieces` for how far
    that holds of patterns other than GPT-2's. If the tokenizer has "<|endoftext|>", that id is put
    between two files; the same letters within a file are ordinary text. The file appears under its
    name when it is complete and on disk. An error leaves nothing behind; a process that is killed
    leaves a hidden file beside.

    Args:
        path: the file, new or to be replaced. Its folder is made if need be.
        source: the text files, as `survey` returns them.
        tokenizer: a `BPETokenizer` or a `CharTokenizer`.
        start: the first character of the text to take, the files counting as one text.
        stop: one after the last; None is the end of the text.
        progress: called with the characters tokenized so far and those there are.

    Raises:
        ValueError: an empty range or one beyond the text, a text that the tokenizer cannot express,
            or a file that is no longer what was surveyed.
        OSError: a text file cannot be read, or the ids cannot be written, as on a full disk.
    """
    stop = source.n_characters if stop is None else stop
    if not 0 <= start < stop <= source.n_characters:
        raise ValueError(
            f"start={start} and stop={stop} must be a range of the text's {source.n_characters} "
            "characters that holds at least one"
        )
    _check_alphabet(source, tokenizer)
    # int32 is what models look up, so half of uint32 is the most that ids can use.
    if tokenizer.vocab_size > 2**31:
        raise ValueError(f"vocab_size={tokenizer.vocab_size} must be at most {2**31}")
    recipe = tokenizer_recipe(tokenizer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    header = {
        "dtype": dtype.str,
        "count": 2**63,  # of the most digits: the header, written again at the end, must still fit
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": recipe["kind"],
        "fingerprint": _fingerprint(recipe),
        "sha256": source.sha256,
        "files": [file.path.name for file in source.files],
        "start": start,
        "stop": stop,
    }
    room = len(_packed(header))
    target = Path(path).resolve()  # a link keeps pointing where it did
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(b" " * room)
            count = 0
            for ids in encode_range(source, tokenizer, start, stop, progress):
                count += len(ids)
                file.write(np.asarray(ids, dtype).tobytes())
            if not count:
                raise ValueError(
                    f"characters {start} to {stop} encode to no ids at all: the tokenizer's "
                    "pattern matches nothing in them"
                )
            file.seek(0)
            file.write(_packed(header | {"count": count}, room))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise  # it was a text file, and says so
        advice = "choose a folder that can be written to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space there, or choose a folder on another disk"
        raise OSError(
            error.errno, f"{path} cannot be written: {error.strerror}; {advice}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_alphabet(source: Survey, tokenizer: Tokenizer) -> None:
    # Before hours of work rather than in their midst.
    if not isinstance(tokenizer, CharTokenizer):
        return
    if lacking := sorted(set(source.alphabet).difference(tokenizer.characters)):
        raise ValueError(
            f"the tokenizer's {tokenizer.vocab_size} characters lack {len(lacking)} of the text's: "
            f"{listed([f'{character!r} (U+{ord(character):04X})' for character in lacking])}; "
            "remove them from the text, or build the tokenizer from text that has them"
        )


def encode_range(
    source: Survey,
    tokenizer: Tokenizer,
    start: int,
    stop: int,
    progress: Progress | None = None,
) -> Iterator[Sequence[int]]:
    """Yields the ids that `write_ids` writes, which see, piece by piece."""
    texts: Iterable[Iterator[str]] = read_texts(source, start, stop)
    divider = tokenizer.special_tokens.get(END_OF_TEXT)
    if divider is None:
        texts = [itertools.chain.from_iterable(texts)]
    done = start
    for number, text in enumerate(texts):
        if number and divider is not None:
            yield [divider]
        for piece in pieces(text):
            try:
                yield tokenizer.encode(piece)
            except ValueError as error:
                raise ValueError(
                    f"characters {done} to {done + len(piece)} of the text: {error}"
                ) from error
            done += len(piece)
            if progress:
                progress(done - start, stop - start)


def _packed(header: Mapping[str, Any], room: int = 0) -> bytes:
    text = json.dumps(header).encode()
    room = room or -(-(_PREFIX.size + len(text)) // _ALIGNMENT) * _ALIGNMENT
    return _PREFIX.pack(_MAGIC, _VERSION, room) + text.ljust(room - _PREFIX.size)


def read_ids(path: str | os.PathLike[str]) -> IdsFile:
    """Maps a file of ids into memory, as `write_ids` wrote it.

    Args:
        path: the file.

    Returns:
        The ids and what the header says of them. Nothing but the header is read yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of ids, of another version, or damaged; says how.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; write_ids makes it from text")
    again = "delete it and have the text tokenized again"
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        magic, version, room = _PREFIX.unpack(prefix.ljust(_PREFIX.size, b"\0"))
        if magic != _MAGIC:
            raise ValueError(
                f"{path} is no file of ids: it begins with {prefix[: len(_MAGIC)]!r} instead of "
                f"{_MAGIC!r}; {again}"
            )
        if version != _VERSION:
            raise ValueError(
                f"{path} has version {version} of the format, and this flaxgpt reads version "
                f"{_VERSION}; use the flaxgpt that wrote it, or {again}"
            )
        text = file.read(max(room - _PREFIX.size, 0))
        size = file.seek(0, os.SEEK_END)
    try:
        header = json.loads(text)
        dtype, count = np.dtype(header.pop("dtype")), header.pop("count")
        header["files"] = tuple(header["files"])
        if dtype.str not in ("<u2", "<u4"):
            raise ValueError(f"ids of dtype {dtype} are neither uint16 nor uint32")
        if count < 1 or size != room + count * dtype.itemsize:
            raise ValueError(
                f"the header promises {count} ids of {dtype.itemsize} bytes behind {room} of its "
                f"own, and the file has {size} bytes"
            )
        ids = np.memmap(path, dtype, mode="r", offset=room, shape=(count,))
        return IdsFile(path=path, ids=ids, **header)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; {again}") from error


def check_same_source(ids: IdsFile, source: Survey) -> None:
    """Raises ValueError unless `ids` was made from the very bytes that `source` surveyed."""
    if ids.sha256 != source.sha256:
        raise ValueError(
            f"{ids.path} was made from text with SHA-256 {ids.sha256[:12]}..., and "
            f"{listed([str(file.path) for file in source.files])} now has "
            f"{source.sha256[:12]}...: put the old text back, or start a new run in another folder"
        )
