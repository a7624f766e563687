"""The collectives of a compiled program: what devices send each other, read from XLA's text.

Bytes are counted in two ways, both per device and per run of the program, or of the part of it that
was asked for. `bytes` is the size of the results. `received` is what arrives over the network if
each collective is a ring of n devices, which is optimal in bandwidth; a device sends as much as it
receives:

    all-gather, all-to-all    (n - 1) / n of the result
    reduce-scatter            n - 1 times the result, which is 1 / n of the input
    all-reduce                2 (n - 1) / n of the result: a reduce-scatter and an all-gather
    others                    the result
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from flaxgpt.planning.program_text import Instruction, Program, parse, read_arrays

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# XLA for TPU spreads an operation over the fusions that run meanwhile, where it appears again.
_CHAINED = re.compile(r'channel_id=(\d+),.*\bchain_id="')
# It also writes a reduce-scatter as a fusion of this name, with an all-reduce in it.
_REDUCE_SCATTER = "all-reduce-scatter"
_EXPLICIT = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_OF_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}(?:,|$)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes of a mesh, in one run of a program or part.

    Attributes:
        kind: XLA's name, such as "all-gather".
        axes: the mesh axes along which the devices that take part together differ.
        operations: how often such operations run, those of loops once per iteration.
        arrays: the arrays they move; XLA combines small ones into one operation.
        bytes: size of the results on each device.
        received: bytes that each device receives, by the formulas above.
    """

    kind: str
    axes: tuple[str, ...]
    operations: int
    arrays: int
    bytes: int
    received: int


class _Operation(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    arrays: int
    bytes: int
    received: int


def collectives(text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """Return the collectives of a compiled program, those that receive most first.

    Operations inside a loop count once per iteration if XLA states how many there are
    (`known_trip_count`), as it does for `lax.scan` and `lax.fori_loop`, and else once. Every branch
    of a conditional counts.

    >>> import jax
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text(), mesh)
    ()

    Args:
        text: the program, from `compiled.as_text()`.
        mesh: the mesh that its arguments are on.
    """
    program = parse(text)
    return collectives_of(program, program.entry, mesh)


def collectives_of(
    program: Program, computation: str, mesh: Mesh, without: frozenset[str] = frozenset()
) -> tuple[Collective, ...]:
    """Return the collectives that a computation runs, those that receive most first.

    Args:
        program: the program.
        computation: the name of the computation, such as the body of a loop.
        mesh: the mesh that the program's arguments are on.
        without: names of instructions and computations to leave out, such as a loop.
    """
    calls, operations = _read(program, mesh, without)

    @functools.cache
    def run(computation: str) -> collections.Counter[_Operation]:
        total = collections.Counter(operations.get(computation, ()))
        for (called, times), count in calls.get(computation, {}).items():
            for operation, runs in run(called).items():
                total[operation] += runs * times * count
        return total

    found = []
    by_kind = sorted(run(computation).items())
    for (kind, axes), group in itertools.groupby(by_kind, key=lambda item: item[0][:2]):
        rows = [(runs, *(runs * size for size in operation[2:])) for operation, runs in group]
        found.append(Collective(kind, axes, *map(sum, zip(*rows, strict=True))))
    return tuple(sorted(found, key=lambda item: -item.received))


def _read(
    program: Program, mesh: Mesh, without: frozenset[str]
) -> tuple[dict[str, Any], dict[str, list[_Operation]]]:
    """Return by computation what it calls how often, and its collectives."""
    chains = set[str]()
    calls: dict[str, Any] = collections.defaultdict(collections.Counter)
    operations: dict[str, list[_Operation]] = collections.defaultdict(list)
    for computation in program.computations.values():
        is_scattered = computation.name.startswith(_REDUCE_SCATTER)
        for one in computation.instructions:
            if one.name in without:
                continue
            for field, called in one.calls:
                if called in without:
                    continue
                times = (
                    program.trip_count(computation, one) if field in ("body", "condition") else 1
                )
                calls[computation.name][called, times] += 1
            chained = _CHAINED.search(one.attributes)
            if chained and chained[1] in chains:
                continue
            if (operation := _operation(one, mesh, is_scattered)) is not None:
                operations[computation.name].append(operation)
                chains |= {chained[1]} if chained else set()
    return calls, operations


def _operation(one: Instruction, mesh: Mesh, is_scattered: bool) -> _Operation | None:
    """Return the collective of an instruction, or None if it is none or moves nothing.

    An all-reduce whose result `is_scattered` is a reduce-scatter.
    """
    kind = one.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return None
    shape = one.shape
    if kind not in (one.opcode, "all-reduce"):  # the results are operands, results and contexts
        shape = _elements(shape)[1]
    groups = [group for group in _groups(one.attributes, mesh) if len(set(group)) > 1]
    if not groups:
        return None
    sizes = [array.size for array in read_arrays(shape)]
    total, n = sum(sizes), max(map(len, groups))
    if is_scattered and kind == "all-reduce":
        kind, total = "reduce-scatter", total // n
    received = {
        "all-reduce": 2 * total * (n - 1) // n,
        "all-gather": total * (n - 1) // n,
        "all-to-all": total * (n - 1) // n,
        "reduce-scatter": total * (n - 1),
    }
    axes = _axes(groups, mesh)
    return _Operation(kind, axes, len(sizes), total, received.get(kind, total))


def _elements(shape: str) -> list[str]:
    """Return the elements of a tuple of shapes, such as "(f32[2]{0}, (f32[4]{0}, u32[]))"."""
    parts, depth = [""], 0
    for letter in shape.strip()[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """Return the axes along which the devices of a group differ. Ids count along the mesh."""
    shape = tuple(mesh.shape.values())
    differ = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(group, shape), axis=1)  # [devices, axes]
        differ |= np.ptp(places, axis=0) > 0
    return tuple(name for name, is_split in zip(mesh.axis_names, differ, strict=True) if is_split)


def _groups(line: str, mesh: Mesh) -> list[list[int]]:
    """Return the ids of the devices that take part in a collective together, in XLA's three forms.

    {{0,1},{2,3}}                                    every id
    [2,2]<=[2,2]T(1,0)                               ids that are counted, transposed and reshaped
    mesh['a'=2,'b'=2], device_ids=([4]) {'a'}        those along some axes of a mesh
    """
    if match := _IOTA.search(line):
        return _iota(match[2]).reshape(_integers(match[1])).tolist()
    if match := _OF_MESH.search(line):
        return list(_groups_of_mesh(*match.groups()))
    match = _EXPLICIT.search(line)
    groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", match[1] if match else "")]
    return groups or [list(range(mesh.size))]


def _groups_of_mesh(sizes: str, ids: str | None, axes: str) -> Iterator[list[int]]:
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    count = math.prod(shape.values())
    devices = np.arange(count)
    if ids is not None:
        devices = _iota(ids) if ids.startswith("[") else np.array(_integers(ids))
    places = dict(
        zip(shape, np.unravel_index(np.arange(count), tuple(shape.values())), strict=True)
    )
    # A part of an axis, as in 'a':(2)4, is the 4 in a reshape of the axis to 2 x 4 x the rest.
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        size = int(part or shape[name])
        rest = shape[name] // (int(before or 1) * size)
        places[name] = places[name] - places[name] // rest % size * rest
    keys = np.stack(list(places.values()), axis=1)
    for key in np.unique(keys, axis=0):
        yield devices.ravel()[(keys == key).all(axis=1)].tolist()


def _iota(text: str) -> np.ndarray:
    """Return the array that "[4,2]T(1,0)" stands for."""
    shape, _, order = text.partition("]")
    dims = _integers(shape.strip("["))
    array = np.arange(math.prod(dims)).reshape(dims)
    return array.transpose(_integers(order.strip("T()"))) if order else array


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
