"""The training state, and its updates: pure, jitted, the old state's memory reused."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flaxgpt.config import GPTConfig
from flaxgpt.model import init
from flaxgpt.training.config import TrainConfig
from flaxgpt.training.losses import loss
from flaxgpt.training.optimizer import learning_rate, make_optimizer
from flaxgpt.typing import Params

Metrics = dict[str, jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "opt_state", "step", "key"),
    meta_fields=("cfg", "train_cfg"),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update needs but for the batch: a pytree, its two configurations static.

    Attributes:
        params: float32.
        opt_state: optax's, float32.
        step: int32 [], updates so far.
        key: random key; the dropout of update s has `fold_in(key, s)`.
        cfg: the architecture.
        train_cfg: the recipe.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    cfg: GPTConfig
    train_cfg: TrainConfig


def init_state(cfg: GPTConfig, train_cfg: TrainConfig, params: Params | None = None) -> TrainState:
    """Returns the state before the first update.

    Args:
        cfg: the architecture.
        train_cfg: the recipe; its seed draws the parameters and dropout.
        params: what to start from, if not freshly drawn. They are copied, as the state's memory is
            given away at each update.
    """
    of_params, of_dropout = jax.random.split(jax.random.key(train_cfg.seed))
    params = init(cfg, of_params) if params is None else jax.tree.map(jnp.array, params)
    opt_state = jax.jit(make_optimizer(train_cfg).init)(params)
    return TrainState(params, opt_state, jnp.int32(0), of_dropout, cfg, train_cfg)


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and what the update was like.

    Args:
        state: donated: do not use it again.
        batch: int [B, T + 1], as in `loss`; B must be a multiple of `accumulate`.

    Returns:
        The state and three float32 scalars: `loss` and `grad_norm` (before clipping) of the
        parameters before the update, and the `learning_rate`.
    """
    return _update(state, batch)


@partial(jax.jit, donate_argnums=0)
def train_steps(state: TrainState, batches: jax.Array) -> tuple[TrainState, Metrics]:
    """Returns the state after K updates in one call, and what each was like.

    The same as K calls of `train_step` but for rounding. On CPU a small model trains up to half
    as fast again so: the memory of one update serves the next.

    Args:
        state: donated: do not use it again.
        batches: int [K, B, T + 1].

    Returns:
        The state, and the scalars of `train_step` as float32 [K].
    """
    return lax.scan(_update, state, batches)


def _update(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
    value, grads = _loss_and_grads(state, batch)
    optimizer = make_optimizer(state.train_cfg)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 count with floats
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(state.train_cfg)(state.step)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(
        state, params=params, opt_state=opt_state, step=state.step + 1
    ), metrics


def _loss_and_grads(state: TrainState, batch: jax.Array) -> tuple[jax.Array, Params]:
    cfg, train_cfg = state.cfg, state.train_cfg
    drops = max(cfg.drop_rates) > 0
    step_key = jax.random.fold_in(state.key, state.step)

    def of(piece: jax.Array, index: jax.Array | int) -> tuple[jax.Array, Params]:
        return jax.value_and_grad(loss, argnums=1)(
            cfg,
            state.params,
            piece,
            jax.random.fold_in(step_key, index) if drops else None,
            dtype=jnp.dtype(train_cfg.dtype),
            remat=train_cfg.remat,
        )

    count = train_cfg.accumulate
    if count == 1:
        return of(batch, 0)
    pieces = batch.reshape(count, -1, batch.shape[-1])

    def add(total: tuple[jax.Array, Params], numbered: tuple[jax.Array, jax.Array]):  # type: ignore[no-untyped-def]
        return jax.tree.map(jnp.add, total, of(*numbered)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    total, _ = lax.scan(add, zeros, (pieces, jnp.arange(count)))
    return jax.tree.map(lambda x: x / count, total)
