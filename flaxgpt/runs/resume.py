"""Resuming a run: what may have changed since it started, and what may not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.runs.folder import Run, RunConfig, is_run, read_config, write_config
from flaxgpt.runs.start import check_prompt, initial_model, list_changes, load_source
from flaxgpt.runs.texts import survey_files, tokenize_files
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

    Raises ValueError or OSError if a setting or text has changed that cannot, or a file is invalid.
    """
    check_config(cfg)
    old = read_config(out)
    for path in (*out.glob(".*.tmp"), *(out / "data").glob(".*.tmp")):  # of a killed process
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    faults = list_changes(old.cfg, cfg, vars(cfg)) + list_changes(old.train_cfg, train_cfg, _FIXED)
    if faults:
        raise ValueError(
            f"the run in {out} cannot resume with {listed(faults)}: use the old values, or start "
            "a new run in another folder"
        )
    texts = survey_files(train_cfg, old.train_cfg)
    if texts.training is None:
        say(f"{listed(train_cfg.data)} no longer exists: using its ids in {out / 'data'}")
    for was, now in zip(old.hashes, texts.hashes, strict=True):
        if now not in (None, was):
            raise ValueError(
                f"the text has changed since the run in {out} started: its SHA-256 was "
                f"{str(was)[:12]}... and is now {now[:12]}... Restore the old text, or start a new "
                "run in another folder"
            )
    train_cfg = dataclasses.replace(train_cfg, init_from=old.train_cfg.init_from)
    tokenizer, params = read_tokenizer(out), None
    if tokenizer is None:  # killed before it was saved
        params, tokenizer = initial_model(cfg, train_cfg, texts.training)
        save_tokenizer(tokenizer, out)
    elif not any(path.name.isdecimal() for path in (out / "checkpoints").glob("*")):
        params, _ = load_source(cfg, train_cfg)
    check_prompt(train_cfg, tokenizer)
    if train_cfg != old.train_cfg:
        write_config(out, RunConfig(cfg, train_cfg, old.hashes))
    data = tokenize_files(cfg, train_cfg, out, tokenizer, texts, say)
    return Run(out, cfg, train_cfg, tokenizer, params, *data)
