"""What flaxgpt does differently on each platform. Nothing else names one."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from flaxgpt.typing import Params

CacheLayout = Literal["separate", "merged"]
"""How a `KVCache` stores batch (B) and heads (N): `[B, N, S, H]`, or merged as `[B*N, S, H]`."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """The choices made for one kind of device. Hashable, so it can be a static argument."""

    cache_layout: CacheLayout = "separate"
    attention: str = "plain"  # what `attention="auto"` selects; see `flaxgpt.model.attend`
    decode_options: tuple[tuple[str, str], ...] = ()  # of XLA for the decoding loop: (name, value)
    plan_options: tuple[tuple[str, str], ...] = ()  # for programs that are only read, never run
    largest_array: int = 2**26  # elements that evaluation should allocate: 256 MiB in float32


PLATFORMS = {
    "cpu": Platform(
        # XLA:CPU copies a [B, N, S, H] buffer whole each time a loop writes one slot, but updates
        # [B*N, S, H] in place: one row of GPT-2 decodes 10 to 20 % faster.
        cache_layout="merged",
        # From jax 0.11 on, this pass takes the loop body for a small one, and runs one thread.
        decode_options=(("xla_disable_hlo_passes", "small-while-loop-hoisting"),),
        # The same program in a third of the time: only its machine code is not optimized.
        plan_options=(("xla_backend_optimization_level", "0"),),
        # 16 MiB. From 32 MiB on, glibc maps every array afresh: a small model is 20 to 30 % slower.
        largest_array=2**22,
    ),
}
"""Platforms that need other choices than the default, by JAX's name for them."""


def platform_of(params: Params | None = None) -> Platform:
    """Return the choices for the devices that hold `params`, a pytree of arrays.

    For no arrays, tracers or NumPy arrays, that is JAX's default backend.
    """
    leaf = next(iter(jax.tree.leaves(params)), None)
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return PLATFORMS.get(jax.default_backend(), Platform())
    devices = leaf.devices()
    platform = PLATFORMS.get(next(iter(devices)).platform, Platform())
    if len(devices) > 1:  # which batch and heads are split over, so they stay apart
        platform = dataclasses.replace(platform, cache_layout="separate")
    return platform
