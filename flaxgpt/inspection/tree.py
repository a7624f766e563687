"""Parameter trees as rows, with statistics; differences between two trees; trees in notebooks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxgpt._checks import require_extra
from flaxgpt.inspection.parameters import Leaf, leaves_of


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of an array.

    Attributes:
        mean, std, norm: of the finite elements; the standard deviation is divided by n.
        nan, inf, zero, count: number of NaN, infinite, zero and all elements.
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
        """Descriptions of NaN, infinite and all-zero values."""
        found = [f"{n} {word}" for n, word in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        if self.count and self.zero == self.count:
            found.append("all zero")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class TreeRow:
    """An array in a tree, or a group of arrays.

    Attributes:
        path: names from the root.
        shape: shape of an array, None for a group.
        dtype: name of the dtype, or of all dtypes in a group.
        count: number of elements.
        bytes: size in bytes.
        statistics: statistics of the elements, if requested.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: str
    count: int
    bytes: int
    statistics: Statistics | None

    @property
    def name(self) -> str:
        """The path as a string."""
        return "/".join(self.path) or "(array)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; None stands for NaN and infinities."""
        values: dict[str, Any] = {"path": self.name, "shape": list(self.shape or ())}
        values |= {"dtype": self.dtype, "count": self.count, "bytes": self.bytes}
        if self.statistics is not None:
            values |= _plain(self.statistics) | {"faults": list(self.statistics.faults)}
        return values


def tree_rows(tree: Any, *, statistics: bool = False) -> list[TreeRow]:
    """Return the arrays of a tree, in the order in which data flows, each group before its members.

    Args:
        tree: a configuration or parameters, as for `count_params`.
        statistics: whether to compute statistics, which requires arrays and not shapes.

    Raises:
        ValueError: a leaf is not a numeric array, or not a real one if statistics are requested.
    """
    members: dict[tuple[str, ...], list[Leaf]] = {}
    described: dict[tuple[str, ...], Statistics] = {}
    for leaf in leaves_of(tree):
        if statistics:
            described[leaf.path] = _describe_leaf(leaf)
        depths = range(1, len(leaf.path) + 1) if leaf.path else (0,)  # a single array has no path
        for depth in depths:
            members.setdefault(leaf.path[:depth], []).append(leaf)
    return [
        TreeRow(
            path=path,
            shape=tuple(leaves[0].value.shape) if leaves[0].path == path else None,
            dtype=", ".join(dict.fromkeys(leaf.dtype for leaf in leaves)),
            count=sum(leaf.count for leaf in leaves),
            bytes=sum(leaf.bytes for leaf in leaves),
            statistics=_combine([described[leaf.path] for leaf in leaves]) if described else None,
        )
        for path, leaves in members.items()
    ]


_PIECE = 1 << 22  # elements at a time: float64 copies of a large array would double its memory


def _describe_leaf(leaf: Leaf) -> Statistics:
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise ValueError(f"{leaf.name} is a shape without values: statistics require arrays")
    values = np.asarray(leaf.value).reshape(-1)
    if np.iscomplexobj(values):
        raise ValueError(f"{leaf.name} is {leaf.dtype}: statistics require real numbers")
    starts = range(0, max(1, values.size), _PIECE)
    return _combine([_describe(values[start : start + _PIECE]) for start in starts])


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


def _combine(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several arrays taken together, from the statistics of each."""
    if len(parts) == 1:
        return parts[0]
    finite = [(part, part.count - part.nan - part.inf) for part in parts]
    total = sum(n for _, n in finite)
    mean = sum(part.mean * n for part, n in finite if n) / total if total else math.nan
    # Not as the mean of the squares minus the square of the mean, which cancels for a large mean.
    spread = sum(n * (part.std**2 + (part.mean - mean) ** 2) for part, n in finite if n)
    return Statistics(
        mean,
        math.sqrt(spread / total) if total else math.nan,
        math.sqrt(sum(part.norm**2 for part in parts)),
        *(sum(getattr(part, name) for part in parts) for name in ("nan", "inf", "zero", "count")),
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """One difference between two trees.

    Attributes:
        name: path of an array.
        kind: `only in A`, `only in B`, `shape`, `dtype` or `values`.
        a, b: dtype and shape in the first and in the second tree.
        changed: for `values`, the number of elements that differ.
        largest: for `values`, the largest absolute difference; NaN if one of the two is NaN.
        relative: for `values`, the norm of the difference divided by that of the first array.
    """

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    changed: int | None = None
    largest: float | None = None
    relative: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; None stands for NaN and infinities."""
        return _plain(self)


def compare(a: Any, b: Any) -> list[Difference]:
    """Return the differences between two trees of arrays, in the order in which data flows.

    Arrays of the same shape are compared, whatever their dtypes. 0 equals -0, and NaN equals NaN.

    Args:
        a: the first tree, as for `count_params`.
        b: the second tree.
    """
    first, second = ({leaf.name: leaf for leaf in leaves_of(tree)} for tree in (a, b))
    found = []
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        types = one.type if one else None, other.type if other else None
        if one is None or other is None:
            found.append(Difference(name, "only in A" if one else "only in B", *types))
        elif one.value.shape != other.value.shape:
            found.append(Difference(name, "shape", *types))
        else:
            if one.dtype != other.dtype:
                found.append(Difference(name, "dtype", *types))
            values = one.value, other.value
            if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
                continue
            changed, largest, relative = _compare_values(*(np.ravel(value) for value in values))
            if changed:
                found.append(Difference(name, "values", *types, changed, largest, relative))
    return found


def _compare_values(first: np.ndarray, second: np.ndarray) -> tuple[int, float, float]:
    changed, largest, of_gap, of_first = 0, 0.0, 0.0, 0.0
    wide = np.complex128 if np.iscomplexobj(first) or np.iscomplexobj(second) else np.float64
    for start in range(0, first.size, _PIECE):
        x, y = (values[start : start + _PIECE] for values in (first, second))
        # Compared before the conversion to float64, which cannot represent every int64.
        differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
        x, y = x.astype(wide), y.astype(wide)
        with np.errstate(invalid="ignore"):
            gap = np.abs(np.where(differ, x - y, 0.0))
        changed += int(differ.sum())
        largest = float(np.maximum(largest, gap.max()))
        of_gap += float(np.square(gap).sum())
        of_first += float(np.square(np.abs(x)).sum())
    return changed, largest, math.sqrt(of_gap / of_first) if of_first else math.inf


def _plain(values: Statistics | Difference) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(values).items()
    }


@dataclasses.dataclass(frozen=True)
class _Rendering:
    html: str
    text: str

    def _repr_html_(self) -> str:  # IPython's protocol
        return self.html

    def __repr__(self) -> str:
        return self.text


def show(tree: Any) -> Any:
    """Return any pytree for display in a notebook, where branches unfold and arrays are drawn.

    Where HTML is not displayed, as in a terminal or on GitHub, it is a tree of text.

    Raises:
        ImportError: treescope is not installed.
    """
    treescope = require_extra("treescope", "displaying trees", "notebook")
    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        return _Rendering(treescope.render_to_html(tree), treescope.render_to_text(tree))
