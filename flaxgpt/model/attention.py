"""Causal multi-head attention, with or without a cache (the book's section 3.6)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig
from flaxgpt.model.layers import Linear, residual_std

# Not -inf: a query that may see nothing (padding) must give a finite row, not NaN.
_HIDDEN = float(jnp.finfo(jnp.float32).min)


class MultiHeadAttention(nn.Module):
    """Every position looks at itself and the ones before it, once a head.

    Query, key and value are three projections, as in the book: fusing them into one product gained
    nothing on CPU. Scores and softmax are float32 whatever `dtype` is.
    """

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        mask: jax.Array,  # bool [B or 1, 1, T, S]: which keys a query may see
        cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:  # [B, T, D], the cache with T more slots filled
        batch, queries, _ = x.shape
        heads, size = self.cfg.n_heads, self.cfg.head_dim

        def project(name: str) -> jax.Array:  # [B, N, T, H]
            y = Linear(self.cfg.emb_dim, self.cfg.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, queries, heads, size).swapaxes(1, 2)

        query, keys, values = project("W_query"), project("W_key"), project("W_value")
        if cache is not None:
            cache = cache.extended(keys, values)
            keys, values = cache.keys, cache.values
            query = query.reshape(*keys.shape[:-2], queries, size)  # [B*N, T, H] where merged

        scores = jnp.einsum(
            "...th,...sh->...ts", query, keys, preferred_element_type=jnp.float32
        ) * (size**-0.5)
        seen = jnp.broadcast_to(mask, (batch, heads, *mask.shape[2:])).reshape(scores.shape)
        weights = nn.softmax(jnp.where(seen, scores, _HIDDEN)).astype(self.dtype)
        weights = nn.Dropout(self.cfg.drop_rate_attn)(weights, deterministic=deterministic)

        context = jnp.einsum("...ts,...sh->...th", weights, values)
        context = context.reshape(batch, heads, queries, size).swapaxes(1, 2)
        context = context.reshape(batch, queries, self.cfg.emb_dim)
        std = residual_std(self.cfg)
        out = Linear(self.cfg.emb_dim, std=std, dtype=self.dtype, name="out_proj")(context)
        return out, cache
