"""A run's texts: looked over, tokenized once into its folder, and read from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flaxgpt.config import GPTConfig
from flaxgpt.data import (
    TextScan,
    check_same_source,
    count_windows,
    evaluation_windows,
    read_ids,
    scan_texts,
    write_ids,
)
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Progress

_TRAIN, _VALIDATION = Path("data", "train.npy"), Path("data", "val.npy")


def surveyed(paths: tuple[str, ...], train_cfg: TrainConfig) -> TextScan | None:
    """Returns what is to be known of text files before they are tokenized; None of no files."""
    return scan_texts([Path(path) for path in paths], errors=train_cfg.errors) if paths else None


def tokenized(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: Path,
    tokenizer: Tokenizer,
    text: TextScan | None,
    validation: TextScan | None,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns training ids and validation windows, from files that are made where missing.

    Args:
        cfg: the architecture.
        train_cfg: the recipe.
        out: the run's folder.
        tokenizer: what makes ids of text.
        text: of `train_cfg.data`; None if it is gone, which is well if the ids are there.
        validation: of `train_cfg.validation_data`; None if that is empty.
        say: called with a line on what takes a while.

    Raises:
        ValueError: ids made of another text; or too little of it.
        FileNotFoundError: neither ids nor text are there.
    """
    split = None
    if text is not None and not train_cfg.validation_data:
        split = int((1 - train_cfg.val_fraction) * text.n_characters)
    parts = [(out / _TRAIN, text, 0, split)]
    if train_cfg.validation_data or train_cfg.val_fraction:
        parts.append((out / _VALIDATION, validation or text, split or 0, None))
    for path, source, start, stop in parts:
        if path.exists():
            if source is not None:
                check_same_source(read_ids(path), source)
            continue
        if source is None:
            raise FileNotFoundError(f"{path} is missing, and so is the text to make it from")
        say(f"tokenizing into {path}")
        told = _every_ten_seconds(say, f"tokenizing into {path}")
        write_ids(path, source, tokenizer, start=start, stop=stop, progress=told)
    ids = read_ids(out / _TRAIN).ids
    windows = count_windows(len(ids), cfg.context_length)
    if train_cfg.batch_size > windows:
        raise ValueError(
            f"batch_size={train_cfg.batch_size} exceeds the data: {len(ids)} ids are {windows} "
            f"windows of context_length={cfg.context_length}; give more text, or a smaller batch"
        )
    if not (out / _VALIDATION).exists():
        return ids, None
    val_ids = read_ids(out / _VALIDATION).ids
    try:
        val_windows = evaluation_windows(
            val_ids, cfg.context_length, train_cfg.eval_windows or None
        )
    except ValueError as error:
        raise ValueError(
            f"the validation text is too short: {error}; or give another with validation_data, or "
            "turn validation off with val_fraction=0"
        ) from error
    return ids, val_windows


def _every_ten_seconds(say: Callable[[str], None], label: str) -> Progress:
    """Returns a function of (done, total) that says how far it is when ten seconds have passed."""
    last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{label}: {100 * done // max(1, total)} %")

    return told
