"""HBM traffic of one instruction: the bytes that it reads from and writes to main memory.

- Arrays count with their padding to tiles, and only those in HBM: what is in the core's own memory
  (VMEM and SMEM, another memory space in the layout) is free.
- A slice, a gather and the part of a fusion that only slices or gathers an array read as much as
  they take from it.
- A `dynamic-update-slice` writes in place, so it reads and writes the update alone. So does a
  fusion that ends in one.
- Copies and slices into VMEM that run beside other operations (`copy-start`, `slice-start`) move
  their data once. What waits for them (`-done`) moves nothing.
- Collectives read their operands and write their results, where these are in HBM.
"""

from __future__ import annotations

from flaxgpt.planning.program_text import Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "while", "conditional", "call", "domain"),
}
# Custom calls that only name an array, or parts that lie beside each other.
_NAMES = ('"ConcatBitcast"', '"AllocateBuffer"', '"Sharding"', '"AssumeGatherIndicesInBound"')
_TRANSPARENT = ("bitcast", "reshape", "convert", "copy", "get-tuple-element")
_PASSED_ON = ("tuple", "all-gather", "all-reduce", "reduce-scatter", "all-to-all")


def is_asynchronous(instruction: Instruction) -> bool:
    """Whether an instruction only starts a transfer, which goes on beside the next ones."""
    return instruction.opcode.endswith("-start")


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction of a computation moves between HBM and the core."""
    opcode, arrays = instruction.opcode, instruction.arrays
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and any(name in instruction.attributes for name in _NAMES):
        return 0
    if opcode in ("copy-start", "slice-start"):
        # The results are source and destination, in either order, and a flag.
        taken = min(arrays[:2], key=lambda array: array.padded).padded
        return sum(taken for array in arrays[:2] if array.in_hbm)
    operands = [computation.by_name.get(name) for name in instruction.operands]
    if is_asynchronous(instruction):
        arrays = arrays[len(operands) :] if len(arrays) > len(operands) else arrays
    if opcode == "dynamic-update-slice":
        update = operands[1].arrays[0] if operands[1] else arrays[0]
        return sum(update.padded for array in (update, arrays[0]) if array.in_hbm)
    written = _in_hbm(instruction) if not is_asynchronous(instruction) else 0
    if is_asynchronous(instruction):
        written = sum(array.padded for array in arrays if array.in_hbm)
    if opcode in ("slice", "dynamic-slice", "gather"):
        source = operands[0]
        read = arrays[0].padded if source is None or _in_hbm(source) else 0
        return written + read + sum(_in_hbm(one) for one in operands[1:] if one)
    called = instruction.called("calls") if opcode == "fusion" else []
    if not called:
        unique = {one.name: one for one in operands if one}
        return written + sum(map(_in_hbm, unique.values()))
    body = program.computations[called[0]]
    read = 0
    for place, one in enumerate(operands):
        if one is not None and (whole := _in_hbm(one)) and place in body.parameters:
            read += min(whole, _read_of(program, body, body.parameters[place], whole))
    return read + _written(program, body, instruction)


def _in_hbm(instruction: Instruction) -> int:
    return sum(array.padded for array in instruction.arrays if array.in_hbm)


def _read_of(program: Program, body: Computation, value: Instruction, whole: int) -> int:
    """Return the bytes that a fusion reads of a value in it that has `whole` bytes."""
    total = 0
    for user in body.users[value.name]:
        place = user.operands.index(value.name)
        if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
            total += user.arrays[0].padded
        elif (user.opcode in ("dynamic-update-slice", "scatter") and place == 0) or (
            user.opcode in _PASSED_ON
        ):
            continue  # what is updated in place is not read, nor is what is passed on
        elif user.opcode in _TRANSPARENT and not user.is_root:
            total += _read_of(program, body, user, whole)
        elif user.opcode == "fusion" and user.called("calls"):
            inner = program.computations[user.called("calls")[0]]
            total += _read_of(program, inner, inner.parameters[place], whole)
        else:
            return whole
    return total


def _written(program: Program, body: Computation, fusion: Instruction) -> int:
    """Return the bytes that a fusion writes: all of its results, or updates in place."""
    roots = [body.root]
    if body.root.opcode == "tuple":
        roots = [body.by_name[name] for name in body.root.operands]
    arrays = fusion.arrays
    if len(roots) != len(arrays):  # nested tuples
        return _in_hbm(fusion)
    total = 0
    for root, array in zip(roots, arrays, strict=True):
        if not array.in_hbm or root.opcode == "parameter":  # a parameter is passed on
            continue
        total += min(array.padded, _update_of(program, body, root) or array.padded)
    return total


def _update_of(program: Program, body: Computation, root: Instruction) -> int:
    """Return the bytes of an update in place that a value is, or 0 for other values."""
    while root.opcode in ("bitcast", "convert", "reshape") and root.operands[0] in body.by_name:
        root = body.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        update = body.by_name.get(root.operands[1])
        return update.arrays[0].padded if update else 0
    if root.opcode == "fusion" and root.called("calls"):
        inner = program.computations[root.called("calls")[0]]
        return _update_of(program, inner, inner.root)
    return 0
