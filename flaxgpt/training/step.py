"""The training state and the optimizer step: pure, jitted, with the old state's memory reused."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from flaxgpt._quantized import refuse_quantized
from flaxgpt.config import GPTConfig
from flaxgpt.model import init
from flaxgpt.sharding import (
    Mesh,
    ShardRules,
    batch_parts,
    check_mesh,
    check_rules,
    constrain_tree,
    in_force,
    mesh_of,
    place,
    rules_of,
    shard,
    to_automatic,
)
from flaxgpt.training.config import TrainConfig
from flaxgpt.training.losses import Batch, LossFn, as_batch, mean, token_loss
from flaxgpt.training.optimizer import learning_rate, make_optimizer
from flaxgpt.typing import Params

Metrics = dict[str, jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "opt_state", "step", "key"),
    meta_fields=("cfg", "train_cfg", "mesh", "rules"),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a training step needs besides the batch: a pytree with static configurations.

    Attributes:
        params: float32.
        opt_state: optax state, float32.
        step: int32 [], optimizer steps taken so far.
        key: random key; step s draws its dropout from `fold_in(key, s)`.
        cfg: the architecture.
        train_cfg: the training configuration.
        mesh: the mesh of several devices that holds the arrays, or None.
        rules: how parameters, gradients and optimizer state are split over the mesh.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    cfg: GPTConfig
    train_cfg: TrainConfig
    mesh: Mesh | None = None
    rules: ShardRules | None = None


def init_state(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    params: Params | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardRules | None = None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        cfg: the architecture.
        train_cfg: the training configuration; its seed determines random parameters and dropout.
        params: initial parameters instead of random ones; copied, as steps reuse their memory.
            Parameters that are on a mesh stay on it, split as they are.
        mesh: the mesh to train on, for parameters that are not on one yet, such as
            `flaxgpt.make_mesh()`.
        rules: how to split the parameters over the mesh, if not by `flaxgpt.shard_rules(cfg)`.

    Raises:
        ValueError: the mesh has an unknown axis, or does not divide the rows of a batch; or the
            weights are int8.
    """
    refuse_quantized(params, "training")
    params_key, dropout_key = jax.random.split(jax.random.key(train_cfg.seed))
    mesh = None if mesh is None else check_mesh(mesh)
    rules = check_rules(rules, cfg, mesh)
    if params is None:
        params = init(cfg, params_key, mesh=mesh, rules=rules)
    elif mesh is not None and rules is not None:
        params = jax.tree.map(jnp.copy, shard(params, mesh, rules))
    else:
        params = jax.tree.map(jnp.array, to_automatic(params))
        if (mesh := mesh_of(params)) is not None:
            rules = rules_of(params)
            params = jax.tree.map(place, params, rules.shardings(params, mesh))
    if mesh is not None:
        check_rows(train_cfg, mesh)
    # Compiled with the shardings of its results, so that no device ever holds a whole moment.
    optimizer, shardings = make_optimizer(train_cfg), None
    if mesh is not None and rules is not None:
        shardings = rules.shardings(jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    state = TrainState(params, opt_state, jnp.int32(0), dropout_key, cfg, train_cfg, mesh, rules)
    if mesh is None:
        return state
    whole = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(state, step=place(state.step, whole), key=place(state.key, whole))


def abstract_state(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    *,
    mesh: Mesh | None = None,
    rules: ShardRules | None = None,
) -> TrainState:
    """Return the state before the first step with a `jax.ShapeDtypeStruct` for each array.

    Nothing is allocated. On a mesh, they have the shardings of the arrays of `init_state`.

    Args:
        cfg: the architecture.
        train_cfg: the training configuration.
        mesh: the mesh, as for `init_state`.
        rules: how to split the parameters, as for `init_state`.

    Raises:
        ValueError: as for `init_state`.
    """
    state = jax.eval_shape(partial(init_state, cfg, train_cfg))
    rules = check_rules(rules, cfg, mesh)
    if mesh is None or rules is None:
        return state
    mesh = check_mesh(mesh)
    check_rows(train_cfg, mesh)
    split = jax.tree.map(lambda x, s: x.update(sharding=s), state, rules.shardings(state, mesh))
    return dataclasses.replace(split, mesh=mesh, rules=rules)


def check_rows(train_cfg: TrainConfig, mesh: Mesh) -> None:
    """Raise ValueError unless a mesh divides the rows that are computed together."""
    rows, parts = train_cfg.batch_size // train_cfg.accumulate, batch_parts(mesh)
    if rows % parts:
        sizes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
        raise ValueError(
            f"batch_size={train_cfg.batch_size} with accumulate={train_cfg.accumulate} makes "
            f"pieces of {rows} rows, which the mesh {sizes} cannot split into {parts} equal parts: "
            f"use batch_size={train_cfg.accumulate * parts * -(-rows // parts)}, or a mesh whose "
            "data and fsdp divide the rows"
        )


@partial(jax.jit, donate_argnums=0, static_argnames="loss_fn")
def train_step(
    state: TrainState, batch: Batch | ArrayLike, loss_fn: LossFn = token_loss
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step.

    Args:
        state: the state, which is donated: do not use it afterwards.
        batch: a `Batch`, or int [B, T + 1]; B must be a multiple of `accumulate`.
        loss_fn: the loss to minimize, compiled once per function object.

    Returns:
        The new state and four float32 scalars: `loss` (the weighted mean), `weight` (the sum of
        the weights) and `grad_norm` (before clipping), all before the step, and `learning_rate`.
        A batch of weight 0 has loss and gradient 0.
    """
    with in_force(state.mesh):
        return _step(loss_fn, state, as_batch(batch))


@partial(jax.jit, donate_argnums=0, static_argnames="loss_fn")
def train_steps(
    state: TrainState, batches: Batch | ArrayLike, loss_fn: LossFn = token_loss
) -> tuple[TrainState, Metrics]:
    """Take K optimizer steps in one call.

    Equal to K calls of `train_step` except for rounding, and up to 1.5 times as fast for small
    models on CPU.

    Args:
        state: the state, which is donated: do not use it afterwards.
        batches: a `Batch` of ids [K, B, T + 1] and weights [K, B, T] or None, or the ids alone.
        loss_fn: as in `train_step`.

    Returns:
        The new state, and the metrics of `train_step` as float32 [K].
    """
    with in_force(state.mesh):
        return lax.scan(partial(_step, loss_fn), state, as_batch(batches))


def _step(loss_fn: LossFn, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    loss, weight, grads = _gradients(loss_fn, state, batch)
    split = partial(constrain_tree, mesh=state.mesh, rules=state.rules)
    grads = split(grads)
    optimizer = make_optimizer(state.train_cfg)
    # optax mixes its int32 step count with floats.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(state.train_cfg)(state.step)
    norm = optax.tree.norm(grads)
    metrics = {"loss": loss, "weight": weight, "grad_norm": norm, "learning_rate": rate}
    params = split(optax.apply_updates(state.params, updates))
    opt_state = split(opt_state)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
    return state, metrics


def _gradients(
    loss_fn: LossFn, state: TrainState, batch: Batch
) -> tuple[jax.Array, jax.Array, Params]:
    """Return the mean loss, the sum of the weights, and the gradient of the mean loss."""
    cfg, train_cfg, count = state.cfg, state.train_cfg, state.train_cfg.accumulate
    step_key = jax.random.fold_in(state.key, state.step)

    def sums(params: Params, piece: Batch, index: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(step_key, index) if max(cfg.drop_rates) > 0 else None
        dtype = jnp.dtype(train_cfg.dtype)
        return loss_fn(cfg, params, piece, key, dtype=dtype, remat=train_cfg.remat)

    # The mean is taken last: gradients are all-reduced as sums, so XLA can add them up first.
    of_piece = jax.value_and_grad(sums, has_aux=True)
    if count == 1:
        (total, weight), grads = of_piece(state.params, batch, 0)
        return mean(total, weight), weight, jax.tree.map(lambda g: mean(g, weight), grads)

    def add(total, numbered):  # type: ignore[no-untyped-def]
        sums, grads = jax.tree.map(jnp.add, total, of_piece(state.params, *numbered))
        return (sums, constrain_tree(grads, state.mesh, state.rules)), None

    pieces = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
    zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.params))
    ((total, weight), grads), _ = lax.scan(add, zeros, (pieces, jnp.arange(count)))
    return mean(total, weight), weight, jax.tree.map(lambda g: mean(g, weight), grads)
