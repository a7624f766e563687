"""Estimates of the memory that generation and training need, without allocating any.

Weights, cache and optimizer state are exact. XLA decides how much memory a computation needs in
between: the formulas below are fitted to its `memory_analysis` on CPU (jax 0.7 to 0.12, float32)
and agree with it within 15 %. Their unit is one residual stream, B x T x D numbers:

    kept per block for the backward pass   22: the inputs of each product and norm, three of them of
                                           width F = 4 D; and 5/4 of the attention weights, which
                                           are N x T / D streams without the blocks of later keys
                                           that are skipped
    also kept with dropout                 5 before the shortcuts; 2 x the computed attention
                                           weights, for dropout on them
    temporaries of one block               13
    logits                                 2 x, for the loss and its gradient
    temporaries of one block in a prefill  9, or 2 and all attention weights if that is more; with
                                           4,096 ids or more, 23, or 20 and all attention weights
                                           (jax 0.7 needs the smaller amount)

Activations and gradients do not add up: the activations are freed by the time the gradients are
complete. The optimizer then holds gradients and updates together.

XLA on CPU undoes `remat` (it merges duplicate computations), so remat saves no memory there. It
also computes bfloat16 via float32 copies, which need up to 2.5 times the estimate. The estimates
have not been verified on GPU and TPU.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxgpt._checks import check_context, check_dtype, check_positive, check_size
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.inspection.parameters import count_params
from flaxgpt.model.attend import query_blocks

_KEPT = 22
_KEPT_WEIGHTS = 1.25
_DROPOUT = 5
_DROPOUT_WEIGHTS = 2
_TEMPORARY = 13
_PREFILL = 9
_MANY_IDS, _LARGE_PREFILL, _LARGE_PREFILL_BESIDE_WEIGHTS = 4096, 23, 20


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory in bytes, from `memory`.

    Attributes:
        weights: parameters, float32.
        kv_cache: keys and values of all ids.
        prefill: temporaries of a prefill with all ids.
        optimizer: the two moments of AdamW, float32.
        gradients: gradients and updates, float32.
        activations: activations kept for the backward pass, and logits.
        activations_with_remat: the same with `remat=True`, except on CPU (see the module
            docstring).
    """

    weights: int
    kv_cache: int
    prefill: int
    optimizer: int
    gradients: int
    activations: int
    activations_with_remat: int

    @property
    def generating(self) -> int:
        """Peak of `generate`."""
        return self.weights + self.kv_cache + self.prefill

    @property
    def training(self) -> int:
        """Peak of a training step."""
        return self.weights + self.optimizer + max(self.activations, self.gradients)

    @property
    def training_with_remat(self) -> int:
        """Peak of a training step with `remat=True`."""
        return self.weights + self.optimizer + max(self.activations_with_remat, self.gradients)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        names = ("generating", "training", "training_with_remat")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def memory(cfg: GPTConfig, batch: int, length: int, *, dtype: DTypeLike = jnp.float32) -> MemoryUse:
    """Estimate the memory that generation and a training step need.

    >>> import flaxgpt
    >>> used = flaxgpt.memory(flaxgpt.GPTConfig.preset("gpt2"), batch=1, length=1024)
    >>> used.weights // 2**20, used.kv_cache // 2**20  # MiB
    (474, 72)

    Args:
        cfg: the configuration.
        batch: number of rows (B).
        length: ids per row (T and S), at most `cfg.context_length`.
        dtype: dtype of the computation and the cache; weights and optimizer state are float32.

    Returns:
        The memory by purpose.

    Raises:
        ValueError: `batch`, `length` or `dtype` is out of range.
    """
    check_config(cfg)
    batch, length = check_size("batch", batch), check_context(cfg.context_length, length)
    stream = batch * length * cfg.emb_dim * check_dtype(dtype).itemsize
    weights = batch * cfg.n_heads * length * length * 4  # of attention; softmax is float32
    computed = sum((stop - start) * stop for start, stop in query_blocks(length)) / length**2
    kept = _KEPT * stream + _KEPT_WEIGHTS * computed * weights
    kept += _DROPOUT * stream if cfg.drop_rates.shortcut else 0
    kept += _DROPOUT_WEIGHTS * computed * weights if cfg.drop_rates.attn else 0
    kv_cache = 2 * cfg.n_layers * stream
    prefill = max(_PREFILL * stream, weights + 2 * stream)
    if batch * length >= _MANY_IDS and cfg.n_layers > 1:  # the last block computes one id per row
        prefill = max(_LARGE_PREFILL * stream, weights + _LARGE_PREFILL_BESIDE_WEIGHTS * stream)
    temporary = _TEMPORARY * stream + 2 * batch * length * cfg.vocab_size * 4
    parameters = 4 * _count(cfg)
    return MemoryUse(
        weights=parameters,
        kv_cache=kv_cache,
        prefill=prefill,
        optimizer=2 * parameters,
        gradients=2 * parameters,
        activations=int(cfg.n_layers * kept + temporary),
        activations_with_remat=int(cfg.n_layers * stream + kept + temporary),
    )


@functools.lru_cache(maxsize=64)
def _count(cfg: GPTConfig) -> int:
    return count_params(cfg).total


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """Largest batch that fits in memory, 0 if a single row does not fit.

    Attributes:
        generating: for `generate`.
        training: for a training step.
        training_with_remat: for a training step with `remat=True`.
    """

    generating: int
    training: int
    training_with_remat: int


def largest_batch(
    cfg: GPTConfig, size: float, length: int, *, dtype: DTypeLike = jnp.float32
) -> LargestBatch:
    """Return the largest batch that fits on a device, by purpose.

    Args:
        cfg: the configuration.
        size: memory of the device in bytes, such as 16e9.
        length: ids per row.
        dtype: dtype of the computation, as for `memory`.

    Returns:
        The numbers of rows.

    Raises:
        ValueError: `size` is not a positive number, or as for `memory`.
    """
    size = check_positive("size", size)
    memory(cfg, 1, length, dtype=dtype)  # checks the arguments
    most = int(size // (length * cfg.emb_dim))  # each number of a stream needs 2 bytes
    batches = range(1, 1 + min(most, 2**60))

    def largest(purpose: str) -> int:
        def needed(batch: int) -> int:
            return getattr(memory(cfg, batch, length, dtype=dtype), purpose)

        return bisect.bisect_right(batches, size, key=needed)

    return LargestBatch(*(largest(field.name) for field in dataclasses.fields(LargestBatch)))
