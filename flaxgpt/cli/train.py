"""`flaxgpt train`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flaxgpt.cli.common import say
from flaxgpt.config import GPTConfig
from flaxgpt.training.config import PRESETS, TrainConfig, preset

Preset = Literal["shakespeare-char", "tales", "gpt2", "verdict"]
_DEFAULT_PRESET: Preset = "shakespeare-char"


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on text files, fine-tune one, or go on with a run that was interrupted.

    Examples:
      flaxgpt train --data input.txt --out run
      flaxgpt train --preset gpt2 --data a.txt b.txt --out run --batch-size 4 --accumulate 2
      flaxgpt train --init-from gpt2 --data mine.txt --out tuned --learning-rate 3e-5
      flaxgpt train --init-from run
    """

    preset: Preset = _DEFAULT_PRESET
    """A known recipe, of which everything below can be set otherwise."""

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
        from flaxgpt.training.loop import train
        from flaxgpt.training.run import tokenizer_of

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
    for name in ("preset", "out", "init-from"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", default="")
    given, _ = parser.parse_known_args(arguments)
    given.preset = given.preset or _DEFAULT_PRESET
    cfg, train_cfg = preset(given.preset)
    source = given.init_from or train_cfg.init_from
    fits = not any(re.match(r"--vocab[-_]size(=|$)", argument) for argument in arguments)
    if source not in ("scratch", "book"):
        from flaxgpt.training.run import is_run, read_run
        from flaxgpt.weights import read_config

        fits = False
        if is_run(Path(source)) and given.out in ("", source):
            cfg, train_cfg = read_run(Path(source))
            given.out = source
        else:
            cfg = read_config(source)
            train_cfg = dataclasses.replace(train_cfg, tokenizer="")
        train_cfg = dataclasses.replace(train_cfg, init_from=source)
    return Train(given.preset, given.out, cfg, train_cfg, fits)
