"""Compute cycles of Pallas kernels, of which the compiler's text states none.

A kernel may state its operations (`cost_estimate`), which then count at the peak of the chip. JAX's
splash attention states nothing. But libtpu can write the schedule of a kernel, one instruction
bundle per cycle: for `LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true"`, the
bundles are in `*schedule-analysis_final_bundles*`. Those of a block of 512 queries and 512 keys are
below; a head of 128 elements takes 4 % more than one of 64. Stalls are not included, and neither is
the start of each block. For other chips, the matrix products count at the peak: 2 in the forward
pass, 3 for the gradient of the queries, and 4 for those of keys and values.
"""

from __future__ import annotations

import re

from flaxgpt.planning.chips import Chip
from flaxgpt.planning.program_text import Instruction

_BUNDLES = {  # of a block of 512 x 512; libtpu 0.0.42
    "v5e": {"fwd": 2135, "dq": 1913, "dkv": 2455},
    "v6e": {"fwd": 1446, "dq": 1340, "dkv": 1641},
}
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_RESULT = re.compile(r"\[(\d+),(\d+),(\d+),(\d+)\]")  # B, N, T, H
_BLOCK = re.compile(r'block_q\w*\\*": (\d+)')
_STATED = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_LANES = 128  # of a matrix unit, which smaller heads fill in part


def kernel_cycles(instruction: Instruction, chip: Chip) -> int:
    """Return the compute cycles of a kernel, or 0 for other instructions and unknown kernels."""
    if '"tpu_custom_call"' not in instruction.attributes:
        return 0
    if stated := _STATED.search(instruction.attributes):
        return round(float(stated[1]) / chip.peak_flops * chip.clock)
    kernel, result = _SPLASH.match(instruction.name), _RESULT.search(instruction.shape)
    if not kernel or not result:
        return 0
    batch, heads, length, size = map(int, result.groups())
    block = _BLOCK.search(instruction.attributes)
    blocks = max(1, length // int(block[1])) if block else length
    seen = (blocks + 1) / (2 * blocks)  # of all pairs of a query and a key
    pairs = batch * heads * length**2 * seen
    if chip.name in _BUNDLES:
        return round(pairs / 512**2 * _BUNDLES[chip.name][kernel[1]])
    operations = _PRODUCTS[kernel[1]] * 2 * pairs * max(size, _LANES)
    return round(operations / chip.peak_flops * chip.clock)
