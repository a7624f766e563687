"""The cross-entropy of the output head in pieces of the sequence, with its own derivative rule.

The logits of a whole batch are the largest array of a training step: 1.6 GiB in float32 for 8 rows
of 1,024 ids, which is written once and read several times. Here a few positions at a time go
through the head. While their logits exist, the gradients for the states and for the head's weight
are computed from them, and the backward pass only has to multiply these by the gradient of the sum,
a scalar. Nothing is computed twice, and no array [B, T, V] exists. The rule is for reverse mode
only: `jax.jvp` fails.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.model.log_probs import token_log_probs
from flaxgpt.sharding import gather_weight


def head_loss(
    width: int,
    states: jax.Array,  # [B, T, D]
    head: jax.Array,  # [V, D], the weight of the output head
    targets: jax.Array,  # int [B, T]
    weights: jax.Array,  # float32 [B, T]
) -> jax.Array:  # float32 []
    """Return the weighted sum of the cross-entropies, from products in the dtype of the states.

    `width` is the number of positions of each row in a piece. A target outside the vocabulary makes
    the sum NaN.
    """
    more = -targets.shape[1] % width  # positions that do not count, to fill the last piece

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [pieces, B, width, ...]
        if more:
            x = jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1)

    return _sum(cut(states), head, cut(targets), cut(weights))


@jax.custom_vjp
def _sum(
    states: jax.Array,  # [pieces, B, width, D]
    head: jax.Array,  # [V, D]
    targets: jax.Array,  # int [pieces, B, width]
    weights: jax.Array,  # float32 [pieces, B, width]
) -> jax.Array:  # float32 []
    matrix = gather_weight(head.astype(states.dtype), "VD", targets.size)

    def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        x, target, weight = piece
        log_probs = token_log_probs(_logits(x, matrix), target)
        return total - (weight * log_probs).sum(), None

    return lax.scan(add, jnp.float32(0), (states, targets, weights))[0]


def _forward(
    states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    matrix = gather_weight(head.astype(states.dtype), "VD", targets.size)

    def add(sums: Any, piece: Any) -> tuple[Any, Any]:
        total, d_head = sums
        x, target, weight = piece
        logits = _logits(x, matrix)
        log_probs = token_log_probs(logits, target)
        # The gradient of -log p for the logits is softmax(logits) - one_hot(target).
        probs = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        is_target = target[..., None] == jnp.arange(head.shape[0])[None, None]
        d_logits = weight[..., None] * jnp.where(is_target, probs - 1.0, probs)
        d_logits = d_logits.astype(x.dtype)
        d_x = jnp.einsum("btv,vd->btd", d_logits, matrix, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("btv,btd->vd", d_logits, x, preferred_element_type=jnp.float32)
        d_head = gather_weight(d_head, "VD", targets.size)  # split after the last piece only
        return (total - (weight * log_probs).sum(), d_head), (d_x.astype(x.dtype), log_probs)

    zeros = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), (d_states, log_probs) = lax.scan(add, zeros, (states, targets, weights))
    return total, (d_states, d_head.astype(head.dtype), log_probs)


def _backward(
    kept: tuple[jax.Array, ...], change: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_states, d_head, log_probs = kept
    scaled = (d_states.astype(jnp.float32) * change).astype(d_states.dtype)
    return scaled, d_head * change.astype(d_head.dtype), None, -log_probs * change


_sum.defvjp(_forward, _backward)


def width_of(batch: int, length: int, positions: int) -> int:
    """Return how much of a length makes pieces of about as many positions, and no more."""
    pieces = min(length, -(-batch * length // positions))
    return -(-length // pieces)


def _logits(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x, matrix, preferred_element_type=jnp.float32)
