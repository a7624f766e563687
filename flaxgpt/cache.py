"""The keys and values of ids already seen, as data: argument and result of `extend`.

Two layouts, one set of functions. The public one keeps batch and heads apart, `[B, N, S, H]`, so
that accelerators can shard either. On CPU, XLA copies such a buffer whole each time a loop writes
one slot of it, and takes `[B*N, S, H]` as it is (one row of GPT-2 decodes 10 to 20 % faster), so a
loop there carries `merge_heads(cache)`. Attention reads the layout off the buffer's rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from flaxgpt._checks import check_dtype, check_size
from flaxgpt.config import GPTConfig, check_config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention remembers, a pytree.

    Attributes:
        keys: L arrays [B, N, S, H] (or [B*N, S, H] where merged), float.
        values: the same.
        length: int32 [], slots filled so far, the same for all rows.
        start: int32 [B], the first slot that belongs to each row. Slots before it are padding,
            which is how prompts of unequal lengths share one `length`: padded on the left.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    start: jax.Array

    @property
    def size(self) -> int:
        """Slots in all (S)."""
        return self.keys[0].shape[-2]

    def layers(self) -> list[LayerCache]:
        """Returns what each block needs of the cache."""
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, self.length) for keys, values in pairs]

    def advanced(self, layers: Sequence[LayerCache], queries: int) -> KVCache:
        """Returns the cache with what the blocks made of it, `queries` slots further."""
        return dataclasses.replace(
            self,
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            length=self.length + queries,
        )


class LayerCache(NamedTuple):
    """One block's share of a `KVCache`."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    def extended(self, keys: jax.Array, values: jax.Array) -> LayerCache:
        """Returns the cache with keys and values [B, N, T, H] in slots `length` to `length + T`."""
        return self._replace(
            keys=_write(self.keys, keys, self.length),
            values=_write(self.values, values, self.length),
        )


def init_cache(cfg: GPTConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Returns an empty cache.

    Args:
        cfg: the model's configuration.
        batch: rows (B).
        length: slots (S), at most `cfg.context_length`.
        dtype: float32, bfloat16 or float16, of keys and values, and what `extend` computes in.

    Raises:
        ValueError: a batch or length below 1, a length over the context, or another dtype.
    """
    check_config(cfg)
    batch, length = check_size("batch", batch), check_size("length", length)
    if length > cfg.context_length:
        raise ValueError(
            f"a cache of length={length} is longer than context_length={cfg.context_length}: "
            "the model has no positions for the rest"
        )
    dtype = check_dtype(dtype)
    shape = (batch, cfg.n_heads, length, cfg.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(cfg.n_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(cfg.n_layers)),
        length=jnp.zeros((), jnp.int32),
        start=jnp.zeros((batch,), jnp.int32),
    )


def merge_heads(cache: KVCache) -> KVCache:
    """Returns the cache with its first two axes merged: [B, N, S, H] -> [B*N, S, H]."""

    def merge(buffer: jax.Array) -> jax.Array:
        return buffer.reshape(-1, *buffer.shape[-2:])

    return dataclasses.replace(
        cache,
        keys=tuple(map(merge, cache.keys)),
        values=tuple(map(merge, cache.values)),
    )


def visible(cache: KVCache, queries: int) -> jax.Array:
    """Returns which slots the next `queries` ids may look at: bool [B, 1, T, S].

    Slot s is visible to query t of a row if it is the row's own and not in the query's future.
    """
    slot = jnp.arange(cache.size)  # [S]
    own = slot >= cache.start[:, None, None, None]  # [B, 1, 1, S]
    past = slot <= cache.length + jnp.arange(queries)[:, None]  # [T, S]
    return own & past


def _write(buffer: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    new = new.reshape(*buffer.shape[:-2], *new.shape[-2:]).astype(buffer.dtype)
    return lax.dynamic_update_slice_in_dim(buffer, new, length, axis=buffer.ndim - 2)
