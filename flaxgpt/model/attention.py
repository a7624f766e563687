"""Causal multi-head attention, with or without a cache (the book's section 3.6)."""

from typing import Any

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

        shape = (*query.shape[:-1], keys.shape[-2])
        seen = jnp.broadcast_to(mask, (batch, heads, *mask.shape[2:])).reshape(shape)
        drop = nn.Dropout(self.cfg.drop_rates.attn, deterministic=deterministic)
        if cache is None:
            context = _attend_in_blocks(query, keys, values, seen, drop)
        else:
            context = attend(query, keys, values, seen, _kept(seen, drop))
        context = context.reshape(batch, heads, queries, size).swapaxes(1, 2)
        context = context.reshape(batch, queries, self.cfg.emb_dim)
        std = residual_std(self.cfg)
        out = Linear(self.cfg.emb_dim, std=std, dtype=self.dtype, name="out_proj")(context)
        return out, cache


def _attend_in_blocks(
    query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, drop: nn.Dropout
) -> jax.Array:
    """Returns what `attend` does where no query sees a later key, without computing all of those.

    Up to four blocks of queries, of 128 at least, each look at the keys up to their own end: 3/8 of
    the scores are left out of 512. More blocks would leave out little more, and compile longer.
    """
    contexts = []
    for start, stop in query_blocks(query.shape[-2]):
        block = seen[..., start:stop, :stop]
        within = query[..., start:stop, :], keys[..., :stop, :], values[..., :stop, :]
        contexts.append(attend(*within, block, _kept(block, drop)))
    return jnp.concatenate(contexts, axis=-2) if len(contexts) > 1 else contexts[0]


def _kept(seen: jax.Array, drop: nn.Dropout) -> jax.Array | None:
    """Returns dropout's factor of each weight, None where nothing is dropped."""
    if drop.deterministic or not drop.rate:
        return None
    return drop(jnp.ones(seen.shape, jnp.float32))


def query_blocks(queries: int) -> list[tuple[int, int]]:
    """Returns where each block of queries starts and stops."""
    size = max(128, -(-queries // 4))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


@jax.custom_jvp
def attend(
    query: jax.Array,  # [..., T, H]
    keys: jax.Array,  # [..., S, H]
    values: jax.Array,  # [..., S, H]
    seen: jax.Array,  # bool [..., T, S]: which keys a query may see
    kept: jax.Array | None,  # [..., T, S]: dropout's factor of each weight
) -> jax.Array:  # [..., T, H]
    """Returns the mean of the values, weighted by how well keys match the query (section 3.4)."""
    weights = attention_weights(query, keys, seen)
    return mean_of_values(_dropped(weights, kept), values)


@attend.defjvp
def _attend_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    # With weights w = softmax(s), s' and v' the changes of scores and values, the context c = w v
    # changes by (w s') v - sum(w s') c + w v'. Left to itself JAX would sum over the S weights on
    # the way back too; so it sums over the H sizes of a head, which is one pass over [T, S] less:
    # a training step of a small model takes a tenth less time on CPU.
    query, keys, values, seen, kept = primals
    d_query, d_keys, d_values, _, _ = tangents
    weights = attention_weights(query, keys, seen)
    dropped = _dropped(weights, kept)
    context = mean_of_values(dropped, values)
    moved = weights * (_scores(d_query, keys) + _scores(query, d_keys))
    change = (
        mean_of_values(_dropped(moved, kept), values).astype(jnp.float32)
        - moved.sum(axis=-1, keepdims=True) * context.astype(jnp.float32)
        + mean_of_values(dropped, d_values).astype(jnp.float32)
    )
    return context, change.astype(context.dtype)


def attention_weights(
    query: jax.Array,  # [..., T, H]
    keys: jax.Array,  # [..., S, H]
    seen: jax.Array,  # bool [..., T, S]
) -> jax.Array:  # float32 [..., T, S]
    """Returns how much each query takes of each key's value; over the keys it sums to 1."""
    return nn.softmax(jnp.where(seen, _scores(query, keys), _HIDDEN))


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:  # float32 [..., T, S]
    scores = jnp.einsum("...th,...sh->...ts", query, keys, preferred_element_type=jnp.float32)
    return scores * (query.shape[-1] ** -0.5)


def _dropped(weights: jax.Array, kept: jax.Array | None) -> jax.Array:
    return weights if kept is None else weights * kept.astype(weights.dtype)


def mean_of_values(weights: jax.Array, values: jax.Array) -> jax.Array:  # [..., T, H]
    """Returns the mean of values [..., S, H], weighted by [..., T, S]."""
    return jnp.einsum("...ts,...sh->...th", weights.astype(values.dtype), values)
