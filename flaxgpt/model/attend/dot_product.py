"""Attention by `jax.nn.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flaxgpt.model.visibility import Visibility


def dot_product_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H] or [B*N, S, H]
    values: jax.Array,  # as keys
    visibility: Visibility,
    dropout: Callable[..., Any] | None,
) -> jax.Array:  # [B, N, T, H]
    """Implement `flaxgpt.model.attend.attend`, except dropout, which JAX's function lacks."""
    if dropout is not None:
        raise ValueError(
            'attention="dot_product" has no dropout on attention weights: use attention="plain", '
            "or set drop_rate_attn=0.0"
        )
    mask = visibility.mask(range(query.shape[2]), range(keys.shape[-2]))
    apart = (*query.shape[:2], *keys.shape[-2:])  # [B, N, S, H]
    context = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        keys.reshape(apart).swapaxes(1, 2),
        values.reshape(apart).swapaxes(1, 2),
        mask=mask,
    )
    return context.swapaxes(1, 2)
