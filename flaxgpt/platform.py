"""What flaxgpt does differently on each platform. Model code names no platform."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from flaxgpt.typing import Params

CacheLayout = Literal["separate", "merged", "joined"]
"""How a `KVCache` stores batch (B), slots (S), heads (N) and their elements (H): `[B, N, S, H]`,
merged batch and heads as `[B*N, S, H]`, or joined heads as `[B, S, N*H]`."""

ByDtype = tuple[tuple[str, Any], ...]
"""Pairs of a dtype to compute in and a choice."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """The choices made for one kind of device. Hashable, so it can be a static argument."""

    cache_layout: CacheLayout = "separate"
    attention: ByDtype = ()  # what `attention="auto"` selects; "plain" for other dtypes
    least_rows: ByDtype = ()  # rows that a matrix product has at least; 1 for other dtypes
    round_products: bool = False  # whether narrow products are computed in float32, then rounded
    round_to_int8: bool = True  # whether the activations that meet int8 weights are rounded too
    lookup_by_bits: bool = False  # whether rows of a narrow table are looked up as integers
    fused_qkv: bool = False  # whether decoding computes query, key and value by one product
    one_pass_norms: bool = False  # mean and variance from one pass over the numbers
    loss_positions: int | None = None  # whose logits a training step holds at once; None for all
    prompt_positions: int = 2**13  # positions of prompts that are read at once, or one prompt
    cudnn: bool = False  # whether `jax.nn.dot_product_attention` may use cuDNN
    interpreted: bool = True  # whether Pallas kernels for TPU are interpreted, not compiled
    decode_options: tuple[tuple[str, str], ...] = ()  # of XLA for the decoding loop: (name, value)
    plan_options: tuple[tuple[str, str], ...] = ()  # for programs that are only read, never run
    largest_array: int = 2**26  # elements that evaluation should allocate: 256 MiB in float32

    def attention_in(self, dtype: DTypeLike) -> str:
        """Return the attention implementation for a dtype to compute in."""
        return dict(self.attention).get(jax.numpy.dtype(dtype).name, "plain")

    def rows_in(self, dtype: DTypeLike) -> int:
        """Return how many rows a matrix product in a dtype should have at least."""
        return dict(self.least_rows).get(jax.numpy.dtype(dtype).name, 1)

    def prompts_at_once(self, width: int) -> int:
        """Return how many prompts of this many ids are read at once, if there are as many."""
        return max(1, self.prompt_positions // width)

    def over_devices(self) -> Platform:
        """Return the choices for arrays whose batch and heads are split over several devices."""
        return dataclasses.replace(self, cache_layout="separate", fused_qkv=False)


# Before jax 0.10, XLA:CPU multiplied one row of int8 faster than several.
_INT8_ROWS: ByDtype = (("int8", 2),) if jax.__version_info__ >= (0, 10) else ()

PLATFORMS = {
    "cpu": Platform(
        # XLA:CPU copies a [B, N, S, H] buffer whole each time a loop writes one slot, but updates
        # [B*N, S, H] in place: one row of GPT-2 decodes 10 to 20 % faster.
        cache_layout="merged",
        # XLA:CPU multiplies one narrow row in a naive loop: GPT-2's head takes 128 ms instead of 8.
        least_rows=(("bfloat16", 2), ("float16", 2), *_INT8_ROWS),
        # For a narrow result it converts the factors to float32, and keeps such copies of all
        # weights beside a loop.
        round_products=True,
        # It also converts a narrow table whole to float32 before it looks up rows.
        lookup_by_bits=True,
        # Products of more positions are no faster, and their activations take more memory.
        prompt_positions=1024,
        # From jax 0.11 on, this pass takes the loop body for a small one, and runs one thread.
        decode_options=(("xla_disable_hlo_passes", "small-while-loop-hoisting"),),
        # The same program in a third of the time: only its machine code is not optimized.
        plan_options=(("xla_backend_optimization_level", "0"),),
        # 16 MiB. From 32 MiB on, glibc maps every array afresh: a small model is 20 to 30 % slower.
        largest_array=2**22,
    ),
    # Reasons are estimates of XLA's compiler for v5e, GPT-2 124M; docs/tpu.md has the figures.
    "tpu": Platform(
        # Arrays are tiles of 8 x 128 numbers, and a head of 64 elements fills only half of one.
        cache_layout="joined",
        # Float32 stays plain, because a kernel need not follow `jax_default_matmul_precision`.
        attention=(("bfloat16", "splash"),),
        # Fewer rows than a tile has are multiplied by the vector unit: the head takes 18 times as
        # long for one row as for 8.
        least_rows=(("float32", 8), ("bfloat16", 8), ("float16", 8)),
        # To round them takes four operations per product, each of which costs over a microsecond.
        round_to_int8=False,
        # One product of 8 rows waits for memory once instead of three times.
        fused_qkv=True,
        # Each operation costs over a microsecond, and this form of a norm has two fewer.
        one_pass_norms=True,
        loss_positions=2048,
        interpreted=False,
    ),
    # NVIDIA GPUs from compute capability 8.0 (Ampere) on, which cuDNN's attention requires.
    "cuda": Platform(
        attention=(("bfloat16", "dot_product"), ("float16", "dot_product")), cudnn=True
    ),
}
"""Platforms that need other choices than the default."""


def platform_of(params: Params | None = None) -> Platform:
    """Return the choices for the devices that hold `params`, a pytree of arrays.

    For no arrays, tracers or NumPy arrays, that is the mesh in force or else JAX's default device.
    """
    leaf = next(iter(jax.tree.leaves(params)), None)
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return PLATFORMS.get(_default(), Platform())
    devices = leaf.devices()
    platform = PLATFORMS.get(_name(next(iter(devices))), Platform())
    return platform.over_devices() if len(devices) > 1 else platform


def _default() -> str:
    # A mesh may be of other devices than the default one, even of devices that are not attached,
    # for which a program is only compiled. Of GPUs it does not tell the compute capability.
    mesh: Any = jax.sharding.get_abstract_mesh()
    kind = getattr(getattr(mesh, "abstract_device", None), "device_kind", "")
    if kind == "cpu" or kind.startswith("TPU"):
        return kind[:3].lower()
    config: Any = jax.config
    device = config.jax_default_device  # a device, the name of a platform, or None
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return _name(device)


def _name(device: Any) -> str:
    """Return the key of `PLATFORMS` for a device, or JAX's name of its platform."""
    if device.platform != "gpu":
        return device.platform
    capability = getattr(device, "compute_capability", "")  # such as 9.0, or gfx942 of AMD
    return "cuda" if capability.split(".")[0].isdecimal() and float(capability) >= 8 else "gpu"
