"""`Batch`: token ids to train on, and how much each target counts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.typing import ArrayLike


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
