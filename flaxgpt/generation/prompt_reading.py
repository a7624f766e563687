"""Reading prompts a few rows at a time, so that the activations of all need not exist at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flaxgpt.cache import KVCache
from flaxgpt.generation.decoding import Read


def read_few_rows_at_a_time(
    read: Read,
    rows: int,
    empty_cache: Callable[[int, int], KVCache],
    ids: jax.Array,
    last: ArrayLike,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Return what `read(ids, last, cache)` returns, for an empty cache, from readings of few rows.

    Args:
        read: the reading function.
        rows: rows to read at once, fewer than there are.
        empty_cache: returns a cache for a number of rows and of ids.
        ids: int32 [B, T].
        last: int32 [], the position whose logits are returned.
        cache: without ids, of T or more slots.
    """
    batch, width = ids.shape

    def read_rows(first: jax.Array) -> tuple[jax.Array, KVCache]:
        def some(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, rows)

        small = dataclasses.replace(empty_cache(rows, width), start=some(cache.start))
        return read(some(ids), last, small)

    def unread(state: tuple[jax.Array, jax.Array, KVCache]) -> jax.Array:
        return state[0] < batch

    def body(
        state: tuple[jax.Array, jax.Array, KVCache],
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        done, logits, cache = state
        first = jnp.minimum(done, batch - rows)  # the last rows may be read twice
        some, small = read_rows(first)
        logits = lax.dynamic_update_slice_in_dim(logits, some, first, axis=0)
        return first + rows, logits, cache.put(first, small)

    some, _ = jax.eval_shape(read_rows, jnp.int32(0))
    logits = jnp.zeros((batch, *some.shape[1:]), some.dtype)
    filled = dataclasses.replace(cache, length=jnp.int32(width))
    _, logits, cache = lax.while_loop(unread, body, (jnp.int32(0), logits, filled))
    return logits, cache
