"""The published peaks of accelerators, to compare measurements with."""

from __future__ import annotations

import dataclasses
import re

from flaxgpt.planning import CHIPS


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one device can do at most.

    Attributes:
        bfloat16: operations per second of dense bfloat16 matrix products.
        float32: the same of float32 products at JAX's default precision: bfloat16 inputs on TPU,
            TensorFloat-32 on NVIDIA GPUs that have it.
        bandwidth: bytes per second between the device and its memory.
        source: where the figures are published.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    source: str

    def flops(self, dtype: str) -> float:
        """Return the peak of matrix products in `dtype`, "bfloat16" or "float32"."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA's data sheet (figures with sparsity halved): "

# The first pattern that matches JAX's `device_kind` counts.
PEAKS = {
    **{
        "|".join(chip.kinds): Peak(
            bfloat16=chip.peak_flops,
            float32=chip.peak_flops,
            bandwidth=chip.bandwidth,
            source=_GOOGLE + chip.name,
        )
        for chip in CHIPS.values()
    },
    r".*\bH200\b.*": Peak(989e12, 494e12, 4800e9, _NVIDIA + "H200 SXM"),
    r".*\bH100 PCIe\b.*": Peak(756e12, 378e12, 2000e9, _NVIDIA + "H100 PCIe"),
    r".*\bH100 NVL\b.*": Peak(835e12, 417e12, 3900e9, _NVIDIA + "H100 NVL"),
    r".*\bH100\b.*": Peak(989e12, 494e12, 3350e9, _NVIDIA + "H100 SXM"),
    r".*\bA100-SXM4-40GB\b.*": Peak(312e12, 156e12, 1555e9, _NVIDIA + "A100 40GB"),
    r".*\bA100-PCIE-40GB\b.*": Peak(312e12, 156e12, 1555e9, _NVIDIA + "A100 40GB"),
    r".*\bA100-SXM4-80GB\b.*": Peak(312e12, 156e12, 2039e9, _NVIDIA + "A100 80GB SXM"),
    r".*\bA100 80GB PCIe\b.*": Peak(312e12, 156e12, 1935e9, _NVIDIA + "A100 80GB PCIe"),
    r".*\bL4\b.*": Peak(121e12, 60e12, 300e9, _NVIDIA + "L4"),
    # Without bfloat16 and TensorFloat-32: the tensor cores' float16, and float32.
    r".*\bT4\b.*": Peak(65e12, 8.1e12, 320e9, _NVIDIA + "T4 (float16 for bfloat16)"),
}


def published_peak(device_kind: str) -> Peak | None:
    """Return the peak of a device by JAX's name for its kind, or None if the table lacks it."""
    if "MIG" in device_kind:  # a part of a GPU
        return None
    matching = (peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, device_kind))
    return next(matching, None)
