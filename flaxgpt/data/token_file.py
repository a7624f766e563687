"""A text as a file of token ids: a NumPy array, and a JSON file that describes it.

`train.npy` is a one-dimensional array of uint16 or uint32, little-endian, which `numpy.load` reads
as well. `train.json` beside it is an object with these keys:

    version        of this format, 1
    dtype, count   of the ids
    edges_sha256   of the array file's first and last 64 KiB, which shows that the files match
    the others     as in `TokenFile`

The array gets its name last, so where it exists, the description is complete and belongs to it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxgpt._checks import listed, value_errors
from flaxgpt._files import temporary_beside, write_file_atomically
from flaxgpt.data.corpus import TextScan, pieces, read_texts
from flaxgpt.tokenizer import CharTokenizer, Tokenizer
from flaxgpt.tokenizer.folder import tokenizer_fingerprint, tokenizer_recipe
from flaxgpt.tokenizer.protocol import END_OF_TEXT
from flaxgpt.typing import Progress

_VERSION = 1
_EDGE = 2**16  # bytes
_REPEAT = "delete it and tokenize the text again"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A file of ids, mapped into memory, and its description.

    Attributes:
        path: the array file.
        ids: uint16 or uint32 [count], read-only. Reading a slice reads only that part from disk.
        vocab_size: of the tokenizer; every id is smaller.
        tokenizer: the kind of tokenizer, such as "gpt2" or "characters".
        fingerprint: SHA-256 of the tokenizer's definition; see `tokenizer_fingerprint`.
        sha256: of the text; see `TextScan.sha256`.
        files: names of the text files, without their folders.
        start: index of the first character of the text that the ids cover.
        stop: index after the last one.
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


def write_ids(
    path: str | os.PathLike[str],
    source: TextScan,
    tokenizer: Tokenizer,
    *,
    start: int = 0,
    stop: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Tokenize text files, or a range of their characters, into a file for `read_ids`.

    The ids are those of `tokenizer.encode` for the whole range; see `corpus.pieces` for the limits
    of that. If the tokenizer has "<|endoftext|>", its id separates documents: files, lines of JSON
    Lines, and what `document_separator` separates. The same characters within a document are
    ordinary text. Other tokenizers join the documents. The files appear when they are complete and
    on disk. A killed process leaves hidden temporary files.

    Args:
        path: the array file to create or replace, ending in ".npy". The description has the same
            name with ".json". The folder is created if necessary.
        source: the text files, as returned by `scan_texts`.
        tokenizer: any tokenizer of flaxgpt.
        start: index of the first character to encode, counted over all files.
        stop: index after the last one; None means the end of the text.
        progress: called with (characters tokenized, characters in total).

    Raises:
        ValueError: the range is empty or exceeds the text, the tokenizer cannot express the text,
            a file has changed since it was scanned, or `path` does not end in ".npy".
        OSError: a text file cannot be read, or the ids cannot be written, as on a full disk.
    """
    target, sidecar = _both_files(path)
    stop = source.n_characters if stop is None else stop
    if not 0 <= start < stop <= source.n_characters:
        raise ValueError(
            f"start={start} and stop={stop} are not a valid range; expected a nonempty range of "
            f"the text's {source.n_characters} characters"
        )
    known = tokenizer.characters if isinstance(tokenizer, CharTokenizer) else source.alphabet
    if missing := sorted(set(source.alphabet).difference(known)):  # now, not after hours of work
        raise ValueError(
            f"{len(missing)} characters of the text are not among the tokenizer's "
            f"{tokenizer.vocab_size}: {listed([f'{c!r} (U+{ord(c):04X})' for c in missing])}; "
            "remove them from the text, or build the tokenizer from text that contains them"
        )
    # Models look up int32 ids, so only half of the range of uint32 is usable.
    if tokenizer.vocab_size > 2**31:
        raise ValueError(f"vocab_size={tokenizer.vocab_size} is too large; expected at most 2**31")
    description = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_recipe(tokenizer)["kind"],
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "sha256": source.sha256,
        "files": [file.path.name for file in source.files],
        "start": start,
        "stop": stop,
    }
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": (0,)}
            np.lib.format.write_array_header_1_0(file, header)
            count = 0
            for ids in encode_range(source, tokenizer, start, stop, progress):
                count += len(ids)
                file.write(np.asarray(ids, dtype).tobytes())
            if not count:
                raise ValueError(
                    f"characters {start} to {stop} encode to no ids; expected a tokenizer that "
                    "does not drop all of them"
                )
            # NumPy leaves room in the header for an array to grow along its first axis.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
            file.flush()
            os.fsync(file.fileno())
        edges = _edges_sha256(temporary)
        description |= {"dtype": dtype.str, "count": count, "edges_sha256": edges}
        _map(temporary, dict(description))
        # From here on a crash leaves no array under the final name, rather than one with the
        # description of another.
        target.unlink(missing_ok=True)
        text = json.dumps({"version": _VERSION} | description, indent=2) + "\n"
        write_file_atomically(sidecar, text.encode())
        os.replace(temporary, target)
    except OSError as error:
        if str(error.filename) in {str(file.path) for file in source.files}:
            raise  # reading a text failed, and the error names it
        advice = "choose a folder that can be written to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space there, or choose a folder on another disk"
        raise OSError(
            error.errno, f"{path} cannot be written: {error.strerror}; {advice}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _both_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of an array file and its description. Links keep pointing to the array."""
    target = Path(path).resolve()
    if target.suffix != ".npy":
        raise ValueError(f"{path} is not a valid name for a file of ids; expected one in .npy")
    return target, target.with_suffix(".json")


def encode_range(
    source: TextScan,
    tokenizer: Tokenizer,
    start: int,
    stop: int,
    progress: Progress | None = None,
) -> Iterator[Sequence[int]]:
    """Yield the ids that `write_ids` writes, piece by piece."""
    texts: Iterable[Iterator[str]] = read_texts(source, start, stop)
    separator = tokenizer.special_tokens.get(END_OF_TEXT)
    if separator is None:
        texts = [itertools.chain.from_iterable(texts)]
    done = start
    for number, text in enumerate(texts):
        if number and separator is not None:
            yield [separator]
        before = ""  # the last word of the previous piece
        for piece in pieces(text):
            with value_errors(f"characters {done} to {done + len(piece)} of the text"):
                # Some tokenizers, such as Llama's, add a space to the beginning of a text.
                given = tokenizer.encode(before) if before else []
                ids = tokenizer.encode(before + piece)
                same = ids[: len(given)] == given
                ids = ids[len(given) :] if same else tokenizer.encode(piece)
            yield ids
            before = (piece.split() or [""])[-1][-32:]
            done += len(piece)
            if progress:
                progress(done - start, stop - start)


def read_ids(path: str | os.PathLike[str]) -> TokenFile:
    """Map a file of ids that `write_ids` has written into memory, and check it at its ends.

    Args:
        path: the array file, ending in ".npy".

    Returns:
        The ids and their description.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the array or its description is damaged, of another version, or missing, or the
            two do not belong together.
    """
    target, sidecar = _both_files(path)
    if not target.exists():
        raise FileNotFoundError(f"{path} does not exist; write_ids creates it from text")
    if not sidecar.exists():
        raise ValueError(f"{path} has no {sidecar.name} beside it, which describes it; {_REPEAT}")
    advice = f"; delete {target.name} and tokenize the text again"
    with value_errors(f"{sidecar} is damaged", advice):
        description = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        version = description.pop("version")
    if version != _VERSION:
        raise ValueError(
            f"{sidecar} has version {version} of the format, but this flaxgpt reads version "
            f"{_VERSION}; use the flaxgpt that wrote it, or {_REPEAT}"
        )
    return _map(target, description)


def _map(path: Path, description: dict[str, Any]) -> TokenFile:
    with value_errors(f"{path} is damaged", f"; {_REPEAT}"):
        dtype, count = np.dtype(description.pop("dtype")), description.pop("count")
        edges, files = description.pop("edges_sha256"), tuple(description.pop("files"))
        ids = np.lib.format.open_memmap(path, mode="r")
        if dtype.str not in ("<u2", "<u4"):
            raise ValueError(f"its description says {dtype}; expected uint16 or uint32")
        if (ids.dtype, ids.shape) != (dtype, (count,)) or count < 1:
            raise ValueError(
                f"it has shape {ids.shape} and dtype {ids.dtype}; expected {count} ids of {dtype}"
            )
        if (size := path.stat().st_size) != ids.offset + ids.nbytes:
            raise ValueError(f"it has {size} bytes; expected {ids.offset + ids.nbytes}")
        if _edges_sha256(path) != edges:
            raise ValueError(
                f"its contents are not those that {path.with_suffix('.json').name} describes"
            )
        return TokenFile(path=path, ids=ids, files=files, **description)


def _edges_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, file.seek(0, os.SEEK_END) - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()


def check_same_source(ids: TokenFile, source: TextScan) -> None:
    """Raise ValueError unless the text of `ids` has the same bytes as that of `source`."""
    if ids.sha256 != source.sha256:
        raise ValueError(
            f"{ids.path} was made from text with SHA-256 {ids.sha256[:12]}..., but "
            f"{listed([str(file.path) for file in source.files])} now has "
            f"{source.sha256[:12]}...; restore the old text, or start a new run in another folder"
        )
