"""Tensors in files: listing them, and reading safetensors one at a time to save memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from flaxgpt._checks import listed

SINGLE = "model.safetensors"
FLAX_SINGLE = "flax_model.msgpack"
INDEXES = ("model.safetensors.index.json", "flax_model.msgpack.index.json")  # of shards
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
INT8 = "I8"
STORED = FLOATS | {INT8: "int8"}  # dtypes of parameters
_SPELLINGS = {name: dtype for dtype, name in FLOATS.items()}
_CHUNK = 1 << 22  # values of a file in memory at once while part of a tensor is read

Part = tuple[range, ...]
"""Part of an array: the indices along each of its dimensions."""


class Tensor(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    dtype: str  # in safetensors' spelling: F32, BF16, I64, ...
    shape: tuple[int, ...]
    values: np.ndarray | None = None  # None if they are still on disk

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype_read(self) -> type[np.generic]:
        """The dtype of the values as they are read."""
        return np.int8 if self.dtype == INT8 else np.float32


def tensors_in(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Yield the tensors in safetensors or msgpack files, or raise ValueError for a damaged one."""
    for path in paths:
        if path.suffix == ".msgpack":
            yield from _unpack(path)
            continue
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (the library's handle is no dict)
                view = file.get_slice(name)
                yield Tensor(path, name, view.get_dtype(), tuple(view.get_shape()))


def read(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as float32, or int8 if they are stored so."""
    if tensor.values is not None:
        return tensor.values.astype(tensor.dtype_read, copy=False)
    # Everything read from a file counts as memory of this process until the file is closed.
    with _open(tensor.path) as file:
        return file.get_tensor(tensor.name).astype(tensor.dtype_read, copy=False)


def read_part(tensor: Tensor, part: Part) -> np.ndarray:
    """Return part of a tensor's values, as `read` does, in memory of their own."""
    rows, *others = (slice(indices.start, indices.stop) for indices in part)
    if tensor.values is not None:
        return np.array(tensor.values[rows, *others], tensor.dtype_read)
    values = np.empty([len(indices) for indices in part], tensor.dtype_read)
    step = max(1, _CHUNK * tensor.shape[0] // tensor.size)
    for first in range(0, len(values), step):
        chunk = values[first : first + step]
        start = rows.start + first
        # Columns are spread over all of a file, so it is closed after each chunk of rows, as in
        # `read`.
        with _open(tensor.path) as file:
            chunk[:] = file.get_slice(tensor.name)[start : start + len(chunk), *others]
    return values


def stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes when a file is modified or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def shards(index: Path) -> list[Path]:
    """Return the files listed in an index, one of `INDEXES`, all of which exist."""
    suffix = "." + index.name.split(".")[1]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(Path(name).name == name and name.endswith(suffix) for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: expected JSON with the file of each tensor in weight_map; copy "
            "or download it again"
        ) from error
    if not names or not plain:
        raise ValueError(f"{index} lists {names[:8]}: expected {suffix} files in its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index.parent} does not have {listed(missing)}, which {index.name} lists: copy or "
            "download the rest"
        )
    return [index.parent / name for name in names]


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "np") as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _unpack(path: Path) -> Iterator[Tensor]:
    """Yield the tensors of a tree that Flax has written, with dots between the names."""
    data = path.read_bytes()
    try:
        tree = msgpack_restore(data)
        arrays = flatten_dict(tree.get("params", tree), sep=".")
        tensors = [
            Tensor(
                path, name, _SPELLINGS.get(array.dtype.name, array.dtype.name), array.shape, array
            )
            for name, array in arrays.items()
        ]
    except Exception as error:  # msgpack and Flax raise many kinds for damaged data
        raise _damaged(path, error) from error
    yield from tensors


def _damaged(path: Path, error: Exception) -> ValueError:
    fault = f"is truncated or damaged ({error}): download or copy it again"
    with path.open("rb") as raw:
        if raw.read(8) == b"version ":
            fault = "is a Git LFS pointer instead of the weights: run `git lfs pull`"
    return ValueError(f"{path} {fault}")
