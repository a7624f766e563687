"""The optimiser, as nanoGPT sets it: clipping, AdamW, warm-up, cosine (all of them optax's)."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params


def learning_rate(train_cfg: TrainConfig) -> optax.Schedule:
    """Returns the rate of each update: a line up to the highest, then a cosine to the lowest.

    Update s of the warm-up has (s + 1) / (warmup_steps + 1) of the highest rate, as in nanoGPT's
    `get_lr`, so that the first one is not lost.
    """
    high, low = train_cfg.learning_rate, train_cfg.min_learning_rate
    warmup = train_cfg.warmup_steps
    line = optax.linear_schedule(high / (warmup + 1), high, warmup)
    cosine = optax.cosine_decay_schedule(high, train_cfg.steps - warmup, low / high)
    return optax.join_schedules([line, cosine], [warmup])


def make_optimizer(train_cfg: TrainConfig) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then the optimiser that `train_cfg` names.

    Args:
        train_cfg: the recipe.
    """
    rate = learning_rate(train_cfg)

    def decayed(params: Params) -> Params:
        return jax.tree.map(lambda p: train_cfg.decay == "everything" or p.ndim > 1, params)

    optimizer = optax.adamw(
        rate,
        b1=train_cfg.beta1,
        b2=train_cfg.beta2,
        eps=train_cfg.eps,
        weight_decay=train_cfg.weight_decay,
        mask=decayed,
    )
    if train_cfg.optimizer == "muon":
        muon = contrib.muon(
            rate,
            weight_decay=train_cfg.weight_decay,
            consistent_rms=_ADAMW_RMS,
            muon_weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 0),  # [out, in]
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, _shares)
    clip = (
        optax.clip_by_global_norm(train_cfg.grad_clip) if train_cfg.grad_clip else optax.identity()
    )
    return optax.chain(clip, optimizer)


_ADAMW_RMS = 0.2  # of AdamW's updates, which Muon's are scaled to (Liu et al. 2025, section 2.2)


def _shares(params: Params) -> Params:
    """Returns who updates what: embeddings and head do better with AdamW (Jordan et al. 2024)."""

    def share(path: tuple[Any, ...], p: jax.Array) -> str:
        return "muon" if path[0].key.startswith("trf_blocks") and p.ndim == 2 else "adamw"

    return jax.tree_util.tree_map_with_path(share, params)
