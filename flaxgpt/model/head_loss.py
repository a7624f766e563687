"""The cross-entropy of the output head in pieces of the sequence, with its own derivative rule.

The logits of a whole batch are the largest array of a training step: 1.6 GiB in float32 for 8 rows
of 1,024 ids, which is written once and read several times. Here a few positions at a time go
through the head. While their logits exist, the gradients for the states and for the head's weight
are computed from them, and the backward pass only has to multiply these by the gradient of the sum,
a scalar. Nothing is computed twice, and no array [B, T, V] exists. The rule is for reverse mode
only: `jax.jvp` fails.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.model.log_probs import token_log_probs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    pieces: int,
    states: jax.Array,  # [B, T, D]
    head: jax.Array,  # [V, D], the weight of the output head
    targets: jax.Array,  # int [B, T]
    weights: jax.Array,  # float32 [B, T]
) -> jax.Array:  # float32 []
    """Return the weighted sum of the cross-entropies, from products in the dtype of the states.

    `pieces` must divide T. A target outside the vocabulary makes the sum NaN.
    """
    matrix = head.astype(states.dtype)

    def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        x, target, weight = piece
        log_probs = token_log_probs(_logits(x, matrix), target)
        return total - (weight * log_probs).sum(), None

    return lax.scan(add, jnp.float32(0), _cut(pieces, (states, targets, weights)))[0]


def _forward(
    pieces: int, states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    matrix = head.astype(states.dtype)

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
        return (total - (weight * log_probs).sum(), d_head), (d_x.astype(x.dtype), log_probs)

    zeros = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), kept = lax.scan(add, zeros, _cut(pieces, (states, targets, weights)))
    d_states, log_probs = jax.tree.map(_join, kept)
    return total, (d_states, d_head.astype(head.dtype), log_probs)


def _backward(
    pieces: int, kept: tuple[jax.Array, ...], change: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_states, d_head, log_probs = kept
    scaled = (d_states.astype(jnp.float32) * change).astype(d_states.dtype)
    return scaled, d_head * change.astype(d_head.dtype), None, -log_probs * change


head_loss.defvjp(_forward, _backward)


def pieces_of(batch: int, length: int, positions: int) -> int:
    """Return the smallest number of pieces of a length so that each has at most `positions`."""
    fewest = min(length, -(-batch * length // positions))
    return next(count for count in range(fewest, length + 1) if length % count == 0)


def _logits(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x, matrix, preferred_element_type=jnp.float32)


def _cut(pieces: int, arrays: Any) -> Any:  # [B, T, ...] -> [pieces, B, T / pieces, ...]
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0], pieces, -1, *x.shape[2:]).swapaxes(0, 1), arrays
    )


def _join(x: jax.Array) -> jax.Array:  # [pieces, B, T / pieces, ...] -> [B, T, ...]
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
