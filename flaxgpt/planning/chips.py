"""The TPU chips that programs can be planned for: clock, peak, memory and bandwidth.

Peak, bandwidth and capacity are those of the Cloud TPU documentation, system architecture:
https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (2026). So is the bandwidth of the
links between chips (ICI): half of the bidirectional 400, 800 and 1,200 GB/s of v5e, v6e and v5p is
what a chip can receive, which earlier editions stated as 1,600, 3,200 and 4,800 Gbit/s. The page
of v4 states none for a chip, which has six links of 50 GB/s per direction (Jouppi et al. 2023,
"TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning"). The clock follows from
the peak: matrix units times 2 x 128 x 128 operations per cycle (2 x 256 x 256 on v6e, two per
cycle).
`usable` is what the compiler grants a program, as its message says when a program needs more:
"exceeds available HBM (15.75G)" (libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses
import math

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
        link_bandwidth: bytes per second that a chip receives from others if all of its links are
            busy. In a small topology some are not connected.
        usable: bytes of HBM that a program can use.
        dimensions: dimensions of a topology.
        kinds: JAX's names for it, its `device_kind`.
        options: what the compiler must be told about the chip, besides the topology.
    """

    name: str
    clock: float
    peak_flops: float
    bandwidth: float
    link_bandwidth: float
    usable: int
    dimensions: int
    kinds: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            clock=1.5e9,
            peak_flops=197e12,
            bandwidth=819e9,
            link_bandwidth=200e9,
            usable=int(15.75 * 2**30),
            dimensions=2,
            kinds=("TPU v5 lite", "TPU v5e"),
        ),
        Chip(
            name="v6e",
            clock=1.75e9,
            peak_flops=918e12,
            bandwidth=1638e9,
            link_bandwidth=400e9,
            usable=int(31.25 * 2**30),
            dimensions=2,
            kinds=("TPU v6 lite", "TPU v6e"),
        ),
        Chip(
            name="v5p",
            clock=1.75e9,
            peak_flops=459e12,
            bandwidth=2765e9,
            link_bandwidth=600e9,
            usable=int(95.74 * 2**30),
            dimensions=3,
            kinds=("TPU v5", "TPU v5p"),
        ),
        Chip(
            name="v4",
            clock=1.05e9,
            peak_flops=275e12,
            bandwidth=1200e9,
            link_bandwidth=300e9,
            usable=int(30.75 * 2**30),
            dimensions=3,
            kinds=("TPU v4",),
            # By default, the compiler would take each of the two cores for a device.
            options=(("chip_config_name", "megacore"),),
        ),
    )
}
"""The chips by name."""


def chip_count(topology: str) -> int:
    """Return the number of chips of a topology such as "v5e:2x4"."""
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology such as "v5e:2x4", or raise ValueError for an unknown one."""
    if not isinstance(topology, str):
        raise ValueError(f"topology={topology!r} must be a string, such as 'v5e:2x4'")
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise unknown_name("TPU", name, CHIPS)
    return CHIPS[name]
