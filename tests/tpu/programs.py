"""The programs that are compiled for TPU: name, topology and how to compile it."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import flaxgpt
from flaxgpt.model import param_shapes
from flaxgpt.planning.tasks import GenerateTask, TrainTask
from flaxgpt.planning.topology import topology_mesh
from flaxgpt.sharding import in_force

IS_RECORDING = "FLAXGPT_TPU_RECORD" in os.environ
BLOCKS = int(os.environ.get("FLAXGPT_TPU_BLOCKS", "2"))
# Without dropout, whose random numbers would take half of the time to compile.
CFG = dataclasses.replace(flaxgpt.GPTConfig.preset("gpt2"), n_layers=BLOCKS, drop_rate=0.0)
IS_WHOLE = BLOCKS == 12
TRAIN = (
    TrainTask(batch=8, length=1024, dtype="bfloat16")
    if IS_WHOLE
    else TrainTask(batch=2, length=256, dtype="bfloat16")
)
SHARDED = dataclasses.replace(TRAIN, batch=8 * TRAIN.batch // 2)
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile. `lower` returns it lowered for a topology; `task` is what it does."""

    name: str
    topology: str
    lower: Callable[[str], Any]
    task: GenerateTask | TrainTask | None = None
    sizes: dict[str, int] | None = None  # of the mesh

    @property
    def id(self) -> str:
        """Its name in the figures."""
        return f"{self.name}, {self.topology}"

    def compile(self) -> Any:
        """Compile it."""
        return self.lower(self.topology).compile()


def lower_task(task: GenerateTask | TrainTask, sizes: dict[str, int] | None, topology: str) -> Any:
    """Return the program that `flaxgpt.plan` compiles."""
    function, arguments = task.program(CFG, topology_mesh(topology, sizes))
    return function.lower(*arguments)


def lower_forward(attention: str, with_gradient: bool, topology: str) -> Any:
    """Return `flaxgpt.forward`, or the gradient of the sum of its logits."""
    mesh = topology_mesh(topology, None)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda leaf: leaf.update(sharding=whole), param_shapes(CFG))
    ids = jax.ShapeDtypeStruct((TRAIN.batch, TRAIN.length), jnp.int32, sharding=whole)

    def forward(params: Any, ids: jax.Array) -> jax.Array:
        with in_force(mesh):  # from which the model knows that it is traced for TPU
            return flaxgpt.forward(CFG, params, ids, dtype=jnp.bfloat16, attention=attention)

    def total(params: Any, ids: jax.Array) -> jax.Array:
        return forward(params, ids).sum()

    return jax.jit(jax.grad(total) if with_gradient else forward).lower(params, ids)


def programs() -> list[Program]:
    """Return the table of programs."""
    tasks: dict[str, GenerateTask | TrainTask] = {
        "decode, 1 row": decode(1),
        "decode, 7 rows": decode(7),
        "decode, 8 rows": decode(8),
        "train step": TRAIN,
    }
    if IS_WHOLE:
        tasks["decode, 1 row, float32"] = decode(1, "float32")
        tasks["decode, 8 rows, 1,024 ids"] = decode(8, ids=512)
    found = []
    for chip in ("v5e", "v6e"):
        one, eight = f"{chip}:1x1", f"{chip}:2x4"
        found.append(Program("forward", one, partial(lower_forward, "plain", False)))
        for name, task in tasks.items():
            found.append(Program(name, one, partial(lower_task, task, None), task))
        for name, sizes in {"data x fsdp x tensor": SPLIT, "fsdp": {"fsdp": 8}, "data": {}}.items():
            lower = partial(lower_task, SHARDED, sizes)
            found.append(Program(f"train step, {name}", eight, lower, SHARDED, sizes))
        for name, with_gradient in {"forward": False, "backward": True}.items():
            lower = partial(lower_forward, "splash", with_gradient)
            found.append(Program(f"splash, {name}", one, lower))
    return found


def decode(batch: int, dtype: Any = "bfloat16", ids: int = 128) -> GenerateTask:
    """Return the task of generating as many ids as the prompts have."""
    return GenerateTask(batch=batch, prompt_length=ids, new_tokens=ids, dtype=dtype)
