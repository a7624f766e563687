"""Tensors in safetensors files: listing them, and reading one at a time to save memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from flaxgpt._checks import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Tensor(NamedTuple):
    """A tensor whose values are still on disk."""

    path: Path
    name: str
    dtype: str  # in safetensors' spelling: F32, BF16, I64, ...
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensors_in(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Yield the tensors in safetensors files, or raise ValueError for a damaged one."""
    for path in paths:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (the library's handle is no dict)
                view = file.get_slice(name)
                yield Tensor(path, name, view.get_dtype(), tuple(view.get_shape()))


def read(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as float32."""
    # Everything read from a file counts as memory of this process until the file is closed.
    with _open(tensor.path) as file:
        return file.get_tensor(tensor.name).astype(np.float32, copy=False)


def stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes when a file is modified or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def shards(index: Path) -> list[Path]:
    """Return the files listed in `model.safetensors.index.json`, all of which exist."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: expected JSON with the file of each tensor in weight_map; copy "
            "or download it again"
        ) from error
    if not names or not plain:
        raise ValueError(f"{index} lists {names[:8]}: expected .safetensors files in its folder")
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
        fault = f"is truncated or damaged ({error}): download or copy it again"
        with path.open("rb") as raw:
            if raw.read(8) == b"version ":
                fault = "is a Git LFS pointer instead of the weights: run `git lfs pull`"
        raise ValueError(f"{path} {fault}") from error
