"""The optimizer: gradient clipping, then AdamW or Muon with warm-up and cosine decay."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax
from optax import contrib

from flaxgpt.config import block_index
from flaxgpt.training.config import TrainConfig


def learning_rate(train_cfg: TrainConfig) -> optax.Schedule:
    """Return the learning-rate schedule: linear warm-up, then a cosine down to the minimum.

    Step s of the warm-up, counted from 0, has (s + 1) / (warm-up steps + 1) of the peak, as in
    nanoGPT's `get_lr`, so the first step is not wasted.
    """
    peak, minimum = train_cfg.learning_rate, train_cfg.resolved_min_learning_rate
    steps = train_cfg.resolved_warmup_steps
    warmup = optax.linear_schedule(peak / (steps + 1), peak, steps)
    cosine = optax.cosine_decay_schedule(peak, train_cfg.steps - steps, minimum / peak)
    return optax.join_schedules([warmup, cosine], [steps])


def make_optimizer(train_cfg: TrainConfig) -> optax.GradientTransformation:
    """Return clipping by the global norm followed by the optimizer that `train_cfg` names."""
    rate = learning_rate(train_cfg)
    weight_decay = train_cfg.weight_decay
    mask = partial(jax.tree.map, lambda p: train_cfg.decay == "everything" or p.ndim > 1)
    moments = {"b1": train_cfg.beta1, "b2": train_cfg.beta2, "eps": train_cfg.eps}
    optimizer = optax.adamw(rate, **moments, weight_decay=weight_decay, mask=mask)
    if train_cfg.optimizer == "muon":
        muon = contrib.muon(
            rate,
            weight_decay=weight_decay,
            consistent_rms=0.2,  # that of AdamW's updates (Liu et al. 2025, section 2.2)
            muon_weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 0),  # [out, in]
        )
        names = partial(jax.tree_util.tree_map_with_path, _optimizer_name)
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, names)
    limit = train_cfg.grad_clip
    return optax.chain(optax.clip_by_global_norm(limit) if limit else optax.identity(), optimizer)


def _optimizer_name(path: tuple[Any, ...], p: jax.Array) -> str:
    # Embeddings and output head train better with AdamW than with Muon (Jordan et al. 2024).
    return "muon" if block_index(path[0].key) is not None and p.ndim == 2 else "adamw"
