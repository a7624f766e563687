"""How many parameters there are, where, and what they weigh (sections 4.6, exercises 4.1, 4.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig
from flaxgpt.model import param_shapes

PARTS = (
    "token_embedding",
    "position_embedding",
    "attention",
    "feed_forward",
    "norms",
    "head",
    "other",
)

_PART_OF = {
    "tok_emb": "token_embedding",
    "pos_emb": "position_embedding",
    "att": "attention",
    "W_query": "attention",
    "W_key": "attention",
    "W_value": "attention",
    "out_proj": "attention",
    "ff": "feed_forward",
    "layers_0": "feed_forward",
    "layers_2": "feed_forward",
    "norm1": "norms",
    "norm2": "norms",
    "final_norm": "norms",
    "out_head": "head",
}
_BLOCK = "trf_blocks_"


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """What `count_params` found.

    Attributes:
        total: parameters as they are stored, all of which are trained.
        tied: of the same model with the token embedding for its head.
        untied: of the same model with a head of its own.
        by_part: of `token_embedding`, `position_embedding`, `attention`, `feed_forward`, `norms`,
            `head`, and `other`: what is no part of a flaxgpt model.
        blocks: of each transformer block in turn, its `attention`, `feed_forward` and `norms`.
        bytes_by_dtype: what is stored, in bytes, largest first.
    """

    total: int
    tied: int
    untied: int
    by_part: dict[str, int]
    blocks: tuple[dict[str, int], ...]
    bytes_by_dtype: dict[str, int]

    @property
    def bytes(self) -> int:
        """What is stored, in bytes."""
        return sum(self.bytes_by_dtype.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values, ready for JSON."""
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
    """One array of a parameter tree, or its shape.

    Attributes:
        path: names from the root of the tree, without a leading `params`.
        value: the array.
        part: one of `PARTS`.
        block: path of its transformer block, None outside of them.
    """

    path: tuple[str, ...]
    value: Any
    part: str
    block: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """The path as one word, such as `trf_blocks_0/att/W_query/weight`."""
        return "/".join(self.path) or "(array)"

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.value.shape)

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return jnp.dtype(self.value.dtype).name

    @property
    def bytes(self) -> int:
        """What it takes in memory; of a sharded array, over all devices."""
        return int(self.count * jnp.dtype(self.value.dtype).itemsize)


def count_params(tree: Any) -> ParamCount:
    """Returns how many parameters there are and where; nothing is allocated.

    >>> import flaxgpt
    >>> count = flaxgpt.count_params(flaxgpt.GPTConfig())  # the book's GPT_CONFIG_124M
    >>> count.total, count.tied  # 163 million are stored; GPT-2 shares the head, and has 124
    (163009536, 124412160)
    >>> count.blocks[0]  # exercise 4.1
    {'attention': 2360064, 'feed_forward': 4722432, 'norms': 3072}

    Args:
        tree: a `GPTConfig`; or parameters, whole or a part of them, as a pytree of JAX or NumPy
            arrays, sharded or not, or of `jax.ShapeDtypeStruct`. A head that is the very array of
            the token embedding is counted once.

    Raises:
        ValueError: a leaf that is no array of numbers; the message names it.
    """
    leaves = list(leaves_of(tree))
    table = {leaf.path: leaf for leaf in leaves}
    tokens, head = table.get(("tok_emb", "weight")), table.get(("out_head", "weight"))
    if (
        tokens
        and head
        and head.value is tokens.value
        and not isinstance(head.value, jax.ShapeDtypeStruct)
    ):
        leaves.remove(head)
        head = None

    by_part = dict.fromkeys(PARTS, 0)
    blocks: dict[tuple[str, ...], dict[str, int]] = {}
    by_dtype: dict[str, int] = {}
    for leaf in leaves:
        by_part[leaf.part] += leaf.count
        if leaf.block is not None:
            block = blocks.setdefault(leaf.block, {})
            block[leaf.part] = block.get(leaf.part, 0) + leaf.count
        by_dtype[leaf.dtype] = by_dtype.get(leaf.dtype, 0) + leaf.bytes
    total = sum(by_part.values())
    return ParamCount(
        total=total,
        tied=total - head.count if tokens and head else total,
        untied=total + tokens.count if tokens and not head else total,
        by_part=by_part,
        blocks=tuple(dict(sorted(block.items())) for block in blocks.values()),
        bytes_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
    )


def leaves_of(tree: Any) -> Iterator[Leaf]:
    """Yields the arrays of a tree as data flows through them; as `count_params` otherwise."""
    if isinstance(tree, GPTConfig):
        tree = param_shapes(tree)
    found = []
    seen: dict[tuple[str, ...], int] = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        path = path[1:] if path[:1] == ("params",) else path
        _check_leaf("/".join(path) or "the tree", value)
        part = next((_PART_OF[name] for name in path if name in _PART_OF), "other")
        numbers = [_block(name) for name in path]
        depth = next((i for i, number in enumerate(numbers, 1) if number is not None), None)
        leaf = Leaf(path, value, part, None if depth is None else path[:depth])
        found.append((_place(path, seen), leaf))
    yield from (leaf for _, leaf in sorted(found, key=lambda item: item[0]))


_FLOW = ("tok_emb", "pos_emb", _BLOCK, "norm1", "att", "norm2", "ff", "final_norm", "out_head")


def _place(path: tuple[str, ...], seen: dict[tuple[str, ...], int]) -> tuple[tuple[int, int], ...]:
    """Returns what sorts paths: known names as data flows, then others as they were first seen."""
    place = []
    for depth, name in enumerate(path, 1):
        number = _block(name)
        if number is not None:
            place.append((_FLOW.index(_BLOCK), number))
        elif name in _FLOW:
            place.append((_FLOW.index(name), 0))
        else:
            place.append((len(_FLOW), seen.setdefault(path[:depth], len(seen))))
    return tuple(place)


def _block(name: str) -> int | None:
    number = name.removeprefix(_BLOCK)
    return int(number) if name.startswith(_BLOCK) and number.isdecimal() else None


def _check_leaf(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise ValueError(
            f"{name} is {type(value).__name__}, not an array: expected a GPTConfig or a tree of "
            "parameters, as flaxgpt.init and flaxgpt.load give"
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{name} is a random key, not a parameter: of a training state, give state.params"
        )
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise ValueError(f"{name} has dtype {dtype}, which is not of numbers")
