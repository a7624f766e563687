"""Causal multi-head attention, with or without a cache (the book's section 3.6)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig
from flaxgpt.model.attend import attend
from flaxgpt.model.layers import Linear, residual_std
from flaxgpt.model.rows import copied, drop_copies
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform
from flaxgpt.sharding import constrain

PROJECTIONS = ("W_query", "W_key", "W_value")
FUSED = "W_qkv"  # the rows of all three, in this order


class MultiHeadAttention(nn.Module):
    """Each position attends to itself and the positions before it, once per head.

    Query, key and value are three projections, as in the book. In the parameters, one called
    `W_qkv` may take their place, which the decoding loop for TPU reads. It is no faster on CPU.
    """

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32  # of the projections and the result
    platform: Platform = Platform()
    layer: int = 0  # number of the block

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B, T, D]; copies may follow the rows, see `flaxgpt.model.rows`
        visibility: Visibility,
        cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:  # [B, T, D], the cache with T more slots filled
        batch, queries, _ = x.shape
        heads, size = self.cfg.n_heads, self.cfg.head_dim
        # A cache has no copies of rows.
        rows = batch if visibility.start is None else visibility.start.shape[0]

        linear = partial(Linear, dtype=self.dtype, platform=self.platform, heads=heads)

        def project(features: int, name: str) -> jax.Array:  # [B, T, features]
            return drop_copies(
                linear(features, self.cfg.qkv_bias, letters="ND", name=name)(x), rows
            )

        def by_head(y: jax.Array) -> jax.Array:  # [B, N, T, H]
            return constrain(y.reshape(rows, queries, heads, size).swapaxes(1, 2), "BNTH")

        if self.has_variable("params", FUSED):
            projected = jnp.split(project(3 * self.cfg.emb_dim, FUSED), 3, axis=-1)
        else:
            projected = [project(self.cfg.emb_dim, name) for name in PROJECTIONS]
        query, keys, values = map(by_head, projected)
        query = scale_query(self.cfg, self.layer, query)
        if cache is not None:
            cache = cache.append(keys, values)
            if cache.keys.ndim == 4:  # else batch and heads are one dimension
                cache = cache._replace(
                    keys=constrain(cache.keys, "BNSH"), values=constrain(cache.values, "BNSH")
                )
            if visibility.offset is not None:  # else the new keys are all that there are
                keys, values = cache.keys, cache.values

        rate = self.cfg.drop_rates.attn
        drop = nn.Dropout(rate, deterministic=deterministic)
        dropout = None
        if rate and not deterministic:
            dropout = lambda shape: drop(jnp.ones(shape, jnp.float32))  # noqa: E731
        context = attend(query, keys, values, visibility, self.platform, dropout=dropout)

        context = context.swapaxes(1, 2).reshape(rows, queries, self.cfg.emb_dim)
        context = copied(context, batch)
        out_proj = linear(
            self.cfg.emb_dim, self.cfg.bias, residual_std(self.cfg), letters="DN", name="out_proj"
        )
        return out_proj(context), cache


def scale_query(cfg: GPTConfig, layer: int, query: jax.Array) -> jax.Array:
    """Return the query with which block `layer`, counted from 0, computes attention scores."""
    return query / (layer + 1) if cfg.scale_attn_by_layer else query
