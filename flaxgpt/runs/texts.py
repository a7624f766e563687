"""The texts of a run: tokenized once into its folder, and read from there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxgpt import data
from flaxgpt._checks import value_errors
from flaxgpt.config import GPTConfig
from flaxgpt.runs.folder import Hashes, Say
from flaxgpt.sharding import Mesh, share_of_rows
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Progress


class Texts(NamedTuple):
    """The texts of a recipe; None for one that it does not name or that no longer exists."""

    training: data.TextScan | None
    validation: data.TextScan | None

    @property
    def hashes(self) -> Hashes:
        return [text.sha256 if text else None for text in self]


def scan_files(train_cfg: TrainConfig, old: TrainConfig | None = None) -> Texts:
    """Return length, alphabet and hash of the texts; files that `old` names may be missing."""

    def scan(name: str) -> data.TextScan | None:
        paths = getattr(train_cfg, name)
        exists = (os.path.exists(os.path.expanduser(path)) for path in paths)
        is_gone = paths == getattr(old, name, None) and not all(exists)
        if is_gone or not paths:
            return None
        return data.scan_texts(
            paths,
            errors=train_cfg.errors,
            text_field=train_cfg.text_field,
            document_separator=train_cfg.document_separator,
        )

    return Texts(scan("data"), scan("validation_data"))


def tokenize_files(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: Path,
    tokenizer: Tokenizer,
    texts: Texts,
    say: Say,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, data.BatchIterator, np.ndarray | None]:
    """Return the ids, batches and validation windows of a `Run`.

    The batches have the rows that this process's devices of the mesh need. Texts whose ids are not
    in the run's folder yet are tokenized first. Raises ValueError if a text is too short or its ids
    are of another text, FileNotFoundError if both are missing.
    """
    train_path, val_path = out / "data" / "train.npy", out / "data" / "val.npy"
    split = None
    if texts.training is not None and not train_cfg.validation_data:
        total = texts.training.n_characters
        split = int((1 - train_cfg.val_fraction) * total)
        if split == 0 or (split == total and train_cfg.val_fraction):
            raise ValueError(
                f"the text of {total} character{'s'[: total > 1]} is too short to hold out "
                f"val_fraction={train_cfg.val_fraction} of it for validation: provide more text, "
                "set validation_data, or turn validation off with val_fraction=0"
            )
    parts = [(train_path, texts.training, 0, split)]
    if train_cfg.validation_data or train_cfg.val_fraction:
        parts.append((val_path, texts.validation or texts.training, split or 0, None))
    sources = [source for path, source, *_ in parts if source and not path.exists()]
    for note in dict.fromkeys(note for source in sources for note in source.notes):
        say(note)
    for path, source, start, stop in parts:
        if not path.exists():
            if source is None:
                raise FileNotFoundError(f"{path} is missing, and so is the text it is made from")
            progress = _progress(say, f"tokenizing into {path}")
            data.write_ids(path, source, tokenizer, start=start, stop=stop, progress=progress)
        elif source is not None:
            data.check_same_source(data.read_ids(path), source)
    ids, length = data.read_ids(train_path).ids, cfg.context_length
    size, seed, shift = train_cfg.batch_size, train_cfg.seed, train_cfg.windows == "shifted"
    index, count = share_of_rows(mesh, size)
    batches = data.batches(
        ids,
        length=length,
        batch_size=size,
        seed=seed,
        shift=shift,
        process_index=index,
        process_count=count,
    )
    if not val_path.exists():
        return ids, batches, None
    val_ids, limit = data.read_ids(val_path).ids, train_cfg.eval_windows or None
    advice = "; or set validation_data to another text, or turn validation off with val_fraction=0"
    with value_errors("the validation text is too short", advice):
        return ids, batches, data.evaluation_windows(val_ids, length, limit)


def _progress(say: Say, label: str) -> Progress:
    """Say a label, and return a function that repeats it with the progress every ten seconds."""
    say(label)
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{label}: {100 * done // max(1, total)} %")

    return report
