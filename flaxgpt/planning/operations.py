"""Estimated time of the operations of a program for TPU, from the compiler's own figures.

The rule. The compiler states the compute cycles of most instructions (`estimated_cycles`), which do
not include waiting for HBM. The time of an operation is therefore the larger of two: its cycles
over the clock, and its HBM traffic (see `flaxgpt.planning.traffic`) over the bandwidth. Transfers
that the compiler starts early (`copy-start`, `slice-start`) run beside other operations and take no
time of their own. The time of a step is the larger of the sum over its operations, and all of its
traffic over the bandwidth.

The compiler states no cycles for Pallas kernels; see `flaxgpt.planning.kernels`.

A loop counts as often as it runs, if that is known, or once. A conditional counts as its cheapest
branch; in `generate` that is greedy decoding. The time that data takes between chips is not
included; what they must receive over the bandwidth of their links is reported beside it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from flaxgpt.planning.chips import Chip
from flaxgpt.planning.kernels import kernel_cycles
from flaxgpt.planning.model_parts import OTHER, part_of
from flaxgpt.planning.program_text import Computation, Instruction, Program
from flaxgpt.planning.traffic import hbm_bytes, is_asynchronous

_DEPTH = 4  # users of users to ask which part of the model an instruction belongs to


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of one name in all blocks, in one step. All figures are estimated.

    Attributes:
        part: the part of the model, such as "attention" or "attention, backward".
        name: the operation in it, such as "W_query/dot_general".
        cycles: compute cycles.
        bytes: traffic between HBM and the core.
        seconds: the time they take.
        count: how many there are.
    """

    part: str
    name: str
    cycles: int
    bytes: int
    seconds: float
    count: int


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The estimated time of a step, on each chip.

    Attributes:
        cycles: compute cycles.
        seconds: the time.
        hbm_seconds: the time that HBM traffic alone takes.
        transfer_seconds: the least time in which a chip can receive what others send it, with all
            of its links busy. It is not part of `seconds`, as it may overlap with computation.
    """

    cycles: int
    seconds: float
    hbm_seconds: float
    transfer_seconds: float = 0.0


def operations(
    program: Program, computation: str, chip: Chip, without: frozenset[str] = frozenset()
) -> tuple[Operation, ...]:
    """Return the operations that a computation runs, the longest first.

    Args:
        program: the program, compiled for TPU.
        computation: the name of the computation.
        chip: the chip that it was compiled for.
        without: names of instructions to leave out, such as a loop.
    """
    sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0, 0])
    for owner, one, times in _executed(program, computation, without):
        cycles = one.cycles or kernel_cycles(one, chip)
        moved = hbm_bytes(program, owner, one)
        if not cycles and not moved:
            continue
        total = sums[_part(program, owner, one)]
        total[0] += times * cycles
        total[1] += times * moved
        total[2] += times * _seconds(chip, one, cycles, moved)
        total[3] += times
    found = [
        Operation(part, name, int(cycles), int(moved), seconds, int(count))
        for (part, name), (cycles, moved, seconds, count) in sums.items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.seconds, -item.bytes, item.name)))


def step_time(found: tuple[Operation, ...], chip: Chip, received: int = 0) -> StepTime:
    """Return the time of a step with these operations, in which each chip receives some bytes."""
    hbm_seconds = sum(one.bytes for one in found) / chip.bandwidth
    seconds = max(sum(one.seconds for one in found), hbm_seconds)
    cycles = sum(one.cycles for one in found)
    return StepTime(cycles, seconds, hbm_seconds, received / chip.link_bandwidth)


def skipped_branches(program: Program) -> frozenset[str]:
    """Return the computations that are branches of a conditional, but not the cheapest."""
    return frozenset(
        name
        for computation in program.computations.values()
        for one in computation.instructions
        if one.opcode == "conditional"
        for name in sorted(_branches(one), key=lambda name: _cost(program, name))[1:]
    )


def loops(program: Program) -> list[Instruction]:
    """Return the loops at the top of a program in which the model runs, the shortest body first."""

    def runs_model(computation: str) -> bool:
        return any("GPT." in one.op_name for _, one, _ in _executed(program, computation))

    def cycles(loop: Instruction) -> int:
        return sum(n * one.cycles for _, one, n in _executed(program, loop.called("body")[0]))

    entry = program.computations[program.entry].instructions
    found = [one for one in entry if one.opcode == "while" and runs_model(one.called("body")[0])]
    return sorted(found, key=cycles)


def _seconds(chip: Chip, one: Instruction, cycles: int, moved: int) -> float:
    if is_asynchronous(one):
        return 0.0
    return max(cycles / chip.clock, moved / chip.bandwidth)


def _executed(
    program: Program, computation: str, without: frozenset[str] = frozenset(), times: int = 1
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yield what a computation runs: the owner, the instruction, and how often."""
    owner = program.computations[computation]
    for one in owner.instructions:
        if one.name in without:
            continue
        yield owner, one, times
        if one.opcode == "while":
            for body in one.called("body"):
                yield from _executed(program, body, without, times * program.trip_count(owner, one))
        elif one.opcode == "call":
            for body in one.called("to_apply", "calls"):
                yield from _executed(program, body, without, times)
        elif one.opcode == "conditional" and (branches := _branches(one)):
            cheapest = min(branches, key=lambda name: _cost(program, name))
            yield from _executed(program, cheapest, without, times)


def _branches(conditional: Instruction) -> list[str]:
    return conditional.called("branch_computations", "true_computation", "false_computation")


def _cost(program: Program, computation: str) -> int:
    return sum(times * one.cycles for _, one, times in _executed(program, computation))


def _part(program: Program, owner: Computation, one: Instruction) -> tuple[str, str]:
    """Return the part and name of an instruction; one without a path belongs to what it is for."""
    path = one.op_name
    if not path and one.opcode == "fusion":
        inner = program.computations[one.called("calls")[0]]
        path = inner.root.op_name or next(
            (each.op_name for each in reversed(inner.instructions) if each.op_name), ""
        )
    if path:
        return part_of(path)
    path = _path_of_user(owner, one, _DEPTH)
    name = "transfers to the core" if is_asynchronous(one) else one.opcode
    return part_of(path)[0] if path else OTHER, name


def _path_of_user(owner: Computation, one: Instruction, depth: int) -> str:
    for user in owner.users[one.name] if depth else ():
        if path := user.op_name or _path_of_user(owner, user, depth - 1):
            return path
    return ""
