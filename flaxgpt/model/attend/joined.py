"""Attention of few queries over a cache whose heads are joined, without taking them apart.

With an array of [B, S, N*H], XLA for TPU would have to split the last axis into heads, whose 64
elements fill half a tile. Instead each query is written N times below itself, once per head, with
the elements of other heads set to 0. All heads are then one product with the keys as they are:

    query        a b c d           two heads of two elements
    spread       a b 0 0           head 0
                 0 0 c d           head 1

The product with the values has the means of all elements in each row, of which a head's own count.
That is N times the multiplications, of which a matrix unit has plenty: it waits for the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flaxgpt.model.visibility import Visibility

MOST_QUERIES = 8  # that are spread; more of them fill the matrix unit by themselves


def joined_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, S, N*H]
    values: jax.Array,  # as keys
    visibility: Visibility,
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query."""
    batch, heads, queries, size = query.shape
    slots, width = keys.shape[1:]
    own = jnp.arange(heads)[:, None] == jnp.arange(width)[None] // size  # [N, N*H]
    own = own[None, None]
    flat = query.swapaxes(1, 2).reshape(batch, queries, 1, width)
    spread = jnp.where(own, flat, jnp.zeros_like(flat)).reshape(batch, queries * heads, width)

    scores = jnp.einsum("bmd,bsd->bms", spread, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, queries, heads, slots) * size**-0.5
    mask = visibility.mask(range(queries), range(slots)).swapaxes(1, 2)  # [B or 1, T, 1, S]
    weights = jax.nn.softmax(jnp.where(mask, scores, float(jnp.finfo(jnp.float32).min)))

    weights = weights.reshape(batch, queries * heads, slots).astype(values.dtype)
    means = jnp.einsum("bms,bsd->bmd", weights, values, preferred_element_type=jnp.float32)
    means = means.reshape(batch, queries, heads, width)
    context = jnp.where(own, means, jnp.zeros_like(means)).sum(axis=2).astype(values.dtype)
    return context.reshape(batch, queries, heads, size).swapaxes(1, 2)


def separate(joined: jax.Array, heads: int) -> jax.Array:
    """Return keys or values [B, S, N*H] as [B, N, S, H]."""
    return joined.reshape(*joined.shape[:2], heads, -1).swapaxes(1, 2)


def is_joined(query: jax.Array, keys: jax.Array) -> bool:
    """Return whether keys are [B, S, N*H] for a query [B, N, T, H]."""
    return keys.ndim == 3 and keys.shape[-1] == query.shape[1] * query.shape[-1] != query.shape[-1]


def by_head(query: jax.Array, stored: jax.Array) -> jax.Array:
    """Return keys or values in any layout of a cache as [B, N, S, H], for a query [B, N, T, H]."""
    if is_joined(query, stored):
        return separate(stored, query.shape[1])
    return stored.reshape(*query.shape[:2], *stored.shape[-2:])
