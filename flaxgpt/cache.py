"""The KV cache: keys and values of the ids already seen, as an explicit pytree.

`extend` takes a cache and returns the updated one. The cache owns its storage layout. Attention
reads keys and values as they are stored, because XLA:CPU would copy a reshaped buffer in each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_context, check_dtype, check_size, unknown_name
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.platform import CacheLayout, platform_of
from flaxgpt.sharding import Mesh, activation_sharding, check_mesh


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "length", "start"),
    meta_fields=("layout",),
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values that attention reads back, a pytree.

    Attributes:
        keys: L float arrays, [B, N, S, H], or [B*N, S, H] if `layout` is "merged", or [B, S, N*H]
            if it is "joined".
        values: the same for values.
        length: int32 [], slots filled so far, shared by all rows; or [B], those of each row.
        start: int32 [B], the first slot that belongs to each row. Slots before it are padding:
            prompts of different lengths are padded on the left to share one `length`.
        layout: how batch and heads are stored, static.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    start: jax.Array
    layout: CacheLayout

    @property
    def batch(self) -> int:
        """Rows (B)."""
        return self.start.shape[0]

    @property
    def size(self) -> int:
        """Slots in total (S)."""
        return self.keys[0].shape[-2]

    @property
    def is_empty(self) -> bool:
        """Whether no slot is filled, as far as is known while a program is traced."""
        return not isinstance(self.length, jax.core.Tracer) and not np.any(self.length)

    def layers(self) -> list[LayerCache]:
        """Return the part of the cache that each block reads and writes."""
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, self.length) for keys, values in pairs]

    def advance(self, layers: Sequence[LayerCache], queries: int) -> KVCache:
        """Return the cache with the blocks' updated layers and `queries` more slots filled."""
        return dataclasses.replace(
            self,
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            length=self.length + queries,
        )

    def rewind(self, length: ArrayLike) -> KVCache:
        """Return the cache as it was when `length` slots were filled.

        Pure and jittable; no array is copied. Use it to drop draft ids that were rejected, or the
        padding after a prompt. `rewind(0)` is known to be empty also under `jit`.

        Args:
            length: int [], at least 0 and at most `self.length`, or int [B], one for each row,
                whose next ids then follow in its own slots. Under `jit`, where it cannot be
                checked, a length outside that range makes the row's next logits NaN.

        Raises:
            ValueError: `length` is out of range.
        """
        if not any(isinstance(x, jax.core.Tracer) for x in (length, self.length)):
            wanted, filled = np.asarray(length), np.asarray(self.length)
            if wanted.shape not in ((), (self.batch,)):
                raise ValueError(
                    f"length of shape {wanted.shape} must be one number, or one per row: "
                    f"{self.batch}"
                )
            if ((wanted < 0) | (wanted > filled)).any():
                raise ValueError(
                    f"length={length} is out of range: {filled} slots are filled, so the cache can "
                    f"rewind to any length from 0 to {filled}"
                )
        if isinstance(length, int) and length == 0:
            known: Any = np.zeros((), np.int32)  # not traced
            return dataclasses.replace(self, length=known)
        new = jnp.asarray(length, jnp.int32)
        valid = (new >= 0) & (new <= self.length)
        return dataclasses.replace(self, length=jnp.where(valid, new, self.size))

    def take(self, rows: ArrayLike) -> KVCache:
        """Return a cache made of the given rows, in that order; rows may repeat.

        Pure and jittable. Beam search uses it to continue from the best hypotheses.

        Args:
            rows: int [R], each from 0 to B - 1. Under `jit`, where they cannot be checked, a row
                out of range gives NaN logits.

        Raises:
            ValueError: `rows` is not a flat list of integers, is empty, or is out of range.
        """
        rows = rows if isinstance(rows, jax.core.Tracer) else np.asarray(rows)
        if rows.ndim != 1 or not rows.shape[0] or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(
                f"rows of shape {rows.shape} and dtype {rows.dtype} must be a flat list of one or "
                "more integers"
            )
        if isinstance(rows, np.ndarray) and (rows.min() < 0 or rows.max() >= self.batch):
            raise ValueError(
                f"rows={rows.tolist()} must be from 0 to {self.batch - 1}: the cache has "
                f"{self.batch} rows"
            )
        # A gather counts negative indices from the end, so they are moved out of range first.
        index = jnp.where(jnp.asarray(rows) < 0, self.batch, rows).astype(jnp.int32)

        def gather(buffer: jax.Array) -> jax.Array:
            if self.layout == "joined":
                return buffer.at[index].get(mode="fill", fill_value=jnp.nan)
            by_row = buffer.reshape(self.batch, -1, *buffer.shape[-2:])  # [B, N, S, H]
            by_row = by_row.at[index].get(mode="fill", fill_value=jnp.nan)
            return by_row.reshape(-1, *buffer.shape[-2:]) if buffer.ndim == 3 else by_row

        return dataclasses.replace(
            self,
            keys=tuple(map(gather, self.keys)),
            values=tuple(map(gather, self.values)),
            length=self.length.at[index].get(mode="fill", fill_value=0)
            if self.length.ndim
            else self.length,
            start=self.start.at[index].get(mode="fill", fill_value=0),
        )

    def put(self, row: ArrayLike, other: KVCache) -> KVCache:
        """Return the cache with all slots of `other` in its first slots, from a row on.

        Pure and jittable. `length` and `start` stay as they are.

        Args:
            row: int [], the first of the rows to write. Under `jit`, where it cannot be checked,
                rows that are not there make those that are written NaN.
            other: a cache of the same model and layout with as many rows and slots or fewer.

        Raises:
            ValueError: `other` has another layout or does not fit, or `row` is out of range.
        """
        if other.layout != self.layout:
            raise ValueError(f'the layouts differ: "{other.layout}" and "{self.layout}"')
        if other.batch > self.batch or other.size > self.size:
            raise ValueError(
                f"a cache of {other.batch} rows and {other.size} slots does not fit one of "
                f"{self.batch} rows and {self.size} slots"
            )
        last = self.batch - other.batch
        if not isinstance(row, jax.core.Tracer) and not 0 <= int(np.asarray(row)) <= last:
            raise ValueError(
                f"row={row} must be from 0 to {last}, for {other.batch} of {self.batch} rows"
            )
        index = jnp.asarray(row, jnp.int32)
        valid = (index >= 0) & (index <= last)

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.where(valid, new.astype(buffer.dtype), jnp.nan)
            first = index * (buffer.shape[0] // self.batch)  # heads may be merged with rows
            return lax.dynamic_update_slice_in_dim(buffer, new, first, axis=0)

        return dataclasses.replace(
            self,
            keys=tuple(map(write, self.keys, other.keys)),
            values=tuple(map(write, self.values, other.values)),
        )

    def repeat(self, n: int) -> KVCache:
        """Return a cache in which each row appears `n` times in a row: [B, ...] -> [B*n, ...].

        Pure and jittable. Use it to sample several continuations of one prompt.

        Raises:
            ValueError: `n` is not a whole number, 1 or more.
        """
        return self.take(np.repeat(np.arange(self.batch), check_size("n", n)))

    def place(self, start: ArrayLike, size: int) -> KVCache:
        """Return a cache of another size in which the one row of this cache begins at `start`.

        Pure and jittable. It turns what was read once into the beginning of a batch of prompts that
        are padded on the left.

        Args:
            start: int [B], the first slot of each row of the result, from 0 to `size`.
            size: slots of the result (S), at least `self.length`. Under `jit`, where they
                cannot be checked, ids that do not fit are dropped.

        Returns:
            A cache with as many slots filled as this one: rows that begin later have fewer ids.

        Raises:
            ValueError: this cache has more than one row, or an argument is out of range.
        """
        if self.batch != 1:
            raise ValueError(f"a cache of {self.batch} rows cannot be placed: take one of them")
        if not isinstance(self.length, jax.core.Tracer) and np.max(self.length) > size:
            raise ValueError(f"size={size} is less than the {np.max(self.length)} ids of the cache")
        if not isinstance(start, jax.core.Tracer):
            starts = np.asarray(start)
            if starts.ndim != 1 or (starts < 0).any() or (starts > size).any():
                raise ValueError(f"start={start} must be a list of slots from 0 to size={size}")
        start = jnp.asarray(start, jnp.int32)

        def shift(buffer: jax.Array) -> jax.Array:
            row = buffer if self.layout == "merged" else buffer[0]
            row = row[..., : min(size, self.size), :]
            around = [(0, 0)] * (row.ndim - 2) + [(size, size - row.shape[-2]), (0, 0)]
            padded = jnp.pad(row, around)

            def from_slot(first: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(padded, first, size, axis=row.ndim - 2)

            rows = jax.vmap(from_slot)(size - start)
            return rows.reshape(-1, *rows.shape[-2:]) if self.layout == "merged" else rows

        return dataclasses.replace(
            self,
            keys=tuple(map(shift, self.keys)),
            values=tuple(map(shift, self.values)),
            length=jnp.reshape(self.length, ()),  # one number also if the row had its own
            start=start,
        )


class LayerCache(NamedTuple):
    """One block's share of a `KVCache`."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    def append(self, keys: jax.Array, values: jax.Array) -> LayerCache:
        """Return the cache with keys and values [B, N, T, H] in slots `length` to `length + T`."""
        rows = keys.shape[0]

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            if buffer.shape[-1] != new.shape[-1]:  # heads are joined
                new = new.swapaxes(1, 2)
                new = new.reshape(*new.shape[:2], buffer.shape[-1])
            else:
                new = new.reshape(*buffer.shape[:-2], *new.shape[-2:])
            new = new.astype(buffer.dtype)
            if self.length.ndim:
                return _write_by_row(buffer, new, self.length, rows)
            return lax.dynamic_update_slice_in_dim(buffer, new, self.length, axis=buffer.ndim - 2)

        return self._replace(keys=write(self.keys, keys), values=write(self.values, values))


def as_column(length: jax.Array) -> jax.Array:
    """Return the lengths of rows, [B], as [B, 1]; one length of all rows, [], stays as it is."""
    return length[:, None] if length.ndim else length


def _write_by_row(buffer: jax.Array, new: jax.Array, length: jax.Array, rows: int) -> jax.Array:
    """Return a buffer with each row's new entries in the slots from its own length on."""

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(rows, -1, *x.shape[1:]) if x.shape[0] != rows else x

    if rows == 1:
        return lax.dynamic_update_slice_in_dim(buffer, new, length[0], axis=buffer.ndim - 2)
    write = jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=-2))
    return write(by_row(buffer), by_row(new), length).reshape(buffer.shape)


def layer_shape(cfg: GPTConfig, batch: int, length: int, layout: CacheLayout) -> tuple[int, ...]:
    """Return the shape of the keys, and of the values, of one block."""
    match layout:
        case "separate":
            return batch, cfg.n_heads, length, cfg.head_dim
        case "merged":
            return batch * cfg.n_heads, length, cfg.head_dim
        case "joined":
            return batch, length, cfg.emb_dim


def init_cache(
    cfg: GPTConfig,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    *,
    layout: CacheLayout | Literal["auto"] = "auto",
    mesh: Mesh | None = None,
) -> KVCache:
    """Return an empty cache.

    Args:
        cfg: the model's configuration.
        batch: rows (B).
        length: slots (S), at most `cfg.context_length`.
        dtype: float32, bfloat16 or float16; of keys and values, and what `extend` computes in.
        layout: "separate" stores [B, N, S, H], so that batch and heads can be sharded; "merged"
            stores [B*N, S, H], which XLA updates in place on CPU; "joined" stores [B, S, N*H],
            which fills the tiles of a TPU; "auto" selects what is fastest on JAX's default
            backend, and "separate" on a mesh.
        mesh: the mesh of the parameters, to split batch and heads over; None for one device.

    Returns:
        A cache with no slot filled.

    Raises:
        ValueError: the batch, length, dtype or layout is out of range.
    """
    check_config(cfg)
    batch, length = check_size("batch", batch), check_context(cfg.context_length, length)
    if layout == "auto":
        layout = platform_of().cache_layout if mesh is None else "separate"
    if layout not in get_args(CacheLayout):
        raise unknown_name("cache layout", layout, (*get_args(CacheLayout), "auto"))
    dtype = check_dtype(dtype)
    device = None
    if mesh is not None:
        if layout != "separate":
            raise ValueError(f'layout={layout!r} cannot be split over a mesh: use "separate"')
        shape = layer_shape(cfg, batch, length, layout)
        device = activation_sharding("BNSH", shape, check_mesh(mesh))
    return zero_cache(cfg, batch, length, dtype, layout, device)


def zero_cache(
    cfg: GPTConfig, batch: int, length: int, dtype: Any, layout: CacheLayout, device: Any = None
) -> KVCache:
    """Return an empty cache, without checks. Slots past the context are for drafts alone."""
    shape = layer_shape(cfg, batch, length, layout)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype, device=device) for _ in range(cfg.n_layers)),
        values=tuple(jnp.zeros(shape, dtype, device=device) for _ in range(cfg.n_layers)),
        length=jnp.zeros((), jnp.int32),
        start=jnp.zeros((batch,), jnp.int32),
        layout=layout,
    )
