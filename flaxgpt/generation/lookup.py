"""Prompt lookup: a row's text as the draft of its own continuation. Knows no model.

Where the latest ids occur earlier in the text, what followed them then is likely to follow again,
as in quotations, code and lists (Saxena 2023, "Prompt Lookup Decoding"; the n-grams of Yang et al.
2023, "Inference with Reference").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LONGEST = 3  # ids that are matched at most
SHORTEST = 2  # and at least: one alone occurs everywhere


def find(
    ids: jax.Array,  # int32 [B, W], padding, then text; unwritten from `length` on
    start: jax.Array,  # int32 [B], where each text begins
    length: jax.Array,  # int32 [B], where it ends
    size: int,  # ids in a draft (K)
) -> jax.Array:  # int32 [B, K], -1 for a row without a draft
    """Return what followed the latest ids of each text where they occurred before.

    The longest match counts, and of several the last one. A draft that reaches the end of the text
    continues with itself, so that a repeated sequence is continued however short it is.
    """
    width = ids.shape[1]
    columns = jnp.arange(width, dtype=jnp.int32)[None]
    end = length[:, None]
    matches = jnp.zeros_like(ids)  # of the ids up to each column with the latest ones, how many
    unbroken = columns < end - 1
    for back in range(LONGEST):
        latest = jnp.take_along_axis(ids, jnp.maximum(end - 1 - back, 0), axis=1)
        shifted = jnp.pad(ids, ((0, 0), (back, 0)))[:, :width]
        unbroken &= (columns - back >= start[:, None]) & (shifted == latest)
        matches += unbroken.astype(jnp.int32)
    # The last column of the longest match: longer ones count for more than any column.
    rank = (matches * width + columns).max(axis=1, keepdims=True)
    last, found = rank % width, rank // width >= SHORTEST
    period = jnp.maximum(end - 1 - last, 1)
    following = last + 1 + jnp.arange(size, dtype=jnp.int32)[None] % period
    draft = jnp.take_along_axis(ids, jnp.minimum(following, width - 1), axis=1)
    return jnp.where(found, draft, -1)
