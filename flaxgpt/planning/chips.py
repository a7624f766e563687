"""The TPU chips that programs can be planned for: clock, peak, memory and bandwidth.

Peak, bandwidth and capacity are those of the Cloud TPU documentation, system architecture:
https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (2026). The clock follows from the
peak: matrix units times 2 x 128 x 128 operations per cycle (2 x 256 x 256 on v6e, two per cycle).
`usable` is what the compiler grants a program, as its message says when a program needs more:
"exceeds available HBM (15.75G)" (libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses

from flaxgpt._checks import unknown_name


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, which is one device in JAX. The two cores of v4 and v5p work as one.

    Attributes:
        name: Google's name, with which a topology begins.
        clock: cycles per second.
        peak_flops: operations per second of bfloat16 products. float32 products at JAX's default
            precision are bfloat16 products too.
        bandwidth: bytes per second between HBM and the cores.
        usable: bytes of HBM that a program can use.
        dimensions: dimensions of a topology.
        options: what the compiler must be told about the chip, besides the topology.
    """

    name: str
    clock: float
    peak_flops: float
    bandwidth: float
    usable: int
    dimensions: int
    options: tuple[tuple[str, str], ...] = ()


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1.5e9, 197e12, 819e9, int(15.75 * 2**30), 2),
        Chip("v6e", 1.75e9, 918e12, 1638e9, int(31.25 * 2**30), 2),
        Chip("v5p", 1.75e9, 459e12, 2765e9, int(95.74 * 2**30), 3),
        # By default, the compiler would take each of the two cores for a device.
        Chip(
            *("v4", 1.05e9, 275e12, 1200e9, int(30.75 * 2**30), 3),
            options=(("chip_config_name", "megacore"),),
        ),
    )
}
"""The chips by name."""


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as "v5e:2x4", or raise ValueError for an unknown one."""
    if not isinstance(topology, str):
        raise ValueError(f"topology={topology!r} must be a string, such as 'v5e:2x4'")
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise unknown_name("TPU", name, CHIPS)
    return CHIPS[name]
