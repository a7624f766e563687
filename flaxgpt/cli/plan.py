"""`flaxgpt plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Literal

import tyro

from flaxgpt.cli.common import progress, read_architecture, say
from flaxgpt.cli.plan_tables import print_plan
from flaxgpt.config import GPTConfig
from flaxgpt.planning import GenerateTask, Plan, TrainTask, largest_batch_plan, plan
from flaxgpt.planning.tasks import Dtype, Optimizer
from flaxgpt.sharding import parse_mesh

_FOR_GENERATE = ("prompt_length", "new_tokens", "int8")
_FOR_TRAIN = ("length", "remat", "accumulate", "optimizer", "drop_rate")


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Show what a program needs on TPU chips that need not be there: memory and estimated times.

    The real program is compiled by the TPU compiler, which runs on an ordinary Linux machine
    (pip install 'flaxgpt[tpu-compiler]'). Nothing is allocated and nothing runs, so all times are
    estimated.

    Compiling all 12 blocks of gpt2 takes half a minute for generate and several minutes for train.
    For train, --n-layers 2 shows the pattern sooner; for generate, it does not, because the weights
    of few blocks stay in the core's own memory and cause no HBM traffic.

    Examples:
      flaxgpt plan gpt2 --topology v5e:1x1 --task generate --batch 8 --dtype bfloat16
      flaxgpt plan gpt2 --topology v5e:1x1 --task train --batch 8 --length 1024 --dtype bfloat16
      flaxgpt plan gpt2-xl --topology v5e:2x4 --task train --mesh fsdp=8 --remat --largest-batch
    """

    model: tyro.conf.Positional[str]
    """A preset (gpt2, gpt2-xl, book-124M, ...), or a model as for generate; a hub id needs a slash,
    as in openai-community/gpt2."""

    topology: str = "v5e:1x1"
    """TPU chips, v5e, v6e, v5p or v4, and their arrangement, such as v5e:2x4 or v5p:2x2x1."""

    task: Literal["generate", "train"] = "generate"
    """A step of generate is one new id for each row, a step of train one optimizer step."""

    batch: int = 8
    """Rows, on all chips together; with --largest-batch, where the search begins."""

    prompt_length: int | None = None
    """Ids per prompt, 128 by default; for generate."""

    new_tokens: int | None = None
    """New ids per prompt, 128 by default; for generate."""

    length: int | None = None
    """Ids per sequence, the context length by default; for train."""

    dtype: Dtype = "float32"
    """Dtype to compute in; in training, weights and optimizer state are float32."""

    int8: bool = False
    """int8 weights, as of flaxgpt.quantize; for generate."""

    remat: bool = False
    """Recompute each block's activations in the backward pass; for train."""

    accumulate: int | None = None
    """Pieces into which a batch is split to save memory, 1 by default; for train."""

    optimizer: Optimizer | None = None
    """Optimizer, adamw by default; for train."""

    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as data=2,fsdp=4; by default, all chips are
    data. Chips beyond the product of the sizes are left out."""

    drop_rate: float | None = None
    """Dropout rate, 0 by default whatever the model's is; for train. With dropout, compiling takes
    several times as long."""

    n_layers: int | None = None
    """Number of blocks, instead of the model's."""

    vocab_size: int | None = None
    """Size of the vocabulary, instead of the model's."""

    largest_batch: bool = False
    """Search for the largest batch that fits, at most an eighth too small, by compiling several,
    each of which is reported on standard error."""

    json: bool = False
    """Print JSON with the keys model, config and those of `flaxgpt.planning.Plan.to_dict`; sizes
    are bytes on each chip."""

    def run(self) -> None:
        """Print to standard output."""
        task = self._task()
        mesh = None if self.mesh is None else parse_mesh(self.mesh)
        cfg = read_architecture(self.model, self.n_layers, self.vocab_size)
        with progress(f"compiling {cfg.n_layers} blocks for {self.topology}"):
            found = self._plan(cfg, task, mesh)
        if self.json:
            values = {"model": self.model, "config": cfg.to_dict()} | found.to_dict()
            say(json.dumps(values, indent=2, allow_nan=False) + "\n")
        else:
            print_plan(found, self.largest_batch)

    def _plan(
        self, cfg: GPTConfig, task: GenerateTask | TrainTask, mesh: dict[str, int] | None
    ) -> Plan:
        if not self.largest_batch:
            return plan(cfg, task, topology=self.topology, mesh=mesh)
        seconds: list[float] = []

        def report(tried: Plan) -> None:
            seconds.append(tried.compile_s)
            _note(_one_line(tried))

        found = largest_batch_plan(cfg, task, topology=self.topology, mesh=mesh, tried=report)
        several = "batches" if len(seconds) > 1 else "batch"
        _note(f"{len(seconds)} {several} compiled in {sum(seconds):.1f} s")
        return found

    def _task(self) -> GenerateTask | TrainTask:
        other = _FOR_TRAIN if self.task == "generate" else _FOR_GENERATE
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in other:
            if getattr(self, name) != defaults[name]:
                option = f"--{name.replace('_', '-')}"
                kind = "train" if self.task == "generate" else "generate"
                raise ValueError(f"{option} is for --task {kind}: leave it out, or change --task")
        if self.task == "generate":
            return GenerateTask(
                batch=self.batch,
                prompt_length=128 if self.prompt_length is None else self.prompt_length,
                new_tokens=128 if self.new_tokens is None else self.new_tokens,
                dtype=self.dtype,
                int8=self.int8,
            )
        return TrainTask(
            batch=self.batch,
            length=self.length,
            dtype=self.dtype,
            remat=self.remat,
            accumulate=1 if self.accumulate is None else self.accumulate,
            optimizer=self.optimizer or "adamw",
            drop_rate=0.0 if self.drop_rate is None else self.drop_rate,
        )


def _one_line(tried: Plan) -> str:
    """Return whether a batch fits, and how much memory it needs."""
    hbm = tried.hbm
    used = f"{(hbm.arguments + (hbm.temporaries or 0)) / 2**30:.1f}"
    if hbm.temporaries is None:
        used = "more"
    verdict = "fits" if hbm.fits else "does not fit"
    return f"batch {tried.task.batch:,}: {verdict}, {used} of {hbm.limit / 2**30:.2f} GiB"


def _note(line: str) -> None:
    """Write a line to standard error, above the progress bar."""
    print(line, file=sys.stderr, flush=True)
