"""`flaxgpt shard`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import Any

import jax
import tyro
from jax.sharding import AbstractMesh

from flaxgpt._checks import check_size
from flaxgpt.cli import tables
from flaxgpt.cli.common import progress, read_architecture, say
from flaxgpt.planning import TrainTask, step_cost
from flaxgpt.planning.tasks import Dtype, Optimizer
from flaxgpt.sharding import make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class ShardCommand:
    """Show what a training step costs on several devices, without having them.

    The step is compiled for the mesh, on simulated CPU devices if there are too few others, and
    nothing is allocated: neither weights nor activations. The output lists the memory on each
    device, and what the devices send each other, by kind of operation and axes of the mesh.

    Compiling all 48 blocks of gpt2-xl takes minutes; --n-layers 2 shows the pattern in seconds.

    Examples:
      flaxgpt shard gpt2-xl --mesh data=2,fsdp=4
      flaxgpt shard gpt2 --mesh fsdp=2,tensor=2 --vocab-size 50304 --n-layers 2
    """

    model: tyro.conf.Positional[str]
    """A preset (gpt2, gpt2-xl, book-124M, ...), or a model as for generate; a hub id needs a slash,
    as in openai-community/gpt2."""

    mesh: str
    """Sizes of the axes data, fsdp and tensor, such as data=2,fsdp=4; 1 for those left out."""

    batch: int = 8
    """Sequences per optimizer step, on all devices together."""

    length: int | None = None
    """Ids per sequence; the context length by default."""

    accumulate: int = 1
    """Pieces into which a batch is split to save memory."""

    optimizer: Optimizer = "adamw"
    """Optimizer, as for train."""

    dtype: Dtype = "float32"
    """Dtype to compute in; weights and optimizer state are float32."""

    remat: bool = False
    """Recompute each block's activations in the backward pass, which saves little on CPU."""

    n_layers: int | None = None
    """Number of blocks, instead of the model's."""

    vocab_size: int | None = None
    """Size of the vocabulary, instead of the model's, such as 50304 for tensor=2 to 128."""

    json: bool = False
    """Print JSON with the keys model, config, step and those of `flaxgpt.planning.StepCost`; sizes
    are bytes on each device."""

    def run(self) -> None:
        """Print to standard output."""
        cfg = read_architecture(self.model, self.n_layers, self.vocab_size)
        sizes = _sizes(self.mesh)
        length = cfg.context_length if self.length is None else self.length
        task = TrainTask(
            self.batch, length, self.dtype, self.remat, self.accumulate, self.optimizer
        )
        task.check(cfg, AbstractMesh(tuple(sizes.values()), tuple(sizes)))  # before any device
        mesh = make_mesh(**sizes, devices=_devices(math.prod(sizes.values())))
        with progress(f"compiling {cfg.n_layers} blocks for {mesh.size} devices"):
            cost = step_cost(cfg, task.train_config(), mesh, length)
        if self.json:
            names = ("batch", "accumulate", "optimizer", "dtype", "remat")
            step = {name: getattr(self, name) for name in names} | {"length": length}
            values = {"model": self.model, "config": cfg.to_dict(), "step": step} | cost.to_dict()
            say(json.dumps(values, indent=2, allow_nan=False) + "\n")
        else:
            tables.print_step_cost(cost, self.batch, length)


def _sizes(text: str) -> dict[str, int]:
    """Return the size of each axis given; unlike in `make_mesh`, `data` is 1 by default."""
    sizes = {"data": 1} | parse_mesh(text)
    for name, size in sizes.items():
        check_size(name, size)
    return sizes


def _devices(count: int) -> list[Any]:
    """Return JAX's devices, or `count` simulated ones if those are too few."""
    with contextlib.suppress(RuntimeError):  # JAX has started, so it has the devices that it has
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) >= count or found[0].platform == "cpu":
        return found
    try:
        return jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS excludes it
        return found
