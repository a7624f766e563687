"""Estimates of the memory that generation and training need, without allocating any.

Weights, cache and optimizer state are exact. The rest is fitted to XLA's `memory_analysis` on CPU
(jax 0.10 to 0.12, float32), within 15 %; with jax 0.7, generation needs up to a fifth more, or for
a prefill of thousands of ids as little as half. Activations and gradients do not add up.

XLA on CPU merges the duplicate computations of `remat`, so remat saves no memory there. It also
computes bfloat16 via float32 copies, which need up to 2.5 times the estimate. The estimates have
not been verified on GPU and TPU.
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
from flaxgpt.platform import Platform

# The unit is one residual stream, B x T x D numbers; "weights" are attention weights, N x T x T.
_KEPT = 22  # per block for the backward pass: inputs of products and norms, three of width F = 4 D
_KEPT_WEIGHTS = 1.25  # of the weights that are computed, without skipped blocks of later keys
_DROPOUT = 5  # also kept per block, before the shortcuts
_DROPOUT_WEIGHTS = 2  # also kept per block, for dropout on the computed weights
_TEMPORARY = 13  # of one block
_PREFILL, _PREFILL_BESIDE_WEIGHTS = 9, 2  # of one block in a prefill; the second plus all weights
# With many ids; jax 0.7 needs the smaller amount.
_MANY_IDS, _LARGE_PREFILL, _LARGE_PREFILL_BESIDE_WEIGHTS = 4096, 23, 18


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory in bytes, from `memory`.

    Attributes:
        weights: parameters, float32.
        kv_cache: keys and values of all ids.
        prefill: temporaries of a prefill with all ids; less on CPU, where prompts are read in
            smaller groups.
        optimizer: the two moments of AdamW, float32.
        gradients: gradients and updates, float32.
        activations: activations kept for the backward pass, and logits.
        activations_with_remat: the same with `remat=True`, which has no effect on CPU.
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
    rows = min(batch, Platform().prompts_at_once(length))
    read, seen = stream // batch * rows, weights // batch * rows
    prefill = max(_PREFILL * read, seen + _PREFILL_BESIDE_WEIGHTS * read)
    if rows * length >= _MANY_IDS and cfg.n_layers > 1:  # the last block computes one id per row
        prefill = max(_LARGE_PREFILL * read, seen + _LARGE_PREFILL_BESIDE_WEIGHTS * read)
    logits = 2 * batch * length * cfg.vocab_size * 4  # for the loss and its gradient
    temporary = _TEMPORARY * stream + logits
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
    """Largest batch that fits in memory by purpose, 0 if a single row does not fit."""

    generating: int
    training: int
    training_with_remat: int


def largest_batch(
    cfg: GPTConfig, size: float, length: int, *, dtype: DTypeLike = jnp.float32
) -> LargestBatch:
    """Return the largest batch, in rows, that fits on a device.

    Args:
        cfg: the configuration.
        size: memory of the device in bytes, such as 16e9.
        length: ids per row.
        dtype: dtype of the computation.

    Raises:
        ValueError: `size` is not a positive number, or as for `memory`.
    """
    size = check_positive("size", size)
    memory(cfg, 1, length, dtype=dtype)  # checks the arguments
    most = int(size // (length * cfg.emb_dim))  # each number of a stream needs 2 bytes
    batches = range(1, 1 + min(most, 2**60))

    def largest(purpose: str) -> int:
        return bisect.bisect_right(
            batches, size, key=lambda n: getattr(memory(cfg, n, length, dtype=dtype), purpose)
        )

    return LargestBatch(*(largest(field.name) for field in dataclasses.fields(LargestBatch)))
