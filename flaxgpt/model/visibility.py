"""Which keys a query may see, as a rule instead of a mask."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=("start", "offset"), meta_fields=("window",))
@dataclasses.dataclass(frozen=True)
class Visibility:
    """The rule of causal attention. Each attention implementation builds what it needs from it.

    Query t is at position `p = offset[b] + t` among the keys. In row b it sees key s if

        start[b] <= s <= p    and, with a window,    s > p - window

    Without an offset, an implementation may skip later keys at compile time.
    """

    start: jax.Array | None = None  # int32 [B], each row's first key; None if key 0 for all
    # int32 [] or [B], the first query's position; None if it is key 0's
    offset: jax.Array | None = None
    window: int | None = None  # static; keys that a query sees at most, its own included

    def mask(self, queries: range, keys: range) -> jax.Array:
        """Return the rule for some queries and keys as bool [B or 1, 1, T, S]."""
        key = jnp.arange(keys.start, keys.stop)[None, None, None, :]
        position = jnp.arange(queries.start, queries.stop)[None, None, :, None]
        if self.offset is not None:
            offset = self.offset
            position = position + (offset[:, None, None, None] if offset.ndim else offset)
        mask = key <= position
        if self.window is not None:
            mask &= key > position - self.window
        if self.start is not None:
            mask &= key >= self.start[:, None, None, None]
        return mask
