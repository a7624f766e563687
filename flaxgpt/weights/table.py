"""Name tables: which tensor of a file holds which parameter, for import and export alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flaxgpt.config import GPTConfig, block_name
from flaxgpt.model import param_shapes
from flaxgpt.typing import Params
from flaxgpt.weights.quantize import quantize
from flaxgpt.weights.tensors import FLOATS, INT8

TOKEN_EMBEDDING, HEAD = "tok_emb/weight", "out_head/weight"
_PLACEHOLDER = "{l}"  # stands for the number of the block, in our paths and in tensor names
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # of torch.compile and DistributedDataParallel
_NUMBER = re.compile(r"\.(\d+)\.")


def block_path(path: str) -> str:
    """Return the path of a parameter inside a block, with a placeholder for the block's number."""
    return f"{block_name(_PLACEHOLDER)}/{path}"


class Entry(NamedTuple):
    """One parameter and the tensor that stores it."""

    ours: str  # path in the parameter tree, with "{l}" for the number of the block
    theirs: str  # name of the tensor in the file, with the same placeholder
    transposed: bool = False  # whether the file stores the weight as [in, out]
    third: int | None = None  # part of the output axis, where query, key and value are fused

    @property
    def output_axis(self) -> int:
        """The axis of the tensor along which fused parameters are joined."""
        return -1 if self.transposed else 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to store a model in a folder."""

    title: str  # for messages, such as "the book's"
    entries: tuple[Entry, ...]  # the name table
    constants: tuple[str, ...] = ()  # tensors that PyTorch saves although they are not weights
    prefix: str = ""  # start of the names that some files omit
    has_all_biases: bool = False  # whether a file holds zeros for the biases that a model lacks
    writes_tied_head: bool = False  # even if it is the token embedding
    tie_key: str = "tie_embeddings"  # the key of `tie_embeddings` in config.json
    # Returns the contents of config.json; None for a layout that is only read.
    write_config: Callable[[GPTConfig], dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None  # of the safetensors file
    is_int8: bool = False  # whether weights are int8, with scales; see `quantize`

    def is_apart(self, name: str) -> bool:
        """Return whether a tensor is outside the language model, as a classification head is."""
        names = {entry.theirs for entry in self.entries}
        names |= {name.removeprefix(self.prefix) for name in names}
        return _WRAPPERS.sub("", name).split(".")[0] not in {name.split(".")[0] for name in names}

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(entry.theirs for entry in self.entries).union(self.constants)

    def find(self, name: str) -> tuple[str, int, bool] | None:
        """Return a tensor's full name, its block (-1 outside) and whether it is a constant."""
        name = _WRAPPERS.sub("", name)
        for full in (name, self.prefix + name):
            number = _NUMBER.search(full)
            pattern = _NUMBER.sub(f".{_PLACEHOLDER}.", full, count=1)
            if pattern in self._known:
                return full, int(number[1]) if number else -1, pattern in self.constants
        return None


class Slot(NamedTuple):
    """A tensor that a file has for a given configuration."""

    shape: tuple[int, ...]  # in the file
    entries: tuple[Entry, ...]  # the parameters it holds, in the order of their thirds
    role: Literal["weights", "zero bias", "tied head"]  # the last two have no parameter
    block: int  # -1 outside the blocks
    is_int8: bool = False  # else floating point

    @property
    def dtypes(self) -> Collection[str]:
        """The dtypes that the tensor can have, in safetensors' spelling."""
        return (INT8,) if self.is_int8 else FLOATS


def slots(layout: Layout, cfg: GPTConfig) -> dict[str, Slot]:
    """Return every tensor that a file in this layout has, by its full name."""
    used = flatten_dict(stored_shapes(layout, cfg), sep="/")
    largest = dataclasses.replace(cfg, bias=True, qkv_bias=True, tie_embeddings=False)
    shapes = flatten_dict(stored_shapes(layout, largest), sep="/")
    found: dict[str, Slot] = {}
    for entry in layout.entries:
        for block in range(cfg.n_layers) if _PLACEHOLDER in entry.ours else (-1,):
            ours, theirs = entry.ours.format(l=block), entry.theirs.format(l=block)
            shape = shapes[ours].shape[:: -1 if entry.transposed else 1]
            if entry.third is not None:
                whole = list(shape)
                whole[entry.output_axis] *= 3
                shape = tuple(whole)
            earlier = found[theirs].entries if theirs in found else ()
            entries = (*earlier, entry._replace(ours=ours, theirs=theirs))
            if ours in used:
                found[theirs] = Slot(shape, entries, "weights", block, used[ours].dtype == np.int8)
            elif ours == HEAD and not layout.is_int8:
                head = entry._replace(ours=TOKEN_EMBEDDING, theirs=theirs)
                found[theirs] = Slot(shape, (head,), "tied head", block)
            elif layout.has_all_biases:
                found[theirs] = Slot(shape, entries, "zero bias", block)
    return found


def stored_shapes(layout: Layout, cfg: GPTConfig) -> Params:
    """Return the shapes and dtypes of the parameters that a layout stores."""
    shapes = param_shapes(cfg)
    return jax.eval_shape(quantize, shapes) if layout.is_int8 else shapes


def export(layout: Layout, cfg: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """Return the tensors of a file; those that need no change share memory with `params`."""
    ours = flatten_dict(params, sep="/")
    tensors = {}
    for name, slot in slots(layout, cfg).items():
        if slot.role == "zero bias":
            weight = re.sub("bias$", "weight", re.sub("shift$", "scale", slot.entries[0].ours))
            tensors[name] = np.zeros(slot.shape, _as_stored(weight, ours[weight]).dtype)
        elif slot.role == "weights" or layout.writes_tied_head:
            parts = [_as_stored(entry.ours, ours[entry.ours]) for entry in slot.entries]
            if len({part.dtype for part in parts}) > 1:
                parts = [part.astype(np.float32) for part in parts]
            parts = [part.T if slot.entries[0].transposed else part for part in parts]
            axis = slot.entries[0].output_axis
            whole = np.concatenate(parts, axis) if len(parts) > 1 else parts[0]
            tensors[name] = np.ascontiguousarray(whole)
    return tensors


def _as_stored(path: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype != np.int8 and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{path} has dtype {array.dtype}: weights must be floating point")
    keep = array.dtype.name in ("bfloat16", "float16", "int8")
    return array if keep else array.astype(np.float32, copy=False)
