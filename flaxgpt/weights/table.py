"""Name tables: which tensor of a file holds which parameter, for import and export alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flaxgpt.config import GPTConfig, block_name
from flaxgpt.model import param_shapes
from flaxgpt.typing import Params

# A zero bias and a tied head have no parameter in the configuration.
Role = Literal["weights", "zero bias", "tied head"]

TOKEN_EMBEDDING, HEAD = "tok_emb/weight", "out_head/weight"
_PLACEHOLDER = "{l}"  # stands for the number of the block, in our paths and in tensor names
_NUMBER = re.compile(r"\.(\d+)\.")


def block_path(path: str) -> str:
    """Return the path of a parameter inside a block, with a placeholder for the block's number."""
    return f"{block_name(_PLACEHOLDER)}/{path}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensor that stores it."""

    ours: str  # path in the parameter tree, with "{l}" for the number of the block
    theirs: str  # name of the tensor in the file, with the same placeholder
    transposed: bool = False  # whether the file stores the weight as [in, out]
    third: int | None = None  # part of the last axis, where query, key and value are fused


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to store a model in a folder."""

    title: str  # for messages, such as "the book's"
    entries: tuple[Entry, ...]  # the name table
    constants: tuple[str, ...]  # tensors that PyTorch saves although they are not weights
    prefix: str  # start of the names that some files omit
    writes_tied_head: bool  # whether the head is written even if it is the token embedding
    tie_key: str  # the key of `tie_embeddings` in config.json
    write_config: Callable[[GPTConfig], dict[str, Any]]  # returns the contents of config.json
    metadata: dict[str, str] | None  # of the safetensors file

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(entry.theirs for entry in self.entries) | frozenset(self.constants)

    def find(self, name: str) -> tuple[str, int | None] | None:
        """Return a tensor's full name and its block (None outside), or None if it is unknown."""
        for full in (name, self.prefix + name):
            if full in self._known:
                return full, None
            if (number := _NUMBER.search(full)) and _with_placeholder(full) in self._known:
                return full, int(number[1])
        return None

    def is_constant(self, full_name: str) -> bool:
        """Return whether a tensor is a constant, which has no parameter."""
        return _with_placeholder(full_name) in self.constants

    @property
    def examples(self) -> tuple[str, str]:
        """Two tensor names that tell this layout from others."""
        paths = (TOKEN_EMBEDDING, block_path("att/W_query/weight"))
        first, second = (e.theirs.format(l=0) for e in self.entries if e.ours in paths)
        return first, second


def _with_placeholder(name: str) -> str:
    return _NUMBER.sub(f".{_PLACEHOLDER}.", name, count=1)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that a file has for a given configuration."""

    shape: tuple[int, ...]  # in the file
    entries: tuple[Entry, ...]  # the parameters it holds, in the order of their thirds
    role: Role
    block: int | None  # None outside the blocks

    def split(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the path and values of each parameter in a tensor."""
        for entry in self.entries:
            part = tensor if entry.third is None else np.split(tensor, 3, axis=-1)[entry.third]
            yield entry.ours, part.T if entry.transposed else part


def slots(layout: Layout, cfg: GPTConfig) -> dict[str, Slot]:
    """Return every tensor that a file in this layout has, by its full name."""
    used = flatten_dict(param_shapes(cfg), sep="/")
    largest = dataclasses.replace(cfg, qkv_bias=True, tie_embeddings=False)
    shapes = flatten_dict(param_shapes(largest), sep="/")
    found: dict[str, Slot] = {}
    for entry in layout.entries:
        for block in range(cfg.n_layers) if _PLACEHOLDER in entry.ours else (None,):
            ours, theirs = entry.ours.format(l=block), entry.theirs.format(l=block)
            role: Role = "weights"
            if ours == HEAD and cfg.tie_embeddings:
                role = "tied head"
            elif ours not in used and entry.third is None:
                continue
            elif ours not in used:  # a fused qkv bias cannot be omitted for one of the three
                role = "zero bias"
            shape = shapes[ours].shape[:: -1 if entry.transposed else 1]
            if entry.third is not None:
                shape = (*shape[:-1], 3 * shape[-1])
            earlier = found[theirs].entries if theirs in found else ()
            entries = (*earlier, dataclasses.replace(entry, ours=ours, theirs=theirs))
            found[theirs] = Slot(shape, entries, role, block)
    return found


def export(layout: Layout, cfg: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """Return the tensors of a file; those that need no change share memory with `params`."""
    ours = flatten_dict(params, sep="/")
    tensors = {}
    for name, slot in slots(layout, cfg).items():
        if slot.role == "tied head":
            if layout.writes_tied_head:
                tensors[name] = _as_stored(TOKEN_EMBEDDING, ours[TOKEN_EMBEDDING])
        elif slot.role == "zero bias":
            weight = slot.entries[0].ours.removesuffix("bias") + "weight"
            tensors[name] = np.zeros(slot.shape, _as_stored(weight, ours[weight]).dtype)
        else:
            parts = [_as_stored(entry.ours, ours[entry.ours]) for entry in slot.entries]
            if len({part.dtype for part in parts}) > 1:
                parts = [part.astype(np.float32) for part in parts]
            parts = [part.T if slot.entries[0].transposed else part for part in parts]
            whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            tensors[name] = np.ascontiguousarray(whole)
    return tensors


def _as_stored(path: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{path} has dtype {array.dtype}: weights must be floating point")
    keep = array.dtype.name in ("bfloat16", "float16")
    return array if keep else array.astype(np.float32, copy=False)
