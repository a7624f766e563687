"""Shared by the commands: loading a model, progress bars and output."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import rich.progress
from rich.console import Console
from rich.markup import escape

import flaxgpt
from flaxgpt.config import GPTConfig
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning
from flaxgpt.typing import Params, Progress


def load_with_tokenizer(model: str) -> tuple[GPTConfig, Params, Tokenizer]:
    """Call `flaxgpt.load` with a progress bar, and raise ValueError if there is no tokenizer."""
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
    return cfg, params, tokenizer


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
