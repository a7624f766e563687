"""Attention by `jax.nn.dot_product_attention`, on NVIDIA GPUs by cuDNN where it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flaxgpt.model.visibility import Visibility

_LARGEST_HEAD = 128  # of cuDNN before Hopper


def dot_product_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, T, H]
    values: jax.Array,  # as keys
    visibility: Visibility,  # without `start` and `offset`
    *,
    cudnn: bool,  # whether cuDNN may be used
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query."""
    size = query.shape[-1]
    is_narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    cudnn = cudnn and is_narrow and size % 8 == 0 and size <= _LARGEST_HEAD
    with jax.numpy_dtype_promotion("standard"):  # JAX's function mixes dtypes
        context = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (query, keys, values)),  # [B, T, N, H]
            is_causal=True,
            local_window_size=None if visibility.window is None else (visibility.window - 1, 0),
            implementation="cudnn" if cudnn else None,
        )
    return context.swapaxes(1, 2)
