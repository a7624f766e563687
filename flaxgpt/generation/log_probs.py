"""Log-probabilities of new ids: as the loop records them, and as `generate` returns them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxgpt._checks import check_size


@dataclasses.dataclass(frozen=True)
class ScoredIds:
    """The new ids of a row, and how likely the model found them.

    Probabilities are the model's own, from the logits before hooks, temperature and filters.

    Attributes:
        ids: the new ids.
        log_probs: the natural logarithm of each one's probability.
        top: for each of them, the most likely ids with their log-probabilities, the most likely
            first; empty lists unless alternatives were asked for.
    """

    ids: list[int]
    log_probs: list[float]
    top: list[list[tuple[int, float]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the loop records beside the ids, at the same columns."""

    chosen: jax.Array  # float32 [B, W]
    top: jax.Array  # float32 [B, W, K], in falling order
    top_ids: jax.Array  # int32 [B, W, K]


def check_alternatives(vocab_size: int, return_logprobs: bool, top_logprobs: int) -> int | None:
    """Return how many alternatives to record, or None to record nothing; or raise ValueError."""
    if not isinstance(return_logprobs, bool):
        raise ValueError(f"return_logprobs={return_logprobs!r} must be True or False")
    if top_logprobs != 0:
        top_logprobs = check_size("top_logprobs", top_logprobs)
        if top_logprobs > vocab_size:
            raise ValueError(f"top_logprobs={top_logprobs} exceeds vocab_size={vocab_size}")
        if not return_logprobs:
            raise ValueError(
                f"top_logprobs={top_logprobs} has no effect alone: set return_logprobs=True too"
            )
    return top_logprobs if return_logprobs else None


def no_scores(batch: int, width: int, alternatives: int) -> Scores:
    """Return the record before the first new id."""
    shape = (batch, width, alternatives)
    return Scores(
        jnp.zeros(shape[:2], jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )


def record(scores: Scores, logits: jax.Array, new: jax.Array, column: jax.Array) -> Scores:
    """Return the record with that of new ids, int32 [B], in a column; logits are [B, V]."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(new, 0)[:, None], axis=1)[:, 0]
    top, top_ids = lax.top_k(log_probs, scores.top.shape[-1])

    def write(array: jax.Array, value: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, value[:, None], column, axis=1)

    return Scores(
        write(scores.chosen, chosen),
        write(scores.top, top),
        write(scores.top_ids, top_ids.astype(jnp.int32)),
    )


def scored_rows(rows: list[list[int]], scores: Any, first: int) -> list[ScoredIds]:
    """Return the rows with what was recorded of them from a column on."""
    chosen, top, top_ids = (np.asarray(x) for x in (scores.chosen, scores.top, scores.top_ids))

    def alternatives(row: int, column: int) -> list[tuple[int, float]]:
        ids, log_probs = top_ids[row, column].tolist(), top[row, column].tolist()
        return list(zip(ids, log_probs, strict=True))

    return [
        ScoredIds(
            ids=ids,
            log_probs=chosen[i, first : first + len(ids)].tolist(),
            top=[alternatives(i, first + k) for k in range(len(ids))],
        )
        for i, ids in enumerate(rows)
    ]
