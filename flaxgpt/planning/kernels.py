"""Compute cycles of Pallas kernels, of which the compiler states none.

A kernel may state its operations (`cost_estimate`), which then count at the peak of the chip. JAX's
splash attention states nothing, so its matrix products are counted here: 2 in the forward pass (the
scores, and the means of the values), 3 for the gradient of the queries, and 4 for those of keys and
values, for the blocks of a causal mask. Heads of fewer than 128 elements fill the matrix units only
in part. The softmax is not counted, so the result is a lower bound.
"""

from __future__ import annotations

import re

from flaxgpt.planning.chips import Chip
from flaxgpt.planning.program_text import Instruction

_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_RESULT = re.compile(r"\[(\d+),(\d+),(\d+),(\d+)\]")  # B, N, T, H
_BLOCK = re.compile(r'block_q\w*\\*": (\d+)')
_STATED = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_LANES = 128


def kernel_cycles(instruction: Instruction, chip: Chip) -> int:
    """Return the compute cycles of a kernel, or 0 for other instructions and unknown kernels."""
    if '"tpu_custom_call"' not in instruction.attributes:
        return 0
    operations = 0.0
    result = _RESULT.search(instruction.shape)
    if stated := _STATED.search(instruction.attributes):
        operations = float(stated[1])
    elif (kernel := _SPLASH.match(instruction.name)) and result:
        batch, heads, length, size = map(int, result.groups())
        block = _BLOCK.search(instruction.attributes)
        blocks = max(1, length // int(block[1])) if block else length
        seen = (blocks + 1) / (2 * blocks)  # of all pairs of a query and a key
        width = max(size, _LANES)
        operations = _PRODUCTS[kernel[1]] * 2 * batch * heads * length**2 * width * seen
    return round(operations / chip.peak_flops * chip.clock)
