"""`plan`: compile a program for TPU chips that are not attached, and report what that says."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from flaxgpt.config import GPTConfig
from flaxgpt.planning.chips import chip_of
from flaxgpt.planning.collectives import Collective, collectives_of
from flaxgpt.planning.operations import (
    Operation,
    StepTime,
    loops,
    operations,
    skipped_branches,
    step_time,
)
from flaxgpt.planning.program_text import Program, parse
from flaxgpt.planning.tasks import GenerateTask, TrainTask, check_inputs
from flaxgpt.planning.topology import topology_mesh
from flaxgpt.sharding import Mesh

_MOST_OPERATIONS = 10
_OTHER_MEMORY = re.compile(r"\bspace[ =](?!hbm)\w+|CompileTime(?!Hbm)\w*Oom", re.IGNORECASE)
_SIZE = r"([\d.]+)([KMGT]?)i?B?\b"


@dataclasses.dataclass(frozen=True)
class HbmUse:
    """Main memory of each chip, in bytes.

    Attributes:
        arguments: what the program takes: weights, optimizer state, batch.
        temporaries: the most that it allocates besides. If it does not fit, what the compiler's
            message says, which may be less than all, or None if it says nothing.
        limit: what a program can use.
        fits: whether the compiler could place everything.
    """

    arguments: int
    temporaries: int | None
    limit: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the TPU compiler says of a program, from `plan`. Times are estimated, not measured.

    Attributes:
        topology: the chips it was compiled for.
        mesh: pairs of an axis and its size.
        task: what was planned.
        compile_s: seconds that compiling took on this machine.
        hbm: main memory of each chip.
        step: estimated time of a step; None if the program does not fit.
        prefill: the same for what `generate` does once, before and after its loop; None for
            training.
        tokens_per_s: new ids per second without prefill, or ids trained on per second, on all
            chips; None if the program does not fit.
        mfu: share of the chips' peak operations per second that the model's products use.
        bandwidth_share: share of the time in which HBM is busy.
        collectives: what chips send each other in a step, those that receive most first.
        prefill_collectives: the same for what `prefill` counts.
        operations: all operations of a step, the longest first.
    """

    topology: str
    mesh: tuple[tuple[str, int], ...]
    task: GenerateTask | TrainTask
    compile_s: float
    hbm: HbmUse
    step: StepTime | None = None
    prefill: StepTime | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    bandwidth_share: float | None = None
    collectives: tuple[Collective, ...] = ()
    prefill_collectives: tuple[Collective, ...] = ()
    operations: tuple[Operation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the ten longest operations."""
        is_train = isinstance(self.task, TrainTask)
        values = dataclasses.asdict(self) | {
            "task": "train" if is_train else "generate",
            "operations": [dataclasses.asdict(one) for one in self.operations[:_MOST_OPERATIONS]],
            "mesh": dict(self.mesh),
            "settings": dataclasses.asdict(self.task),
        }
        if is_train:
            del values["prefill"], values["prefill_collectives"]
        return values


def plan(
    cfg: GPTConfig,
    task: GenerateTask | TrainTask,
    *,
    topology: str = "v5e:1x1",
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Compile a task for TPU chips that need not be there, and return what the compiler says.

    The program is the one that would run. Nothing is allocated or run, and `jax.devices()` stays
    what it is. Needs the extra `tpu-compiler`. Compiling 12 blocks takes from half a minute for
    generation to several minutes for a training step.

    Args:
        cfg: the architecture.
        task: a `GenerateTask` or a `TrainTask`.
        topology: the chips, such as "v5e:1x1", "v6e:2x4" or "v5p:2x2x1".
        mesh: sizes of the axes `data`, `fsdp` and `tensor`, such as `{"fsdp": 8}`; by default,
            `data` has all chips. Chips that the sizes leave out are not used.

    Returns:
        The plan. If the program does not fit into memory, `hbm.fits` is False and there are no
        times.

    Raises:
        ValueError: an argument is out of range, libtpu is not installed, or the mesh does not fit
            the topology.
    """
    check_inputs(cfg, task)
    chip = chip_of(topology)
    grid = topology_mesh(topology, mesh)
    task.check(cfg, grid)
    function, arguments = task.program(cfg, grid)
    lowered = function.lower(*arguments)
    start = time.perf_counter()
    try:
        with _without_cache():
            compiled = lowered.compile()
    except JaxRuntimeError as error:
        if not exceeds_hbm(str(error)):
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the TPU compiler cannot compile this program: {reason}") from error
        seconds = time.perf_counter() - start
        hbm = HbmUse(_size_of(arguments), read_temporaries(str(error)), chip.usable, False)
        return Plan(topology, _shape(grid), task, seconds, hbm)
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    used = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    hbm = HbmUse(*used, chip.usable, fits=True)
    program = parse(compiled.as_text() or "")
    once, body, aside = _parts(program, task)
    uncounted = aside | skipped_branches(program)
    timed = operations(program, body, chip, aside)
    sent = collectives_of(program, body, grid, uncounted)
    step = step_time(timed, chip, _received(sent))
    prefill: StepTime | None = None
    sent_once: tuple[Collective, ...] = ()
    if once is not None:
        sent_once = collectives_of(program, once, grid, uncounted)
        prefill = step_time(operations(program, once, chip, aside), chip, _received(sent_once))
    rate = task.tokens(cfg) / step.seconds
    return Plan(
        topology=topology,
        mesh=_shape(grid),
        task=task,
        compile_s=seconds,
        hbm=hbm,
        step=step,
        prefill=prefill,
        tokens_per_s=rate,
        mfu=task.flops(cfg) / step.seconds / (grid.size * chip.peak_flops),
        bandwidth_share=step.hbm_seconds / step.seconds,
        collectives=sent,
        prefill_collectives=sent_once,
        operations=timed,
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keep JAX from writing to its compilation cache: without a TPU, it cannot read that again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            yield
    finally:
        jax.config.update(name, before)


def _parts(
    program: Program, task: GenerateTask | TrainTask
) -> tuple[str | None, str, frozenset[str]]:
    """Return the computations that run once and in each step, and the loops to count apart."""
    if isinstance(task, TrainTask):
        return None, program.entry, frozenset()
    # Where prompts and new ids can outgrow the context, a second loop has the longer steps.
    found = loops(program)
    if not found:
        raise RuntimeError("the compiled program has no decoding loop")
    body = found[0].called("body")[0]
    return program.entry, body, frozenset(loop.name for loop in found)


def _received(found: tuple[Collective, ...]) -> int:
    return sum(one.received for one in found)


def _shape(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.shape.items())


def _size_of(arguments: Any) -> int:
    """Return the bytes of abstract arrays on each device, without padding."""
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def exceeds_hbm(message: str) -> bool:
    """Whether the compiler's message says that a program needs more HBM than a chip has.

    Where an operation needs more of another memory, such as the core's own, no batch may fit.

    >>> exceeds_hbm("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15.75G")
    True
    >>> exceeds_hbm("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M")
    False
    """
    return "RESOURCE_EXHAUSTED" in message and not _OTHER_MEMORY.search(message)


def read_temporaries(message: str) -> int | None:
    """Return the bytes of temporaries that a program needs, if the compiler's message says so.

    >>> read_temporaries("the total memory required for HLO temporaries (104.92G) exceeds ...")
    112656992174
    >>> read_temporaries("Total hbm usage >= 20.0G: reserved 258.00M, program 16.75G, arguments 3G")
    17985175552
    """
    for pattern in (r"HLO temporaries \(", r"\bprogram +", r"\bUsed +"):
        if found := re.search(pattern + _SIZE, message):
            return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return None
