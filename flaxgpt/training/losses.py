"""Cross-entropy of the next id: what training makes small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_ids
from flaxgpt.config import GPTConfig
from flaxgpt.model.gpt import forward
from flaxgpt.typing import Params


def loss(
    cfg: GPTConfig,
    params: Params,
    batch: ArrayLike,
    dropout_key: jax.Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Returns the mean negative log-probability, in nats, of each id given those before it.

    Pure, and transparent to `jit`, `grad` and `vmap`, as `forward` is.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        batch: int [B, T + 1]: the first T of a row are inputs, the last T their targets; T at
            most `cfg.context_length`.
        dropout_key: a key turns dropout on, None leaves it off.
        dtype: what the model computes in; the cross-entropy is float32.
        remat: as in `forward`.

    Returns:
        float32 []. Under `jit`, where ids cannot be looked at, one outside the vocabulary makes
        it NaN.

    Raises:
        ValueError: a batch that `forward` would refuse, or of rows of one id.
    """
    ids = check_ids(cfg.vocab_size, batch)
    if ids.shape[1] < 2:
        raise ValueError(f"batch of shape {ids.shape} has no targets: give at least 2 ids a row")
    inputs, targets = ids[:, :-1], jnp.asarray(ids[:, 1:])
    logits = forward(cfg, params, inputs, dropout_key=dropout_key, dtype=dtype, remat=remat)
    # A gather counts negative indices from the end: -1 must be NaN like any other bad id.
    targets = jnp.where(targets < 0, cfg.vocab_size, targets.astype(jnp.int32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def evaluate(
    cfg: GPTConfig,
    params: Params,
    windows: np.ndarray,
    *,
    batch_size: int = 12,
    dtype: DTypeLike = jnp.float32,
) -> float:
    """Returns the mean `loss` of windows, without dropout.

    Args:
        cfg: the configuration.
        params: parameters of that configuration.
        windows: int [n, T + 1], n at least 1.
        batch_size: windows computed together; the figure does not depend on it.
        dtype: what the model computes in.

    Raises:
        ValueError: windows that `loss` would refuse.
    """
    total = 0.0
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        total += len(rows) * float(_loss(cfg, params, rows, dtype=dtype))
    return total / len(windows)


_loss = jax.jit(loss, static_argnames=("cfg", "dtype"))
