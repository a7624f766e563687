"""Resuming a run: what may have changed since it started, and what may not."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.data import TextScan
from flaxgpt.runs.folder import Run, RunConfig, is_run, read_config, write_config
from flaxgpt.runs.start import (
    check_prompt,
    field_names,
    initial_model,
    list_changes,
    load_source,
)
from flaxgpt.runs.texts import Hashes, hash_texts, survey_files, tokenize_files
from flaxgpt.tokenizer.folder import read_tokenizer, save_tokenizer
from flaxgpt.training.config import TrainConfig

# Settings that cannot change when a run is resumed: the parameters, the optimizer state or the
# position in the data would no longer fit.
_FIXED = ("tokenizer", "val_fraction", "batch_size", "windows", "seed", "optimizer")


def resumes(train_cfg: TrainConfig, out: Path) -> bool:
    """Return whether a recipe resumes the run in `out` instead of starting a new one."""
    source = Path(train_cfg.init_from).expanduser()
    return source.is_dir() and out.is_dir() and source.samefile(out) and is_run(out)


def resume_run(
    cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Callable[[str], None]
) -> Run:
    """Check the inputs of a run against the folder it left, and update the folder.

    Args:
        cfg: the architecture.
        train_cfg: the recipe, which may differ in settings such as `steps`.
        out: the run's folder.
        say: called with one-line messages about slow operations.

    Raises:
        ValueError, OSError: a setting or text has changed that cannot, or a file is invalid.
    """
    check_config(cfg)
    old = read_config(out)
    _remove_leftovers(out)
    _check_settings(old, cfg, train_cfg, out)
    text = _survey_if_present(train_cfg.data, old.train_cfg.data, train_cfg)
    validation = _survey_if_present(
        train_cfg.validation_data, old.train_cfg.validation_data, train_cfg
    )
    if text is None:
        say(f"{listed(train_cfg.data)} no longer exists: using its ids in {out / 'data'}")
    _check_texts(old.hashes, hash_texts(text, validation), out)
    train_cfg = dataclasses.replace(train_cfg, init_from=old.train_cfg.init_from)
    tokenizer, params = read_tokenizer(out), None
    if tokenizer is None:  # killed before it was saved
        params, tokenizer = initial_model(cfg, train_cfg, text)
        save_tokenizer(tokenizer, out)
    elif not any(path.name.isdecimal() for path in (out / "checkpoints").glob("*")):
        params, _ = load_source(cfg, train_cfg)
    check_prompt(train_cfg, tokenizer)
    if train_cfg != old.train_cfg:
        write_config(out, RunConfig(cfg, train_cfg, old.hashes))
    ids, val_windows = tokenize_files(cfg, train_cfg, out, tokenizer, text, validation, say)
    return Run(out, cfg, train_cfg, tokenizer, params, ids, val_windows)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (*out.glob(".*.tmp"), *(out / "data").glob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_settings(old: RunConfig, cfg: GPTConfig, train_cfg: TrainConfig, out: Path) -> None:
    faults = list_changes(old.cfg, cfg, field_names(cfg))
    faults += list_changes(old.train_cfg, train_cfg, _FIXED)
    if faults:
        raise ValueError(
            f"the run in {out} cannot resume with {listed(faults)}: use the old values, or start "
            "a new run in another folder"
        )


def _survey_if_present(
    paths: tuple[str, ...], old_paths: tuple[str, ...], train_cfg: TrainConfig
) -> TextScan | None:
    """Return what is known of text files, or None if the files of the run no longer exist."""
    if paths == old_paths and not all(map(os.path.exists, paths)):
        return None
    return survey_files(paths, train_cfg)


def _check_texts(old: Hashes, new: Hashes, out: Path) -> None:
    for was, now in zip(old, new, strict=True):
        if now not in (None, was):
            raise ValueError(
                f"the text has changed since the run in {out} started: its SHA-256 was "
                f"{str(was)[:12]}... and is now {now[:12]}... Restore the old text, or start a new "
                "run in another folder"
            )
