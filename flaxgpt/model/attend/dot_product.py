"""Attention by `jax.nn.dot_product_attention`, on NVIDIA GPUs by cuDNN where it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flaxgpt.model.visibility import Visibility

_LARGEST_HEAD = 128  # of cuDNN before Hopper


def dot_product_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H], [B*N, S, H] or [B, S, N*H]
    values: jax.Array,  # as keys
    visibility: Visibility,
    *,
    cudnn: bool,  # whether cuDNN may be used
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query."""
    batch, heads, queries, size = query.shape

    def by_slot(x: jax.Array) -> jax.Array:  # [B, S, N, H]
        if x.shape[-1] != size:
            return x.reshape(*x.shape[:2], heads, size)
        return x.reshape(batch, heads, -1, size).swapaxes(1, 2)

    query, keys, values = query.swapaxes(1, 2), by_slot(keys), by_slot(values)
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    if cudnn and narrow and size % 8 == 0 and size <= _LARGEST_HEAD and visibility.is_causal:
        before = None if visibility.window is None else (visibility.window - 1, 0)
        context = jax.nn.dot_product_attention(
            query,
            keys,
            values,
            is_causal=True,
            local_window_size=before,
            implementation="cudnn",
        )
    else:
        mask = visibility.mask(range(queries), range(keys.shape[1]))
        context = jax.nn.dot_product_attention(query, keys, values, mask=mask)
    return context.swapaxes(1, 2)
