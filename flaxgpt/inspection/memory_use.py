"""How much memory a model takes, to generate and to train: an estimate, nothing is allocated.

Weights, cache and optimiser state are exact. What a computation needs on its way is XLA's affair;
the formulas here were fitted to its `memory_analysis` on CPU (jax 0.7 to 0.12, float32), which they
meet within 15 %, and are counted in units of one residual stream, B x T x D numbers:

    kept of each block for the backward pass   22: what goes into each product and each norm, among
                                               it thrice the wide F = 4 D; and 5/4 of the attention
                                               weights, which are N x T / D streams less the blocks
                                               of later keys that are left out
    kept besides for dropout                   5 for that before the shortcuts; twice the attention
                                               weights that are computed, for that on them
    at work in one block                       13
    logits                                     twice, for the loss and its gradient
    at work in one block of a prefill          9, or 2 and all attention weights if that is more;
                                               from 4,096 ids in all on, 23, or 20 and those (jax
                                               0.7 stays at 9 and takes that much less)

Activations and gradients do not add up: by the time the last gradients are there, the activations
are gone. The optimiser then holds gradients and updates at once.

XLA on CPU undoes `remat` (it merges what is computed twice), so there the figures with it are those
without. It also computes bfloat16 by way of float32 copies, and takes up to 2.5 times what is said
here for that dtype. On GPU and TPU nothing here has been measured.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxgpt._checks import check_dtype, check_extent, check_positive
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.inspection.parameters import count_params
from flaxgpt.model.attend import query_blocks

_KEPT = 22
_KEPT_WEIGHTS = 1.25
_DROPOUT = 5
_DROPOUT_WEIGHTS = 2
_AT_WORK = 13
_PREFILL = 9
_MANY_IDS, _LARGE_PREFILL, _LARGE_PREFILL_BESIDE_WEIGHTS = 4096, 23, 20


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """What `memory` found, in bytes.

    Attributes:
        weights: parameters, float32.
        kv_cache: keys and values of all ids.
        prefill: what reading the whole text at once takes on its way.
        optimizer: AdamW's two moments, float32.
        gradients: gradients and the updates made of them, float32.
        activations: what a training step keeps between forward and backward, and its logits.
        activations_with_remat: the same with `remat=True`, where XLA keeps to it (see above).
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
        """All that `generate` takes."""
        return self.weights + self.kv_cache + self.prefill

    @property
    def training(self) -> int:
        """All that a training step takes; activations have gone when gradients are complete."""
        return self.weights + self.optimizer + max(self.activations, self.gradients)

    @property
    def training_with_remat(self) -> int:
        """The same with `remat=True`."""
        return self.weights + self.optimizer + max(self.activations_with_remat, self.gradients)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values, ready for JSON."""
        names = ("generating", "training", "training_with_remat")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def memory(cfg: GPTConfig, batch: int, length: int, *, dtype: DTypeLike = jnp.float32) -> MemoryUse:
    """Returns the memory that generating and a training step take, estimated without either.

    >>> import flaxgpt
    >>> used = flaxgpt.memory(flaxgpt.GPTConfig.preset("gpt2"), batch=1, length=1024)
    >>> used.weights // 2**20, used.kv_cache // 2**20  # MiB
    (474, 72)

    Args:
        cfg: the architecture.
        batch: rows (B).
        length: ids a row (T and S), at most `cfg.context_length`.
        dtype: what is computed in, and what the cache holds; weights and optimiser stay float32.

    Raises:
        ValueError: a batch or length that the model cannot have, or another dtype.
    """
    check_config(cfg)
    batch, length = check_extent(cfg.context_length, batch, length)
    stream = batch * length * cfg.emb_dim * check_dtype(dtype).itemsize
    weights = batch * cfg.n_heads * length * length * 4  # of attention: softmax is float32
    computed = sum((stop - start) * stop for start, stop in query_blocks(length)) / length**2
    kept = _KEPT * stream + _KEPT_WEIGHTS * computed * weights
    kept += _DROPOUT * stream if cfg.drop_rates.shortcut else 0
    kept += _DROPOUT_WEIGHTS * computed * weights if cfg.drop_rates.attn else 0
    kv_cache = 2 * cfg.n_layers * stream
    prefill = max(_PREFILL * stream, weights + 2 * stream)
    if batch * length >= _MANY_IDS and cfg.n_layers > 1:  # the last block sees one id a row
        prefill = max(_LARGE_PREFILL * stream, weights + _LARGE_PREFILL_BESIDE_WEIGHTS * stream)
    passing = _AT_WORK * stream + 2 * batch * length * cfg.vocab_size * 4
    parameters = 4 * count_params(cfg).total
    return MemoryUse(
        weights=parameters,
        kv_cache=kv_cache,
        prefill=prefill,
        optimizer=2 * parameters,
        gradients=2 * parameters,
        activations=int(cfg.n_layers * kept + passing),
        activations_with_remat=int(cfg.n_layers * stream + kept + passing),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """Largest batch of some length that fits, 0 where not one row does.

    Attributes:
        generating: with `generate`.
        training: in a training step.
        training_with_remat: the same with `remat=True`.
    """

    generating: int
    training: int
    training_with_remat: int


def fitting(cfg: GPTConfig, size: float, length: int, *, dtype: DTypeLike = jnp.float32) -> Fit:
    """Returns the largest batches that fit a device.

    Args:
        cfg: the architecture.
        size: memory of the device, in bytes, such as 16e9.
        length: ids a row.
        dtype: as for `memory`.

    Raises:
        ValueError: as for `memory`; a size that is no positive number.
    """
    room = check_positive("size", size)

    def largest(purpose: str) -> int:
        def fits(batch: int) -> bool:
            return getattr(memory(cfg, batch, length, dtype=dtype), purpose) <= room

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    return Fit(largest("generating"), largest("training"), largest("training_with_remat"))
