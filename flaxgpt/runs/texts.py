"""The texts of a run: tokenized once into its folder, and read from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


class Hashes(NamedTuple):
    """SHA-256 of the training and of the validation text; None for a text that does not exist."""

    training: str | None
    validation: str | None


def hash_texts(text: TextScan | None, validation: TextScan | None) -> Hashes:
    """Return the hashes of the texts."""
    return Hashes(text.sha256 if text else None, validation.sha256 if validation else None)


def survey_files(paths: tuple[str, ...], train_cfg: TrainConfig) -> TextScan | None:
    """Return length, alphabet and hash of text files, or None if there are no files."""
    return scan_texts([Path(path) for path in paths], errors=train_cfg.errors) if paths else None


def tokenize_files(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: Path,
    tokenizer: Tokenizer,
    text: TextScan | None,
    validation: TextScan | None,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokenize the texts unless the run's folder already has their ids.

    Args:
        cfg: the architecture.
        train_cfg: the recipe.
        out: the run's folder.
        tokenizer: the tokenizer.
        text: the files of `train_cfg.data`, or None if they no longer exist.
        validation: the files of `train_cfg.validation_data`, or None if there are none.
        say: called with one-line messages about the progress.

    Returns:
        The training ids, uint16 or uint32 [n], and the validation windows, int32 [windows, T + 1],
        or None without validation.

    Raises:
        ValueError: the ids are of another text, or the text is too short.
        FileNotFoundError: neither the ids nor the text exist.
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
            raise FileNotFoundError(f"{path} is missing, and so is the text it is made from")
        say(f"tokenizing into {path}")
        progress = _say_every_ten_seconds(say, f"tokenizing into {path}")
        write_ids(path, source, tokenizer, start=start, stop=stop, progress=progress)
    ids = read_ids(out / _TRAIN).ids
    windows = count_windows(len(ids), cfg.context_length)
    if train_cfg.batch_size > windows:
        raise ValueError(
            f"batch_size={train_cfg.batch_size} exceeds the data: {len(ids)} ids are {windows} "
            f"windows of context_length={cfg.context_length}; give more text, or use a smaller "
            "batch"
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
            f"the validation text is too short: {error}; or set validation_data to another text, "
            "or turn validation off with val_fraction=0"
        ) from error
    return ids, val_windows


def _say_every_ten_seconds(say: Callable[[str], None], label: str) -> Progress:
    """Return a progress callback that reports the percentage at most once in ten seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{label}: {100 * done // max(1, total)} %")

    return report
