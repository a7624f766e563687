"""Drafts from a smaller model with the same vocabulary, which keeps a cache of its own.

The small model chooses its ids as the large one does, with the same options and the same key for
each place in the text. Where both see the same noise, they choose the same id more often than two
independent draws would: with probability (1 - d) / (1 + d) or more, where d is the total variation
distance of the two distributions (Daliri, Musco & Suresh 2024, "Coupling without communication and
drafter-invariant speculative decoding"). The ids that are generated do not depend on the small
model at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.cache import KVCache
from flaxgpt.generation.decoding import DecodeState, Read, Request
from flaxgpt.generation.speculation import append, latest

CATCH_UP = 4  # ids that are read at once, where the text has grown without the small model


def read_prompts(
    read: Read,
    context_length: int,  # of the small model
    ids: jax.Array,
    start: jax.Array,
    length: Any,
    cache: KVCache,
) -> KVCache:
    """Return a cache, empty so far, that has read the prompts: `length` ids, padded on the left."""
    cache = dataclasses.replace(cache, start=start)
    if ids.shape[1] > context_length:
        # With a length per row, positions past the context are no error.
        cache = dataclasses.replace(cache, length=jnp.zeros_like(start))
    _, cache = read(ids, 0, cache)
    return cache.rewind(jnp.full_like(start, length))


def propose(
    read: Read,
    context_length: int,  # of the small model
    size: int,  # ids in a draft (K)
    request: Request,
    text: DecodeState,
    cache: KVCache,
    wanted: jax.Array,  # bool []
) -> tuple[jax.Array, KVCache]:
    """Return a draft for each row, int32 [B, K], and the small model's cache.

    A row whose draft would leave the small model's context has none.
    """
    # The last id was chosen by the large model. All before it that were drafts have been accepted.
    cache = cache.rewind(jnp.minimum(cache.length, text.length - 1))
    fits = text.length - text.start + size - 1 <= context_length
    wanted = wanted & fits.any()

    def lags(cache: KVCache) -> jax.Array:
        return wanted & (cache.length < text.length - 1).any()

    def catch_up(cache: KVCache) -> KVCache:
        columns = cache.length[:, None] + jnp.arange(CATCH_UP, dtype=jnp.int32)[None]
        columns = jnp.minimum(columns, text.ids.shape[1] - 1)
        _, cache = read(jnp.take_along_axis(text.ids, columns, axis=1), 0, cache)
        return cache.rewind(jnp.minimum(cache.length, text.length - 1))

    cache = lax.while_loop(lags, catch_up, cache)

    def guess(
        carry: tuple[DecodeState, jax.Array, jax.Array],
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        text, draft, place = carry
        logits, cache = read(jnp.maximum(latest(text), 0), 0, text.cache)
        text, new = append(request, text, logits, jnp.ones_like(text.done))
        draft = jnp.where(jnp.arange(size)[None] == place, new[:, None], draft)
        return dataclasses.replace(text, cache=cache), draft, place + 1

    imagined = dataclasses.replace(text, cache=cache, scores=None)
    none = jnp.full((len(text.length), size), -1, jnp.int32)
    imagined, draft, _ = lax.while_loop(
        lambda carry: wanted & (carry[2] < size), guess, (imagined, none, jnp.zeros((), jnp.int32))
    )
    return jnp.where(fits[:, None], draft, -1), imagined.cache
