"""`flaxgpt train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flaxgpt.cli.common import say
from flaxgpt.config import GPTConfig
from flaxgpt.training.config import FINE_TUNING, PRESETS, TrainConfig, preset

Preset = Literal["shakespeare-char", "tales", "gpt2", "verdict"]
_DEFAULT_PRESET: Preset = "shakespeare-char"


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on text files, fine-tune one, or go on with a run that was interrupted.

    With --learning-rate the preset's --min-learning-rate moves in proportion, and with few --steps
    its --warmup-steps become a tenth of them, unless given too.

    Examples:
      flaxgpt train --data input.txt --out run
      flaxgpt train --preset gpt2 --data a.txt b.txt --out run --batch-size 4 --accumulate 2
      flaxgpt train --init-from tales --data mine.txt --out tuned
      flaxgpt train --init-from run
    """

    preset: Preset | None = None
    """A known recipe, of which everything below can be set otherwise: shakespeare-char if none is
    given, or with --init-from a model, that model's architecture and a recipe for fine-tuning."""

    out: str = ""
    """Folder of the run: new, or left out to go on with the run given as --init-from."""

    cfg: Annotated[GPTConfig, tyro.conf.arg(name="")] = PRESETS[_DEFAULT_PRESET][0]
    train_cfg: Annotated[TrainConfig, tyro.conf.arg(name="")] = PRESETS[_DEFAULT_PRESET][1]
    fits_vocabulary: tyro.conf.Suppress[bool] = False

    def run(self) -> None:
        """Trains, telling of it on standard error, and prints the model's folder."""
        if not self.out:
            raise ValueError("no --out: give the folder that the run is to make")
        # Only here: orbax takes seconds to import, and other commands do without.
        from flaxgpt.runs.loop import train
        from flaxgpt.runs.run import tokenizer_of

        cfg = self.cfg
        if self.fits_vocabulary:
            cfg = dataclasses.replace(cfg, vocab_size=tokenizer_of(self.train_cfg).vocab_size)
        say(f"{train(cfg, self.train_cfg, self.out).model}\n")


def defaults(arguments: Sequence[str]) -> Train:
    """Returns what the options are where they are not given, which the preset or a run decides.

    Raises:
        ValueError, OSError: an unknown preset, or a model to start from that cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    names = ("preset", "out", "init-from", "learning-rate", "steps", "vocab-size")
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", default="")
    given, _ = parser.parse_known_args(arguments)
    cfg, train_cfg = preset(given.preset or _DEFAULT_PRESET)
    source = given.init_from or "scratch"
    if source == "scratch":
        fits = not given.vocab_size
    else:
        from flaxgpt.runs.run import is_run, read_run, resumes
        from flaxgpt.weights import read_config

        fits = False
        folder = Path(source).expanduser()
        out = Path(given.out or source).expanduser()
        if is_run(folder) and resumes(dataclasses.replace(train_cfg, init_from=source), out):
            cfg, train_cfg = read_run(folder)
            train_cfg = dataclasses.replace(train_cfg, init_from=source)
            return Train(None, given.out or source, cfg, train_cfg, False)
        if not given.preset:
            train_cfg = FINE_TUNING
        if source != "book" or not given.preset:  # which has weights for whatever architecture
            cfg = read_config(source)
            train_cfg = dataclasses.replace(train_cfg, tokenizer="")
        train_cfg = dataclasses.replace(train_cfg, init_from=source)
    return Train(given.preset or None, given.out, cfg, _fitted(train_cfg, given), fits)


def _fitted(train_cfg: TrainConfig, given: argparse.Namespace) -> TrainConfig:
    """Returns the recipe with its lowest rate and its warm-up in proportion to what is given.

    Values that are no numbers are for tyro to refuse.
    """
    with contextlib.suppress(ValueError, TypeError):
        high = float(given.learning_rate)
        if 0 < high < float("inf"):
            low = train_cfg.min_learning_rate / train_cfg.learning_rate * high
            train_cfg = dataclasses.replace(train_cfg, learning_rate=high, min_learning_rate=low)
    with contextlib.suppress(ValueError, TypeError):
        steps = int(given.steps)
        if steps > 0:
            warmup = min(train_cfg.warmup_steps, steps // 10)
            train_cfg = dataclasses.replace(train_cfg, steps=steps, warmup_steps=warmup)
    return train_cfg
