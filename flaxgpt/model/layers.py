"""Layers that act on each position separately: Linear, Embedding, LayerNorm, FeedForward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.model.int8 import expand, int8_product, restore_rows, scales_of
from flaxgpt.platform import Platform
from flaxgpt.sharding import constrain, gather_weight

INIT_STD = 0.02  # of every weight matrix (Radford et al. 2018, section 4.1, and GPT-2's code)


class Linear(nn.Module):
    """`x @ weight.T + bias`, with the weight stored `[out, in]` as in PyTorch and the book.

    A weight that comes with scales is int8; see `flaxgpt.model.int8`.

    The order is part of every checkpoint. On two x86 CPUs, `[out, in]` decodes one row 6 to 15 %
    faster than Flax's `[in, out]`, because each output is a dot product along contiguous memory.
    Prefill of 1,024 ids and training steps take the same time in both orders.
    """

    features: int  # size of the output
    use_bias: bool = True
    std: float = INIT_STD  # standard deviation of the initial weight; the initial bias is zero
    dtype: DTypeLike = jnp.float32  # to compute in; parameters keep the dtype they are stored in
    out_dtype: DTypeLike | None = None  # of the result, if more precise than `dtype`
    platform: Platform = Platform()
    letters: str = "FD"  # of the weight's dimensions
    heads: int = 1  # in a dimension "N"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., in] -> [..., out]
        shape = (self.features, x.shape[-1])
        weight = self.param("weight", nn.initializers.normal(self.std), shape, jnp.float32)
        x, scales = x.astype(self.dtype), scales_of(self, self.features)
        weight = weight.astype(self.dtype) if scales is None else weight
        weight = gather_weight(weight, self.letters, x.size // x.shape[-1], self.heads)
        if scales is None:
            y = _product(x, weight, self.out_dtype, self.platform.round_products)
        else:
            y = int8_product(x, weight, scales, self.platform).astype(self.out_dtype or self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + expand(bias.astype(y.dtype), y.ndim)
        return y


class Embedding(nn.Module):
    """A table of rows, looked up by index. An index out of range gives NaN, never another row."""

    rows: int
    features: int  # size of a row
    dtype: DTypeLike = jnp.float32  # of the result; the table keeps the dtype it is stored in
    letters: str = "VD"  # of the dimensions
    platform: Platform = Platform()

    def setup(self) -> None:
        shape = (self.rows, self.features)
        self.weight = self.param("weight", nn.initializers.normal(INIT_STD), shape, jnp.float32)
        self.scales = scales_of(self, self.rows)  # of a weight in int8

    def __call__(self, index: jax.Array) -> jax.Array:  # int [B, T] -> [B, T, features]
        # A gather counts negative indices from the end, so they are moved out of range first. In a
        # narrow dtype such as int8 that place would itself wrap around, hence int32.
        index = index.astype(jnp.int32)
        index = jnp.where(index < 0, self.rows, index)
        # On a mesh, a table that is split by columns is gathered, not the rows of other devices.
        weight, index = constrain(self.weight, self.letters), constrain(index, "BT")
        if self.scales is not None:
            rows = weight.at[index].get(mode="fill", fill_value=0)
            return restore_rows(rows, _rows(self.scales, index)).astype(self.dtype)
        by_bits = self.platform.lookup_by_bits and weight.dtype.itemsize == 2
        rows = (_rows_by_bits if by_bits else _rows)(weight, index)
        return rows.astype(self.dtype)

    def project(self, x: jax.Array) -> jax.Array:  # [..., features] -> [..., rows]
        """Return the dot product of `x` with every row, float32: a tied model's output head."""
        if self.scales is not None:
            x = x.astype(self.dtype)
            return int8_product(x, self.weight, self.scales, self.platform)
        return _product(x.astype(self.dtype), self.weight.astype(self.dtype), jnp.float32)


class LayerNorm(nn.Module):
    """Normalize the last axis to zero mean and unit variance, then scale and shift (section 4.2).

    The variance is the biased one (divided by n), as in the book and GPT-2. Statistics are computed
    in float32 whatever `dtype` is.
    """

    eps: float = 1e-5  # added to the variance
    use_bias: bool = True  # whether to shift
    dtype: DTypeLike = jnp.float32  # of the result
    one_pass: bool = False  # variance as mean(x^2) - mean(x)^2, less exact where the mean is large

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean = x.mean(axis=-1, keepdims=True)
        centered = x - mean
        if self.one_pass:
            variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
            variance = jnp.maximum(variance, 0.0)
        else:
            variance = jnp.square(centered).mean(axis=-1, keepdims=True)
        y = centered * lax.rsqrt(variance + self.eps) * expand(scale.astype(x.dtype), x.ndim)
        if self.use_bias:
            shift = self.param("shift", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
            y = y + expand(shift.astype(x.dtype), x.ndim)
        return y.astype(self.dtype)


class FeedForward(nn.Module):
    """Expand to four times the width, apply GELU, and project back (section 4.3).

    `layers_0` and `layers_2` are the book's `layers.0` and `layers.2`. GELU is x times the normal
    distribution function, or its tanh approximation 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    (Hendrycks & Gimpel 2016).
    """

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32
    platform: Platform = Platform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        cfg = self.cfg
        linear = partial(Linear, dtype=self.dtype, platform=self.platform)
        wide = linear(cfg.ff_dim, cfg.bias, name="layers_0")(x)  # [B, T, F]
        wide = constrain(wide, "BTF")
        active = nn.gelu(wide, approximate=cfg.activation == "gelu_tanh")
        std = residual_std(cfg)
        return linear(cfg.emb_dim, cfg.bias, std, letters="DF", name="layers_2")(active)


def residual_std(cfg: GPTConfig) -> float:
    """Return the initial standard deviation of projections added to the residual stream."""
    # GPT-2 divides by the square root of the number of additions, two per block, so that the
    # variance of the stream does not grow with depth (Radford et al. 2019, section 2.3).
    return INIT_STD / (2 * cfg.n_layers) ** 0.5


def _product(
    x: jax.Array, weight: jax.Array, dtype: DTypeLike | None, rounded: bool = False
) -> jax.Array:
    """Return `x @ weight.T` without a transpose: [..., in], [out, in] -> [..., out]."""
    rounded = rounded and dtype is None and x.dtype != jnp.float32
    if not rounded and dtype in (None, x.dtype) and 1 not in x.shape[1:-1]:
        return _dot(x, weight, dtype)
    # With more than one dimension of rows, XLA:CPU of jax 0.7 does not multiply bfloat16 into
    # float32, and for [B, 1, D] it transposes the weight in each step of a loop.
    rows = x.reshape(-1, x.shape[-1])
    product = _rounded_dot(rows, weight) if rounded else _dot(rows, weight, dtype)
    return product.reshape(*x.shape[:-1], -1)


def _dot(x: jax.Array, weight: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    return lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
    )


@jax.custom_jvp
def _rounded_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return a product in the dtype of its narrow factors, computed in float32."""
    return _dot(x, weight, jnp.float32).astype(x.dtype)


@_rounded_dot.defjvp
def _rounded_dot_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Not the derivative of the float32 product, which would multiply float32 by narrow numbers.
    (x, weight), (d_x, d_weight) = primals, tangents
    return _rounded_dot(x, weight), _dot(d_x, weight) + _dot(x, d_weight)


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


@jax.custom_jvp
def _rows_by_bits(table: jax.Array, index: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(table, jnp.uint16)
    missing = int(np.array(np.nan, table.dtype).view(np.uint16))
    rows = bits.at[index].get(mode="fill", fill_value=missing)
    return lax.bitcast_convert_type(rows, table.dtype)


@_rows_by_bits.defjvp
def _rows_by_bits_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (table, index), (d_table, _) = primals, tangents
    return _rows_by_bits(table, index), d_table.at[index].get(mode="fill", fill_value=0)
