"""Number and size of the parameters, by part (section 4.6, exercises 4.1 and 4.2)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp

from flaxgpt._quantized import SCALE
from flaxgpt.config import GPTConfig, block_index, block_name
from flaxgpt.model import param_shapes

_MODULES: dict[str, tuple[str, ...]] = {
    "token_embedding": ("tok_emb",),
    "position_embedding": ("pos_emb",),
    "attention": ("att", "W_query", "W_key", "W_value", "out_proj"),
    "feed_forward": ("ff", "layers_0", "layers_2"),
    "norms": ("norm1", "norm2", "final_norm"),
    "head": ("out_head",),
    "other": (),
}
PARTS = tuple(_MODULES)
_PART_OF = {module: part for part, modules in _MODULES.items() for module in modules}


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Number of parameters, from `count_params`.

    Attributes:
        total: number of stored parameters, all of them trainable.
        tied: total if the output head shares the token embedding.
        untied: total if the output head is separate.
        by_part: number by part; `other` is for arrays of other models.
        blocks: for each transformer block, the number by part.
        bytes_by_dtype: size in bytes by dtype, largest first.
    """

    total: int
    tied: int
    untied: int
    by_part: dict[str, int]
    blocks: tuple[dict[str, int], ...]
    bytes_by_dtype: dict[str, int]

    @property
    def bytes(self) -> int:
        """Size of all parameters in bytes."""
        return sum(self.bytes_by_dtype.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"blocks": list(self.blocks), "bytes": self.bytes}

    def __str__(self) -> str:
        lines = [f"{part.replace('_', ' '):20}{n:>16,}" for part, n in self.by_part.items() if n]
        lines += [
            f"{'total':20}{self.total:>16,}  {self.bytes / 2**20:.2f} MiB",
            f"{'  if tied':20}{self.tied:>16,}",
            f"{'  if untied':20}{self.untied:>16,}",
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in a parameter tree, or its shape."""

    path: tuple[str, ...]  # names from the root of the tree, without a leading "params"
    value: Any
    part: str  # one of PARTS
    block: tuple[str, ...] | None  # path of its transformer block, None outside the blocks

    @property
    def name(self) -> str:
        return "/".join(self.path) or "(array)"

    @property
    def elements(self) -> int:
        return math.prod(self.value.shape)

    @property
    def count(self) -> int:
        """The number of parameters; scales of int8 weights are none."""
        return 0 if self.path[-1:] == (SCALE,) else self.elements

    @property
    def dtype(self) -> str:
        return jnp.dtype(self.value.dtype).name

    @property
    def type(self) -> str:
        return f"{self.dtype}{list(self.value.shape)}"

    @property
    def bytes(self) -> int:
        return int(self.elements * jnp.dtype(self.value.dtype).itemsize)


def count_params(tree: Any) -> ParamCount:
    """Count parameters by part and block, without allocating any.

    >>> import flaxgpt
    >>> count = flaxgpt.count_params(flaxgpt.GPTConfig())  # the book's GPT_CONFIG_124M
    >>> count.total, count.tied  # 163 million; 124 million with a tied head, as in GPT-2
    (163009536, 124412160)
    >>> count.blocks[0]  # exercise 4.1
    {'attention': 2360064, 'feed_forward': 4722432, 'norms': 3072}

    Args:
        tree: a `GPTConfig`, or a pytree of parameters as arrays or `jax.ShapeDtypeStruct`. A head
            that is the same array as the token embedding is counted once. The scales of int8
            weights are counted in bytes only.

    Returns:
        The numbers, and their size in bytes.

    Raises:
        ValueError: a leaf is not a numeric array. The message names it.
    """
    leaves = leaves_of(tree)
    table = {leaf.path: leaf for leaf in leaves}
    tokens, head = table.get(("tok_emb", "weight")), table.get(("out_head", "weight"))
    shared = tokens and head and head.value is tokens.value
    if head and shared and not isinstance(head.value, jax.ShapeDtypeStruct):
        leaves = [leaf for leaf in leaves if leaf.path[:1] != ("out_head",)]
        head = None

    by_part = dict.fromkeys(PARTS, 0)
    blocks: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    by_dtype: Counter[str] = Counter()
    for leaf in leaves:
        by_part[leaf.part] += leaf.count
        by_dtype[leaf.dtype] += leaf.bytes
        if leaf.block is not None:
            blocks[leaf.block][leaf.part] += leaf.count
    total = sum(by_part.values())
    return ParamCount(
        total=total,
        tied=total - head.count if tokens and head else total,
        untied=total + tokens.count if tokens and not head else total,
        by_part=by_part,
        blocks=tuple(dict(sorted(block.items())) for block in blocks.values()),
        bytes_by_dtype=dict(by_dtype.most_common()),
    )


def leaves_of(tree: Any) -> list[Leaf]:
    """Return the arrays of a tree, as for `count_params`, in the order in which data flows."""
    if isinstance(tree, GPTConfig):
        tree = param_shapes(tree)
    leaves = []
    for keys, value in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        path = path[1:] if path[:1] == ("params",) else path
        _check_leaf("/".join(path) or "the tree", value)
        part = next((_PART_OF[name] for name in path if name in _PART_OF), "other")
        blocks = (path[:i] for i, name in enumerate(path, 1) if block_index(name) is not None)
        leaves.append(Leaf(path, value, part, next(blocks, None)))
    seen: dict[tuple[str, ...], int] = {}
    return sorted(leaves, key=lambda leaf: _flow_order(leaf.path, seen))


_BLOCK = block_name("*")
_FLOW = ("tok_emb", "pos_emb", _BLOCK, "norm1", "att", "norm2", "ff", "final_norm", "out_head")


def _flow_order(path: tuple[str, ...], seen: dict[tuple[str, ...], int]) -> list[tuple[int, int]]:
    """Return the sort key of a path: known names in data-flow order, others as first seen."""
    order = []
    for depth, name in enumerate(path, 1):
        index = block_index(name)
        known = name if index is None else _BLOCK
        if known in _FLOW:
            order.append((_FLOW.index(known), index or 0))
        else:
            order.append((len(_FLOW), seen.setdefault(path[:depth], len(seen))))
    return order


def _check_leaf(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise ValueError(
            f"{name} is {type(value).__name__}, not an array: expected a GPTConfig or a tree of "
            "parameters, such as flaxgpt.init returns"
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{name} is a random key, not a parameter: for a training state, pass state.params"
        )
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(f"{name} has dtype {dtype}, which is not numeric: expected parameters")
