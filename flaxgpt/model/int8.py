"""int8 weights: a scale per row, and products of int8 numbers with int32 sums.

A weight [out, in] is stored as int8 with one float32 scale per output. Activations are rounded to
int8 as they are computed, with one scale per row. So the scales factor out of the sums of a
product, which are exact ("vector-wise quantization", Dettmers et al. 2022, "LLM.int8()", section
2):

    x @ weight.T  =  (x8 @ weight8.T) * scale_of_x[:, None] * weight_scale[None, :]

Where rounding activations costs more than it gains, as on TPU, only the weights are int8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from flaxgpt._quantized import SCALE
from flaxgpt.model.rows import add_copies, drop_copies
from flaxgpt.platform import Platform

LARGEST = 127  # -128 is left out, so that the range is symmetric


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:  # [..., n] -> [..., n], [...]
    """Round the last axis to int8, and return the float32 scale of each row with it.

    `rows * scales[..., None]` is `x` to within half a scale. The scale of a row of zeros is 1, and
    that of a row with NaN is NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return jnp.round(x / scale).astype(jnp.int8), scale[..., 0]


def restore_rows(rows: jax.Array, scales: jax.Array) -> jax.Array:
    """Return the float32 numbers that `quantize_rows` has rounded."""
    return rows.astype(jnp.float32) * scales[..., None]


def scales_of(module: nn.Module, features: int) -> jax.Array | None:
    """Return the scales of a module's weight, float32 [features], or None if it is not int8."""
    if not module.has_variable("params", SCALE):
        return None
    return module.param(SCALE, nn.initializers.ones_init(), (features,), jnp.float32)


def int8_product(
    x: jax.Array,  # [..., in], in the dtype to compute in
    weight: jax.Array,  # int8 [out, in]
    scales: jax.Array,  # float32 [out]
    platform: Platform,
) -> jax.Array:  # float32 [..., out]
    """Return `x @ weight.T`, with `x` rounded to int8 where the platform gains from it."""
    assert weight.dtype == jnp.int8, weight.dtype
    if x.ndim == 1:
        return int8_product(x[None], weight, scales, platform)[0]
    if not platform.round_to_int8:
        return _flat_dot(x, weight.astype(x.dtype), jnp.float32) * expand(scales, x.ndim)
    rows, of_rows = quantize_rows(x)
    sums = _flat_dot(add_copies(rows, platform), weight, jnp.int32)
    scale = of_rows[..., None] * expand(scales, x.ndim)
    return drop_copies(sums, len(x)).astype(jnp.float32) * scale


def _flat_dot(x: jax.Array, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    # XLA:CPU multiplies narrow numbers fast only if rows are one dimension.
    flat = x.reshape(-1, x.shape[-1])
    product = lax.dot_general(flat, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], -1)


def expand(vector: jax.Array, ndim: int) -> jax.Array:  # [D] -> [1, ..., 1, D]
    """Return a vector as an array whose other axes have one element."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
