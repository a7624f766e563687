"""`flaxgpt train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flaxgpt.cli.common import say
from flaxgpt.cli.streams import hidden_output
from flaxgpt.config import GPTConfig
from flaxgpt.sharding import make_mesh, parse_mesh
from flaxgpt.training.config import TrainConfig
from flaxgpt.training.recipes import FINE_TUNING, RECIPES, recipe

RecipeName = Literal["shakespeare-char", "tales", "gpt2", "verdict"]
_DEFAULT_RECIPE: RecipeName = "shakespeare-char"


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train a model on text files, fine-tune a model, or resume an interrupted run.

    A new model has the vocabulary size of its tokenizer unless --vocab-size is given.

    Examples:
      flaxgpt train --data input.txt --out run
      flaxgpt train --recipe gpt2 --data a.txt b.txt --out run --batch-size 4 --accumulate 2
      flaxgpt train --init-from tales --data mine.txt --out tuned
      flaxgpt train --init-from run
      flaxgpt train --data input.txt --out run --mesh data=2,fsdp=4
      flaxgpt train --data input.txt --out run --distributed
    """

    recipe: RecipeName | None = None
    """Recipe that provides the defaults of all options below. If omitted: shakespeare-char, or with
    --init-from MODEL, the architecture of that model and settings for fine-tuning."""

    out: str = ""
    """Folder to create for the run; may be omitted to resume the run given as --init-from."""

    cfg: Annotated[GPTConfig, tyro.conf.arg(name="")] = RECIPES[_DEFAULT_RECIPE][0]
    train_cfg: Annotated[TrainConfig, tyro.conf.arg(name="")] = RECIPES[_DEFAULT_RECIPE][1]
    fit_vocabulary: tyro.conf.Suppress[bool] = False

    mesh: str = ""
    """Devices to train on, such as data=2,fsdp=4: data splits the batch, fsdp also the parameters,
    tensor heads and feed-forward units. If omitted: one device, or with --distributed, all of them,
    with data."""

    distributed: bool = False
    """Train in several processes, each of which runs this command. Under Slurm, Kubernetes and Open
    MPI and on TPU pods, they find each other; elsewhere, give the three options below too."""

    coordinator: str | None = None
    """Host and port of process 0, such as 10.0.0.1:1234."""

    process_id: int | None = None
    """Number of this process, from 0."""

    processes: int | None = None
    """Number of processes."""

    def run(self) -> None:
        """Train with progress on standard error, then print the folder of the model."""
        if not self.out:
            raise ValueError("--out is missing: give the folder to create for the run")
        # Imported here because orbax takes seconds to import and other commands do not need it.
        from flaxgpt.runs.loop import train
        from flaxgpt.runs.processes import is_first
        from flaxgpt.runs.start import tokenizer_of

        sizes: Any = parse_mesh(self.mesh) if self.mesh else None
        with hidden_output() if self.distributed else contextlib.nullcontext():
            self._connect()
            mesh = None if sizes is None else make_mesh(**sizes)
            cfg = self.cfg
            if self.fit_vocabulary:
                cfg = dataclasses.replace(cfg, vocab_size=tokenizer_of(self.train_cfg).vocab_size)
            model = str(train(cfg, self.train_cfg, self.out, mesh=mesh).model)
        if is_first():
            say(f"{model.encode(errors='backslashreplace').decode()}\n")  # it may not be UTF-8

    def _connect(self) -> None:
        """Connect with the other processes, if there are any."""
        others = (self.coordinator, self.process_id, self.processes)
        if self.distributed:
            from flaxgpt.runs.processes import connect

            connect(*others)
        elif any(value is not None for value in others):
            raise ValueError(
                "--coordinator, --process-id and --processes have no effect without --distributed: "
                "add it"
            )


def defaults(arguments: Sequence[str]) -> TrainCommand:
    """Return the command's default options, which depend on --recipe, --init-from and --out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("recipe", "out", "init-from", "vocab-size"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", default="")
    given, _ = parser.parse_known_args(arguments)
    cfg, train_cfg = recipe(given.recipe or _DEFAULT_RECIPE)
    source = given.init_from or "scratch"
    if source == "scratch":
        # Unless a vocabulary size is given, the model gets that of the tokenizer.
        return TrainCommand(given.recipe or None, given.out, cfg, train_cfg, not given.vocab_size)

    from flaxgpt.runs.folder import read_run
    from flaxgpt.runs.start import resumes
    from flaxgpt.weights import read_config
    from flaxgpt.weights.source import is_run

    folder, out = Path(os.path.expanduser(source)), given.out or source
    starting = dataclasses.replace(train_cfg, init_from=source)
    if is_run(folder) and resumes(starting, Path(os.path.expanduser(out))):
        cfg, train_cfg = read_run(folder)
        return TrainCommand(None, out, cfg, dataclasses.replace(train_cfg, init_from=source))
    if not given.recipe:
        starting = dataclasses.replace(FINE_TUNING, init_from=source)
    if source != "book" or not given.recipe:  # book weights exist for any architecture
        cfg, starting = read_config(source), dataclasses.replace(starting, tokenizer="")
    return TrainCommand(given.recipe or None, given.out, cfg, starting)
