"""The hook of a grammar: excludes the ids after which no match is left that fits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def next_ids(
    next_state: jax.Array,  # int32 [S, C], see `Grammar`
    to_end: jax.Array,  # int32 [S]
    classes: jax.Array,  # int32 [V]
    begin: jax.Array,  # int32 [B], where the new ids of each row begin
    max_new_tokens: jax.Array,  # int32 []
    ids: jax.Array,  # int32 [B, W]
    length: jax.Array,  # int32 [B]
    logits: jax.Array,  # float32 [B, V]
) -> jax.Array:
    """Return the logits with -inf for ids that a grammar excludes; see `flaxgpt.generation.hooks`.

    The state of each row is found from its new ids in each step: one gather per row and new id. The
    mask then takes one gather per row and id of the vocabulary, whatever the pattern.
    """
    count = length - begin
    state = _state_after(next_state, classes, ids, begin, count)
    after = next_state[state]  # [B, C]
    fits = to_end[after] < (max_new_tokens - count)[:, None]
    kept = jnp.take_along_axis(fits, classes[None], axis=1)
    return jnp.where(kept | jnp.isnan(logits), logits, -jnp.inf)


def _state_after(
    next_state: jax.Array, classes: jax.Array, ids: jax.Array, begin: jax.Array, count: jax.Array
) -> jax.Array:
    """Return the state of each row after its new ids, int32 [B]."""

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, state = carry
        place = jnp.minimum(begin + i, ids.shape[1] - 1)
        token = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
        # What comes after a stop id counts for nothing.
        after = jnp.where(token < 0, 1, next_state[state, classes[token]])
        return i + 1, jnp.where(i < count, after, state)

    start = (jnp.int32(0), jnp.full(count.shape, 2, jnp.int32))
    return lax.while_loop(lambda carry: carry[0] < count.max(), step, start)[1]
