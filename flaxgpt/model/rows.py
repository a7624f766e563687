"""Copies of rows: a matrix product of very few rows can be slower than one of several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.platform import Platform
from flaxgpt.sharding import batch_parts


def add_copies(x: jax.Array, platform: Platform) -> jax.Array:
    """Return `x` with copies of its rows after them, if the platform wants more rows.

    The layers that follow compute the copies too, and `drop_copies` removes them. `x` is [B, T, D],
    or [B, D] with one position per row. On a mesh, each device gets copies of its own rows.
    """
    rows, positions = x.shape[0], x.size // x.shape[-1]
    if not isinstance(positions, int):  # a symbolic batch, of any size
        return x
    least = -(-platform.rows_in(x.dtype) // (positions // rows))  # on each device
    wide = copied(x, max(rows, _parts(rows) * least))
    # Without the barrier, XLA would compute one of each again.
    return x if wide is x else lax.optimization_barrier(wide)


def copied(x: jax.Array, rows: int) -> jax.Array:
    """Return as many rows as asked for: those of `x`, then copies of them."""
    if x.shape[0] == rows:
        return x
    parts, times = _parts(x.shape[0]), -(-rows // x.shape[0])
    own = x.reshape(parts, -1, *x.shape[1:])
    wide = jnp.concatenate([own] * times, axis=1)[:, : rows // parts]
    return wide.reshape(rows, *x.shape[1:])


def drop_copies(x: jax.Array, rows: int) -> jax.Array:
    """Return the rows without their copies."""
    if x.shape[0] == rows:
        return x
    if (parts := _parts(rows)) == 1:
        return x[:rows]
    own = x.reshape(parts, -1, *x.shape[1:])[:, : rows // parts]
    return own.reshape(rows, *x.shape[1:])


def _parts(rows: int) -> int:
    """Return over how many devices the mesh in force splits the rows."""
    parts = batch_parts(jax.sharding.get_abstract_mesh())
    return 1 if rows % parts else parts
