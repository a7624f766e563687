"""Batches, and loss functions: a weighted sum of per-token losses, and the sum of the weights."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_ids
from flaxgpt._quantized import is_quantized
from flaxgpt.config import GPTConfig
from flaxgpt.model.gpt import head_weight, logits, states
from flaxgpt.model.head_loss import head_loss, width_of
from flaxgpt.model.log_probs import token_log_probs
from flaxgpt.platform import platform_of
from flaxgpt.sharding import automatic, batch_parts
from flaxgpt.typing import Params

_NO_WEIGHT = "all weights are 0, so there is no mean loss: at least one target must count"


@partial(jax.tree_util.register_dataclass, data_fields=("ids", "weights"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences, and the weight of each target: a pytree.

    The loss of a batch is the weighted mean over its targets. A weight of 0 masks a target, such as
    the prompt in instruction fine-tuning.

    Attributes:
        ids: int [B, T + 1]: in each row, the first T ids are inputs and the last T their targets.
        weights: float32 or bool [B, T], 0 or more; None counts every target once, at no cost.
    """

    ids: Any
    weights: Any = None


def as_batch(batch: Batch | ArrayLike) -> Batch:
    """Return `batch` itself, or the batch in which every target of an array of ids counts once."""
    return batch if isinstance(batch, Batch) else Batch(batch)


class LossFn(Protocol):
    """A pure function that training minimizes, such as `token_loss`.

    It returns the weighted sum of the losses and the sum of the weights, both float32 [], so that
    the batches of an evaluation and the pieces of gradient accumulation add up to the exact mean.
    The sum of the weights must not depend on the parameters.
    """

    def __call__(
        self,
        cfg: GPTConfig,
        params: Params,
        batch: Batch,
        dropout_key: jax.Array | None,
        *,
        dtype: DTypeLike,
        remat: bool,
    ) -> tuple[jax.Array, jax.Array]: ...


def token_loss(
    cfg: GPTConfig,
    params: Params,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the summed cross-entropy of the next token, and the sum of the weights.

    Args:
        cfg: the architecture.
        params: its parameters.
        batch: ids [B, T + 1], T at most `cfg.context_length`, and weights [B, T] or None.
        dropout_key: a random key enables dropout; None disables it.
        dtype: dtype to compute in; the cross-entropy is always float32.
        remat: whether to recompute activations in the backward pass, as in `forward`.

    Returns:
        Two float32 []: the weighted sum in nats, and the sum of the weights, or the number of
        targets without weights. Under `jit`, an id outside the vocabulary makes the first NaN. On
        TPU, the head and the cross-entropy are computed in pieces, which `jax.jvp` cannot
        differentiate; `jax.grad` can.

    Raises:
        ValueError: the ids are invalid (see `forward`) or fewer than 2 per row, or the weights are
            negative, not finite or of the wrong shape. Under `jit`, only shapes are checked.
    """
    ids = check_ids(cfg.vocab_size, batch.ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids of shape {ids.shape} have no targets: give at least 2 ids per row")
    targets = jnp.asarray(ids[:, 1:])
    weights = None if batch.weights is None else _checked_weights(batch.weights, targets.shape)
    inputs = ids[:, :-1]
    final = states(cfg, params, inputs, dropout_key=dropout_key, dtype=dtype, remat=remat)
    positions = platform_of(params).loss_positions
    if positions is not None and not is_quantized(params):
        rows = max(1, ids.shape[0] // batch_parts(jax.sharding.get_abstract_mesh()))
        width = width_of(rows, targets.shape[1], positions)
        counted = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
        total = head_loss(width, final, head_weight(cfg, params), targets, counted)
        return total, counted.sum()
    losses = -token_log_probs(logits(cfg, params, final), targets)
    if weights is None:
        return losses.sum(), jnp.float32(losses.size)
    return (weights * losses).sum(), weights.sum()


def _checked_weights(weights: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    if jnp.shape(weights) != shape:
        raise ValueError(f"weights of shape {jnp.shape(weights)} must be {shape}: one per target")
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights, np.float32)
        faulty = values[~(np.isfinite(values) & (values >= 0))]
        if faulty.size:
            raise ValueError(f"weight {faulty[0]} must be a finite number, 0 or more")
    return jnp.asarray(weights, jnp.float32)


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    # A batch in which no target counts has the mean 0, and so a gradient of 0 instead of NaN.
    return total / jnp.where(weight == 0, 1.0, weight)


def loss(
    cfg: GPTConfig,
    params: Params,
    batch: Batch | ArrayLike,
    dropout_key: jax.Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Return the mean cross-entropy of the next token, in nats.

    Pure; works under `jit`, `grad` and `vmap`. The other arguments are those of `token_loss`.

    Args:
        cfg: the architecture, static under `jit`.
        params: its parameters.
        batch: a `Batch`, or int [B, T + 1] with T at most `cfg.context_length`.

    Returns:
        float32 []: the weighted mean. Under `jit`, it is 0 if all weights are 0.

    Raises:
        ValueError: the batch is invalid (see `token_loss`), or all its weights are 0.
    """
    batch = as_batch(batch)
    total, weight = token_loss(cfg, params, batch, dropout_key, dtype=dtype, remat=remat)
    if not isinstance(weight, jax.core.Tracer) and weight == 0:
        raise ValueError(_NO_WEIGHT)
    return mean(total, weight)


def mean_loss(
    cfg: GPTConfig,
    params: Params,
    windows: Batch | ArrayLike,
    *,
    batch_size: int = 12,
    dtype: DTypeLike = jnp.float32,
    loss_fn: LossFn = token_loss,
) -> float:
    """Return the mean loss over many windows, without dropout.

    Args:
        cfg: the architecture.
        params: its parameters.
        windows: a `Batch`, or int [n, T + 1], with n at least 1.
        batch_size: windows per forward pass; it changes the result by rounding only.
        dtype: dtype to compute in.
        loss_fn: the loss, which is compiled once per function object.

    Raises:
        ValueError: the windows have an invalid shape, or all their weights are 0.
    """
    windows = as_batch(windows)
    total = weight = 0.0
    for start in range(0, len(windows.ids), batch_size):
        rows = jax.tree.map(lambda x, i=start: x[i : i + batch_size], windows)
        sums = _totals(loss_fn, cfg, params, rows, dtype=dtype)
        total, weight = total + float(sums[0]), weight + float(sums[1])
    if weight == 0:
        raise ValueError(_NO_WEIGHT)
    return total / weight


@automatic
@partial(jax.jit, static_argnums=(0, 1), static_argnames="dtype")
def _totals(
    loss_fn: LossFn, cfg: GPTConfig, params: Params, batch: Batch, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    return loss_fn(cfg, params, batch, None, dtype=dtype, remat=False)
