"""The text of a compiled program, parsed into computations and instructions.

A line of XLA's text is one instruction:

    %name = f32[8,128]{1,0:T(8,128)S(1)} opcode(%operand, %other), calls=%computation, ...

The braces after a shape hold its layout: dimensions from minor to major, the tiles that they are
padded to, and the memory space. Without a space, an array is in HBM (on TPU).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) .*\{\s*$")
_START = re.compile(r"\s+(?:ROOT )?%?\S+ = ")
# Operation names precede "(", as do letters of layouts, but only these follow a blank.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALL = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_ARRAY = re.compile(r"\b([a-z]+(\d*)[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a shape.

    Attributes:
        size: bytes without padding.
        padded: bytes in memory, with every dimension a multiple of its tile.
        in_hbm: whether it is in the device's main memory.
    """

    size: int
    padded: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. `shape` and `attributes` are text, the latter all that follows operands."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, in order, without the nesting of tuples."""
        return read_arrays(self.shape)

    @functools.cached_property
    def calls(self) -> tuple[tuple[str, str], ...]:
        """The computations that are called, as pairs of attribute and name."""
        return tuple(
            (field, name)
            for field, several, one in _CALL.findall(self.attributes)
            for name in re.findall(r"[\w.\-]+", several or one)
        )

    @property
    def cycles(self) -> int:
        """The compiler's estimate of compute cycles (on TPU), or 0."""
        return _number(_CYCLES, self.attributes, 0)

    @property
    def index(self) -> int:
        """Which element a `get-tuple-element` takes, or the number of a parameter."""
        return _number(_INDEX, self.attributes, 0)

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it computes, or ""."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    def called(self, *fields: str) -> list[str]:
        """Return the computations called by these attributes."""
        return [name for field, name in self.calls if field in fields]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, such as the body of a loop."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The instructions that have an operand, by the operand's name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((one for one in self.instructions if one.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """The parameters by number."""
        return {int(one.operands[0]): one for one in self.instructions if one.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program by name, and the name of the first one to run."""

    entry: str
    computations: Mapping[str, Computation]

    def trip_count(self, owner: Computation, loop: Instruction) -> int:
        """Return how often a loop in a computation runs, 1 where that is not known.

        XLA for CPU and GPU states it. For TPU it is read from the condition, if that compares a
        counter with a constant, as that of `lax.scan` does.
        """
        if stated := _number(_TRIP_COUNT, loop.attributes, 0):
            return stated
        condition = self.computations.get("".join(loop.called("condition")), Computation("", ()))
        test = condition.root if condition.instructions else loop
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return 1
        counter, limit = (condition.by_name.get(name) for name in test.operands)
        last = _constant(condition, limit)
        if counter is None or counter.opcode != "get-tuple-element" or last is None:
            return 1
        carry = owner.by_name.get(loop.operands[0])
        first = None
        if carry is not None and carry.opcode == "tuple":
            first = _constant(owner, owner.by_name.get(carry.operands[counter.index]))
        return max(1, last - (first or 0))


def parse(text: str) -> Program:
    """Parse the text of a compiled program, from `compiled.as_text()`."""
    entry = name = ""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not name:
            if (start := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                name = start[2]
                found[name] = []
                entry = name if start[1] else entry
        elif line == "}":
            name = ""
        elif _START.match(line) or not found[name]:
            found[name].append(line)
        else:  # attributes of kernels contain line breaks
            found[name][-1] += f" {line}"
    computations = {name: tuple(map(_instruction, lines)) for name, lines in found.items()}
    return Program(entry, {name: Computation(name, rows) for name, rows in computations.items()})


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(_COMMENT.sub("", line))
    if match is None:
        raise ValueError(f"not an instruction of XLA: {line[:100]!r}")
    root, name, shape, opcode, rest = match.groups()
    operands, attributes = _operands(rest)
    return Instruction(name, opcode, shape, operands, attributes, root is not None)


def read_arrays(shape: str) -> tuple[Array, ...]:
    """Return the arrays of a shape, such as "(f32[2]{0}, (bf16[4]{0:T(1024)S(1)}, u32[]))"."""
    return tuple(_array(*array) for array in _ARRAY.findall(shape))


def _array(dtype: str, bits: str, dims: str, layout: str) -> Array:
    # Types without bits are bool, or tokens and such.
    bits_each = int(bits) if bits else 8 * (dtype == "pred")
    sizes = [int(size) for size in dims.replace("<=", "").split(",") if size]
    order = [int(axis) for axis in re.findall(r"\d+", layout.partition(":")[0])]
    physical = [sizes[axis] for axis in reversed(order)] if len(order) == len(sizes) else sizes
    if tile := _TILE.search(layout):
        lengths = [int(length) for length in tile[1].split(",")]
        physical = [1] * (len(lengths) - len(physical)) + physical
        for place, length in enumerate(reversed(lengths), 1):
            physical[-place] = -(-physical[-place] // length) * length
    space = _SPACE.search(layout)
    return Array(
        size=-(-bits_each * math.prod(sizes) // 8),
        padded=-(-bits_each * math.prod(physical) // 8),
        in_hbm=space is None or space[1] == "0",
    )


def _operands(rest: str) -> tuple[tuple[str, ...], str]:
    """Return the operands' names, and the text after the parenthesis that closes them."""
    depth, parts = 0, [""]
    for place, letter in enumerate(rest):
        if letter == ")" and not depth:
            names = tuple(part.split()[-1].lstrip("%") for part in parts if part.strip())
            return names, rest[place + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return (), rest


def _constant(owner: Computation, value: Instruction | None) -> int | None:
    """Return the whole number that a value is a constant or a copy of, or None."""
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = owner.by_name.get(value.operands[0])
    if value is None or value.opcode != "constant" or not value.operands:
        return None
    return int(value.operands[0]) if value.operands[0].lstrip("-").isdigit() else None


def _number(pattern: re.Pattern[str], text: str, default: int) -> int:
    match = pattern.search(text)
    return int(match[1]) if match else default
