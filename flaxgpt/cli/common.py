"""What commands share: loading a model with a bar, and writing to standard output."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import flaxgpt
from flaxgpt.config import GPTConfig
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning
from flaxgpt.typing import Params
from flaxgpt.typing import Progress as ProgressCallback


def load_with_tokenizer(model: str) -> tuple[GPTConfig, Params, Tokenizer]:
    """Returns what `flaxgpt.load` does, with a bar; raises ValueError without a tokenizer."""
    with progress(f"loading {model}") as advance, warnings.catch_warnings():
        warnings.simplefilter("error", UnreadableTokenizerWarning)  # text needs a tokenizer
        try:
            cfg, params, tokenizer = flaxgpt.load(model, progress=advance)
        except UnreadableTokenizerWarning as warning:
            raise ValueError(f"{model} has {warning}") from warning
    if tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer for its {cfg.vocab_size} tokens: put vocab.json and "
            "merges.txt, tokenizer.json or flaxgpt_tokenizer.json in its folder"
        )
    return cfg, params, tokenizer


@contextlib.contextmanager
def progress(label: str) -> Iterator[ProgressCallback]:
    """Yields a function of (done, total) that moves a bar on standard error, if a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    """Writes to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
