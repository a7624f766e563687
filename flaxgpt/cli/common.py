"""Shared by the commands: loading a model, progress bars and output."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import rich.progress
from rich.console import Console
from rich.markup import escape

import flaxgpt
from flaxgpt._quantized import is_quantized
from flaxgpt.config import PRESETS, GPTConfig
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning
from flaxgpt.typing import Params, Progress
from flaxgpt.weights import read_config


def load_with_tokenizer(model: str, *, int8: bool = False) -> tuple[GPTConfig, Params, Tokenizer]:
    """Call `flaxgpt.load` with a progress bar, and raise ValueError if there is no tokenizer.

    With `int8`, weights that are not int8 yet are quantized.
    """
    with progress(f"loading {model}") as advance, warnings.catch_warnings():
        warnings.simplefilter("error", UnreadableTokenizerWarning)
        try:
            cfg, params, tokenizer = flaxgpt.load(model, progress=advance)
        except UnreadableTokenizerWarning as warning:
            raise ValueError(f"{model} has {warning}") from warning
    if tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer for its {cfg.vocab_size} tokens: add vocab.json and "
            "merges.txt, tokenizer.json or flaxgpt_tokenizer.json to its folder"
        )
    if int8 and not is_quantized(params):
        params = flaxgpt.quantize(params)
    return cfg, params, tokenizer


def read_architecture(model: str, n_layers: int | None, vocab_size: int | None) -> GPTConfig:
    """Return the configuration of a preset or model, with another size where one is given."""
    cfg = GPTConfig.preset(model) if model in PRESETS else read_config(model)
    return dataclasses.replace(
        cfg,
        n_layers=cfg.n_layers if n_layers is None else n_layers,
        vocab_size=cfg.vocab_size if vocab_size is None else vocab_size,
    )


@contextlib.contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Yield a progress callback that moves a bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with rich.progress.Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    """Write to standard output without buffering."""
    print(text, end="", flush=True)
