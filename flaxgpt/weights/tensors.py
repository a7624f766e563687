"""Tensors in safetensors files: which there are, and one at a time with little memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flaxgpt._checks import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies; its values are still on disk.

    Attributes:
        path: the file.
        name: its name there.
        dtype: as safetensors spells it: F32, BF16, I64, ...
        shape: its shape.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))


def tensors_in(path: Path) -> Iterator[Tensor]:
    """Gives the tensors of one file.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (the library's handle is no dict)
            view = file.get_slice(name)
            yield Tensor(path, name, view.get_dtype(), tuple(view.get_shape()))


def read(tensor: Tensor) -> np.ndarray:
    """Returns a tensor's values as float32.

    The file is opened anew each time: as long as it is open, all that was read of it stays mapped
    and counts as this process's memory.
    """
    with _open(tensor.path) as file:
        return file.get_tensor(tensor.name).astype(np.float32, copy=False)


def stamp(path: Path) -> tuple[int, ...]:
    """Returns what tells a file from one that has replaced it."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def shards(index: Path) -> list[Path]:
    """Returns the files that `model.safetensors.index.json` lists.

    Raises:
        ValueError: the index is no such index.
        FileNotFoundError: a file it lists is not there.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: expected JSON whose weight_map gives each tensor's file; copy or "
            "download it again"
        ) from error
    if not names or not plain:
        raise ValueError(f"{index} lists {names[:8]}: expected .safetensors files of its folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index.parent} lacks {listed(missing)}, which {index.name} lists: copy or "
            "download the rest"
        )
    return [index.parent / name for name in names]


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "np") as file:
            yield file
    except SafetensorError as error:
        with path.open("rb") as raw:
            pointer = raw.read(8) == b"version "
        if pointer:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull`"
            ) from error
        raise ValueError(
            f"{path} is truncated or damaged ({error}): download or copy it again"
        ) from error
