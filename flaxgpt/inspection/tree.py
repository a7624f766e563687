"""A parameter tree as rows: every array and every group of them, with what they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flaxgpt.inspection.parameters import Leaf, leaves_of


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What numbers are like.

    Attributes:
        mean: of those that are finite, as all below.
        std: standard deviation (divided by n).
        norm: square root of the sum of squares.
        nan: how many are NaN.
        inf: how many are infinite.
        zero: how many are 0.
        count: how many there are.
    """

    mean: float
    std: float
    norm: float
    nan: int
    inf: int
    zero: int
    count: int

    @property
    def faults(self) -> tuple[str, ...]:
        """What looks wrong, in words."""
        found = [f"{n} {word}" for n, word in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        if self.count and self.zero == self.count:
            found.append("all zero")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Row:
    """An array, or a group of arrays.

    Attributes:
        path: names from the root.
        shape: of an array, None for a group.
        dtype: its name; of a group, those of its arrays.
        count: numbers.
        bytes: what they take in memory.
        statistics: what the numbers are like, None where they were not looked at.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str
    count: int
    bytes: int
    statistics: Statistics | None

    @property
    def name(self) -> str:
        """The path as one word."""
        return "/".join(self.path) or "(array)"


def rows(tree: Any, *, statistics: bool = False) -> list[Row]:
    """Returns each group of a tree before what is in it, in the order in which data flows.

    Args:
        tree: as for `count_params`.
        statistics: whether to look at the numbers, which takes arrays.

    Raises:
        ValueError: a leaf that is no array of numbers, or has none to look at.
    """
    leaves = list(leaves_of(tree))
    looked_at = {leaf.path: describe(leaf) for leaf in leaves} if statistics else {}
    inside: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
        for depth in range(min(1, len(leaf.path)), len(leaf.path) + 1):  # an array alone has none
            inside.setdefault(leaf.path[:depth], []).append(leaf)
    found = []
    for path, members in inside.items():
        is_leaf = members[0].path == path
        found.append(
            Row(
                path=path,
                shape=tuple(members[0].value.shape) if is_leaf else None,
                dtype=", ".join(dict.fromkeys(leaf.dtype for leaf in members)),
                count=sum(leaf.count for leaf in members),
                bytes=sum(leaf.bytes for leaf in members),
                statistics=together(looked_at[leaf.path] for leaf in members)
                if statistics
                else None,
            )
        )
    return found


def describe(leaf: Leaf) -> Statistics:
    """Returns what the numbers of an array are like; sums are taken in float64."""
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise ValueError(f"{leaf.name} is a shape without numbers: statistics take arrays")
    values = np.asarray(leaf.value).reshape(-1)
    if np.iscomplexobj(values):
        raise ValueError(f"{leaf.name} is {leaf.dtype}: statistics take real numbers")
    # In pieces: float64 copies of a large array are not to double what it takes.
    starts = range(0, max(1, values.size), _PIECE)
    return together(_describe(values[start : start + _PIECE]) for start in starts)


_PIECE = 1 << 22


def _describe(values: np.ndarray) -> Statistics:
    finite = np.isfinite(values)
    nan = int(np.isnan(values).sum())
    good = values[finite].astype(np.float64)
    return Statistics(
        mean=float(good.mean()) if good.size else math.nan,
        std=float(good.std()) if good.size else math.nan,
        norm=float(np.sqrt(np.square(good).sum())),
        nan=nan,
        inf=int(finite.size - finite.sum()) - nan,
        zero=int((values == 0).sum()),
        count=values.size,
    )


def together(parts: Iterable[Statistics]) -> Statistics:
    """Returns what several arrays' numbers are like as one."""
    given = list(parts)
    if len(given) == 1:
        return given[0]
    finite = [(part, part.count - part.nan - part.inf) for part in given]
    total = sum(n for _, n in finite)
    squares = sum(part.norm**2 for part in given)
    mean = sum(part.mean * n for part, n in finite if n) / total if total else math.nan
    # Not from the squares: a mean far from 0 would take all digits of a small deviation.
    spread = sum(n * (part.std**2 + (part.mean - mean) ** 2) for part, n in finite if n)
    return Statistics(
        mean=mean,
        std=math.sqrt(spread / total) if total else math.nan,
        norm=math.sqrt(squares),
        nan=sum(part.nan for part in given),
        inf=sum(part.inf for part in given),
        zero=sum(part.zero for part in given),
        count=sum(part.count for part in given),
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs between two trees at one name.

    Attributes:
        name: path of an array.
        kind: `only in A`, `only in B`, `shape`, `dtype` or `values`.
        a: in the first tree: shape and dtype.
        b: in the second.
        changed: of `values`, how many numbers differ.
        largest: of `values`, the largest absolute difference; NaN where one of two is NaN.
        relative: of `values`, norm of the difference over the norm of the first.
    """

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    changed: int | None = None
    largest: float | None = None
    relative: float | None = None


def compare(a: Any, b: Any) -> list[Difference]:
    """Returns what differs between two trees of arrays, name by name; nothing if they are equal.

    Args:
        a: the first tree, as for `count_params`.
        b: the second; numbers are compared where both are arrays of one shape, whatever the dtypes.
            0 equals -0, and NaN equals NaN.
    """
    first, second = ({leaf.name: leaf for leaf in leaves_of(tree)} for tree in (a, b))
    found = []
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        if one is None or other is None:
            kind = "only in A" if other is None else "only in B"
            found.append(Difference(name, kind, _kind(one), _kind(other)))
        elif one.value.shape != other.value.shape:
            found.append(Difference(name, "shape", _kind(one), _kind(other)))
        else:
            if one.dtype != other.dtype:
                found.append(Difference(name, "dtype", _kind(one), _kind(other)))
            found += _values(one, other)
    return found


def _kind(leaf: Leaf | None) -> str | None:
    return None if leaf is None else f"{leaf.dtype}{list(leaf.value.shape)}"


def _values(one: Leaf, other: Leaf) -> Sequence[Difference]:
    if any(isinstance(leaf.value, jax.ShapeDtypeStruct) for leaf in (one, other)):
        return []
    first, second = (np.asarray(leaf.value).reshape(-1) for leaf in (one, other))
    changed, largest, of_gap, of_first = 0, 0.0, 0.0, 0.0
    wide = np.complex128 if np.iscomplexobj(first) or np.iscomplexobj(second) else np.float64
    for start in range(0, first.size, _PIECE):
        x, y = (values[start : start + _PIECE] for values in (first, second))
        # Before they are widened: float64 does not hold every int64.
        differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
        x, y = x.astype(wide), y.astype(wide)
        with np.errstate(invalid="ignore"):
            gap = np.abs(np.where(differ, x - y, 0.0))
        changed += int(differ.sum())
        largest = float(np.maximum(largest, gap.max()))
        of_gap += float(np.square(gap).sum())
        of_first += float(np.square(np.abs(x)).sum())
    if not changed:
        return []
    return [
        Difference(
            one.name,
            "values",
            _kind(one),
            _kind(other),
            changed=changed,
            largest=largest,
            relative=math.sqrt(of_gap / of_first) if of_first else math.inf,
        )
    ]
