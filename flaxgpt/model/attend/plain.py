"""Attention in `jax.numpy`, with a derivative rule of its own (the book's sections 3.4 and 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from flaxgpt.model.attend.joined import MOST_QUERIES, is_joined, joined_attend, separate
from flaxgpt.model.visibility import Visibility

# Not -inf: a query that sees nothing (padding) must give a finite row, not NaN.
_HIDDEN = float(jnp.finfo(jnp.float32).min)


def plain_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H], [B*N, S, H] or [B, S, N*H]
    values: jax.Array,  # as keys
    visibility: Visibility,
    dropout: Callable[[tuple[int, ...]], jax.Array] | None = None,
    least_rows: int = 1,  # copies of a single query in a product; see `flaxgpt.model.rows`
) -> jax.Array:  # [B, N, T, H]
    """Implement `flaxgpt.model.attend.attend`.

    Where queries and keys start together, a few blocks of queries each read only the keys that the
    block can see. Keys are read in the layout they come in: reshaped, a cache would be copied.
    """
    batch, heads, queries, size = query.shape
    if is_joined(query, keys):
        if queries <= MOST_QUERIES and dropout is None:
            return joined_attend(query, keys, values, visibility)
        keys, values = separate(keys, heads), separate(values, heads)
    rows = keys.shape[:-2]
    query = query.reshape(*rows, queries, size)
    blocks, last_key = [(0, queries)], keys.shape[-2]
    if visibility.offset is None:
        blocks, last_key = query_blocks(queries), 0
    contexts = []
    for start, stop in blocks:
        first = 0
        if visibility.offset is None and visibility.window is not None:
            first = max(0, start - visibility.window + 1)
        seen = range(first, last_key or stop)
        extent = (stop - start, len(seen))
        mask = visibility.mask(range(start, stop), seen)
        mask = jnp.broadcast_to(mask, (batch, heads, *extent)).reshape(*rows, *extent)
        kept = None if dropout is None else dropout(mask.shape)
        block = query[..., start:stop, :]
        if queries == 1 and least_rows > 1:
            # Without the barrier, XLA would compute one of each again.
            block = lax.optimization_barrier(jnp.repeat(block, least_rows, axis=-2))
        within = keys[..., seen.start : seen.stop, :], values[..., seen.start : seen.stop, :]
        contexts.append(_attend(block, *within, mask, kept)[..., : stop - start, :])
    context = jnp.concatenate(contexts, axis=-2) if len(contexts) > 1 else contexts[0]
    return context.reshape(batch, heads, queries, size)


def query_blocks(queries: int) -> list[tuple[int, int]]:
    """Return where each block of queries starts and stops: up to four, of 128 or more.

    From 512 queries on, 3/8 of the scores are left out. More blocks would leave out little more
    and take longer to compile.
    """
    size = max(128, -(-queries // 4))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


@jax.custom_jvp
def _attend(
    query: jax.Array,  # [..., T, H]
    keys: jax.Array,  # [..., S, H]
    values: jax.Array,  # [..., S, H]
    mask: jax.Array,  # bool [..., T, S]
    kept: jax.Array | None,  # [..., T, S]: dropout's factor of each weight
) -> jax.Array:  # [..., T, H]
    weights = attention_weights(query, keys, mask)
    return mean_of_values(_dropped(weights, kept), values)


@_attend.defjvp
def _attend_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    # With weights w = softmax(s) and tangents s' and v' of scores and values, the context c = w v
    # has the tangent (w s') v - sum(w s') c + w v'. JAX's own rule would also sum over the S
    # weights in the backward pass; this one sums over the H elements of a head instead, one pass
    # over [T, S] less. A training step of a small model takes a tenth less time on CPU.
    query, keys, values, mask, kept = primals
    d_query, d_keys, d_values, _, _ = tangents
    weights = attention_weights(query, keys, mask)
    dropped = _dropped(weights, kept)
    context = mean_of_values(dropped, values)
    moved = weights * (_scores(d_query, keys) + _scores(query, d_keys))
    change = (
        _mean(_dropped(moved, kept), values).astype(jnp.float32)
        - moved.sum(axis=-1, keepdims=True) * context.astype(jnp.float32)
        + _mean(dropped, d_values).astype(jnp.float32)
    )
    return context, change.astype(context.dtype)


def attention_weights(
    query: jax.Array,  # [..., T, H]
    keys: jax.Array,  # [..., S, H]
    mask: jax.Array,  # bool, broadcast to [..., T, S]
) -> jax.Array:  # float32 [..., T, S]
    """Return how much each query takes from each key's value; a row sums to 1."""
    return jax.nn.softmax(jnp.where(mask, _scores(query, keys), _HIDDEN))


def weights_by_head(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H], [B*N, S, H] or [B, S, N*H]
    visibility: Visibility,
) -> jax.Array:  # float32 [B, N, T, S]
    """Return the weights that attention gives to all keys, for keys as they are stored."""
    batch, heads, queries, size = query.shape
    if is_joined(query, keys):
        keys = separate(keys, heads)
    # In the shapes of `plain_attend`, so that XLA computes them once for both.
    *rows, slots, _ = keys.shape
    extent = (queries, slots)
    mask = visibility.mask(range(queries), range(slots))
    mask = jnp.broadcast_to(mask, (batch, heads, *extent)).reshape(*rows, *extent)
    weights = attention_weights(query.reshape(*rows, queries, size), keys, mask)
    return weights.reshape(batch, heads, *extent)


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:  # float32 [..., T, S]
    scores = jnp.einsum("...th,...sh->...ts", query, keys, preferred_element_type=jnp.float32)
    return scores * (query.shape[-1] ** -0.5)


def _dropped(weights: jax.Array, kept: jax.Array | None) -> jax.Array:
    return weights if kept is None else weights * kept.astype(weights.dtype)


def mean_of_values(weights: jax.Array, values: jax.Array) -> jax.Array:  # [..., T, H]
    """Return the mean of values [..., S, H], weighted by [..., T, S]."""
    # Rounded once, because XLA:CPU would convert values to float32 for a narrow result.
    return _mean(weights, values, jnp.float32).astype(values.dtype)


def _mean(weights: jax.Array, values: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    weights = weights.astype(values.dtype)
    return jnp.einsum("...ts,...sh->...th", weights, values, preferred_element_type=dtype)
