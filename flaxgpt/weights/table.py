"""What both layouts share: a table of names, read one way to import and the other to export."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flaxgpt.config import GPTConfig
from flaxgpt.model import param_shapes

Role = Literal["weights", "zero bias", "tied head"]

_HEAD, _TOKENS = "out_head/weight", "tok_emb/weight"


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and the tensor of a file that holds it; `{l}` is the block.

    Attributes:
        ours: path in the parameter tree.
        theirs: the tensor's name.
        transposed: whether the file has it `[in, out]`.
        third: which third of the tensor's last axis it is, where three are stored as one.
    """

    ours: str
    theirs: str
    transposed: bool = False
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of keeping a model in a folder.

    Attributes:
        name: as `save` takes it.
        rows: the table of names.
        constants: tensors that PyTorch saves along though they are no weights.
        prefix: what some files leave away at the start of names.
        writes_tied_head: whether the output head is written even where it is the token embedding.
        tie_key: what `config.json` calls `tie_embeddings`.
        write_config: gives the contents of `config.json`.
        metadata: what a safetensors file says of itself.
    """

    name: str
    rows: tuple[Row, ...]
    constants: tuple[str, ...]
    prefix: str
    writes_tied_head: bool
    tie_key: str
    write_config: Callable[[GPTConfig], dict[str, Any]]
    metadata: dict[str, str] | None

    def full_name(self, name: str) -> str | None:
        """Returns a tensor's name as the table has it, or None if no model has it."""
        known = {row.theirs for row in self.rows} | set(self.constants)
        for full in (name, self.prefix + name):
            if re.sub(r"\.\d+\.", ".{l}.", full, count=1) in known:
                return full
        return None

    def is_constant(self, full_name: str) -> bool:
        """Whether a tensor is no weight."""
        return re.sub(r"\.\d+\.", ".{l}.", full_name, count=1) in self.constants


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that a file of a given configuration has.

    Attributes:
        shape: of the tensor in the file.
        rows: the parameters in it, in the order of their thirds.
        role: `weights`, or what the file has but the parameters do not: `zero bias`, `tied head`.
    """

    shape: tuple[int, ...]
    rows: tuple[Row, ...]
    role: Role


def slots(layout: Layout, cfg: GPTConfig) -> dict[str, Slot]:
    """Returns every tensor that a file in this layout has, by its name."""
    ours = flatten_dict(param_shapes(cfg), sep="/")
    everything = dataclasses.replace(cfg, qkv_bias=True, tie_embeddings=False)
    every_leaf = flatten_dict(param_shapes(everything), sep="/")
    found: dict[str, Slot] = {}
    for row in _of_each_block(layout, cfg):
        role: Role
        if row.ours in ours:
            role = "weights"
        elif row.ours == _HEAD:
            role = "tied head"
        elif row.third is not None:  # there is no leaving out a bias of three that are one tensor
            role = "zero bias"
        else:
            continue
        shape = every_leaf[row.ours].shape
        shape = shape[::-1] if row.transposed else shape
        if row.third is not None:
            shape = (*shape[:-1], 3 * shape[-1])
        earlier = found[row.theirs].rows if row.theirs in found else ()
        found[row.theirs] = Slot(shape, (*earlier, row), role)
    return found


def _of_each_block(layout: Layout, cfg: GPTConfig) -> Iterator[Row]:
    for row in layout.rows:
        for block in range(cfg.n_layers if "{l}" in row.ours else 1):
            ours, theirs = row.ours.format(l=block), row.theirs.format(l=block)
            yield dataclasses.replace(row, ours=ours, theirs=theirs)


def split(tensor: np.ndarray, slot: Slot) -> Iterator[tuple[str, np.ndarray]]:
    """Gives the parameters in a tensor, by our paths."""
    for row in slot.rows:
        part = tensor if row.third is None else np.split(tensor, 3, axis=-1)[row.third]
        yield row.ours, part.T if row.transposed else part


def export(layout: Layout, cfg: GPTConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file; those that need no change share memory with `params`."""
    ours = flatten_dict(params, sep="/")
    tensors = {}
    for name, slot in slots(layout, cfg).items():
        if slot.role == "tied head":
            if layout.writes_tied_head:
                tensors[name] = _as_stored(_TOKENS, ours[_TOKENS])
        elif slot.role == "zero bias":
            weight = slot.rows[0].ours.removesuffix("bias") + "weight"
            tensors[name] = np.zeros(slot.shape, _as_stored(weight, ours[weight]).dtype)
        else:
            parts = [_as_stored(row.ours, ours[row.ours]) for row in slot.rows]
            if len({part.dtype for part in parts}) > 1:
                parts = [part.astype(np.float32) for part in parts]
            parts = [part.T if slot.rows[0].transposed else part for part in parts]
            whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            tensors[name] = np.ascontiguousarray(whole)
    return tensors


def _as_stored(path: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{path} has dtype {array.dtype}: weights must be floating point")
    keep = array.dtype.name in ("bfloat16", "float16")
    return array if keep else array.astype(np.float32, copy=False)
