"""Repeated rows: a matrix product of very few rows can be slower than one of several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.platform import Platform
from flaxgpt.sharding import batch_parts


def repeat_rows(x: jax.Array, platform: Platform) -> jax.Array:
    """Return `x`, [B, ...] -> [B * n, ...], each row n times if a platform wants more rows.

    The layers that follow compute equal rows, and `every_row` takes one of each. `x` is [B, T, D],
    or [B, D] with one position per row.
    """
    positions = x.size // x.shape[-1]
    if not isinstance(positions, int):  # a symbolic batch, of any size
        return x
    per_device = max(1, positions // batch_parts(jax.sharding.get_abstract_mesh()))
    if (n := platform.repeats(per_device, x.dtype)) < 2:
        return x
    return repeat_hidden(x, n, axis=0)


def repeat_hidden(x: jax.Array, n: int, axis: int) -> jax.Array:
    """Return `x` with each element of an axis n times, of which XLA does not know."""
    # Without the barrier, XLA would compute one of each again.
    return lax.optimization_barrier(jnp.repeat(x, n, axis=axis))


def every_row(x: jax.Array, rows: int) -> jax.Array:
    """Return one of each of the repeated rows, of which there are `rows`."""
    return x if x.shape[0] == rows else x[:: x.shape[0] // rows]


def repeat_again(x: jax.Array, rows: int) -> jax.Array:
    """Return as many rows as before `every_row`, which were `rows`."""
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)
