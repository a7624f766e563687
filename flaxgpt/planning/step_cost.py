"""What one training step costs on a mesh: memory per device and communication.

The step is the real `train_step`, compiled for arrays that have a shape and a sharding but no data.
Weights, optimizer state and gradients are counted from the rules, exactly. The rest is what XLA
says about the program that it compiled, and holds for its platform. On simulated CPU devices,
bfloat16 is computed in float32, `remat` saves little, and gradients that are split along `fsdp` are
summed by an all-reduce, where XLA for TPU uses a reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flaxgpt._checks import check_context
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.planning.collectives import Collective, collectives
from flaxgpt.platform import PLATFORMS, Platform
from flaxgpt.sharding import ShardRules, activation_sharding, axis_names, check_mesh, shard_rules
from flaxgpt.sharding.rules import path_of

if TYPE_CHECKING:
    from flaxgpt.training import TrainConfig, TrainState


@dataclasses.dataclass(frozen=True)
class Unsplit:
    """A parameter that an axis of the mesh does not split, though its rule names the axis.

    Attributes:
        path: path of the parameter, such as "trf_blocks_0/att/W_query/weight".
        shape: its shape.
        axis: the axis of the mesh.
        reason: why, such as "25 heads are not a multiple of 2".
    """

    path: str
    shape: tuple[int, ...]
    axis: str
    reason: str


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The cost of a training step, from `step_cost`. Sizes are bytes on each device.

    Attributes:
        platform: JAX's name of the platform that the step was compiled for.
        mesh: pairs of an axis and its size.
        weights: parameters, float32.
        optimizer: the optimizer's state.
        gradients: gradients, float32, which are split like the weights.
        arguments: everything the step takes: weights, optimizer state, batch, step and key.
        temporaries: the most that the compiled step allocates besides its arguments: activations,
            gathered weights and gradients.
        unsplit: parameters that an axis does not split, and why.
        collectives: what devices send each other in one step, those that receive most first.
    """

    platform: str
    mesh: tuple[tuple[str, int], ...]
    weights: int
    optimizer: int
    gradients: int
    arguments: int
    temporaries: int
    unsplit: tuple[Unsplit, ...]
    collectives: tuple[Collective, ...]

    @property
    def peak(self) -> int:
        """Memory that the step needs: arguments, whose memory the results reuse, and the rest."""
        return self.arguments + self.temporaries

    @property
    def received(self) -> int:
        """Bytes that each device receives from others per step."""
        return sum(collective.received for collective in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        totals = {"peak": self.peak, "received": self.received}
        return dataclasses.asdict(self) | {"mesh": dict(self.mesh)} | totals


def step_cost(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    mesh: Mesh,
    length: int | None = None,
    *,
    rules: ShardRules | None = None,
) -> StepCost:
    """Compile a training step, and return its memory per device and its communication.

    >>> import flaxgpt
    >>> from flaxgpt.training import TrainConfig
    >>> cfg = flaxgpt.GPTConfig(vocab_size=64, context_length=8, emb_dim=16, n_heads=2, n_layers=1)
    >>> cost = step_cost(cfg, TrainConfig(batch_size=4), flaxgpt.make_mesh())  # with one device
    >>> cost.weights == cost.gradients == 4 * flaxgpt.count_params(cfg).total, cost.collectives
    (True, ())

    Nothing is allocated, but the devices of the mesh must exist. To simulate n devices on CPU, call
    `jax.config.update("jax_num_cpu_devices", n)` before any other function of JAX.

    Args:
        cfg: the architecture.
        train_cfg: the training configuration.
        mesh: the mesh, from `flaxgpt.make_mesh`.
        length: ids per row (T); the context length by default.
        rules: how to split the parameters, if not by `flaxgpt.shard_rules(cfg)`.

    Returns:
        The cost of one step.

    Raises:
        ValueError: `length` is out of range, the mesh has an unknown axis, or it does not divide
            the rows of a batch.
    """
    from flaxgpt.training import train_step  # slow to import

    check_config(cfg)
    mesh, rules = check_mesh(mesh), shard_rules(cfg) if rules is None else rules
    length = check_context(cfg.context_length, cfg.context_length if length is None else length)
    state, ids = abstract_step(cfg, train_cfg, mesh, rules, length)
    platform = mesh.devices.flat[0].platform
    options: dict[str, str | bool] = dict(PLATFORMS.get(platform, Platform()).plan_options)
    compiled = train_step.lower(state, ids).compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    weights = _bytes_per_device(state.params)
    return StepCost(
        platform=platform,
        mesh=tuple(mesh.shape.items()),
        weights=weights,
        optimizer=_bytes_per_device(state.opt_state),
        gradients=weights,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        unsplit=tuple(_unsplit(cfg, rules, state.params, mesh)),
        collectives=collectives(compiled.as_text() or "", mesh),
    )


def abstract_step(
    cfg: GPTConfig, train_cfg: TrainConfig, mesh: Mesh, rules: ShardRules, length: int
) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    """Return the arguments of `train_step` on a mesh, which have no data."""
    from flaxgpt.training import abstract_state  # slow to import

    state = abstract_state(cfg, train_cfg, mesh=mesh, rules=rules)
    shape = (train_cfg.batch_size, length + 1)
    sharding = activation_sharding("BT", shape, mesh)
    return state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _unsplit(cfg: GPTConfig, rules: ShardRules, params: Any, mesh: Mesh) -> Iterator[Unsplit]:
    """Yield the parameters that an axis does not split, though their rule names it."""
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = path_of(keys)
        split = tuple(leaf.sharding.spec) + (None,) * len(leaf.shape)
        for asked, given, size in zip(rules.rule(path), split, leaf.shape, strict=False):
            for axis in axis_names(asked):
                parts = mesh.shape.get(axis, 1)
                if parts > 1 and axis not in axis_names(given):
                    # Heads stay whole, so their number decides if the size is divisible.
                    what = f"{cfg.n_heads} heads are" if size % parts == 0 else f"{size} is"
                    yield Unsplit(path, leaf.shape, axis, f"{what} not a multiple of {parts}")
