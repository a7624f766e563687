"""A run's folder: made for a new run, found again to go on with, and all of it checked first.

RUN/config.json              the two configurations, and the hash of the text
RUN/flaxgpt_tokenizer.json   the tokenizer
RUN/data/*.npy, *.json       the text, tokenized
RUN/checkpoints/             see `flaxgpt.runs.checkpoints`
RUN/metrics.jsonl, loss.png, samples.txt    see `flaxgpt.runs.report`
RUN/model/                   the best model so far, as `flaxgpt.save` writes it
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxgpt._checks import listed
from flaxgpt._files import write_file_atomically
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.data import TextScan
from flaxgpt.runs.texts import surveyed, tokenized
from flaxgpt.tokenizer import TOKENIZER_NAMES, CharTokenizer, Tokenizer, load_tokenizer
from flaxgpt.tokenizer.folder import read_tokenizer, save_tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params
from flaxgpt.weights import book_params, load

_CONFIG = "config.json"

# What neither parameters, optimiser state nor the place in the data survive a change of.
_FIXED = ("tokenizer", "val_fraction", "batch_size", "windows", "seed", "optimizer")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to start or to go on.

    Attributes:
        folder: of the run.
        cfg: the architecture.
        train_cfg: the recipe; `init_from` is what the run once started from.
        tokenizer: of the data and the model.
        params: what it starts from; None draws them freshly.
        ids: uint16 or uint32 [n], of the training text, memory-mapped.
        val_windows: int32 [windows, T + 1] of the validation text, or None if there is none.
    """

    folder: Path
    cfg: GPTConfig
    train_cfg: TrainConfig
    tokenizer: Tokenizer
    params: Params | None
    ids: np.ndarray
    val_windows: np.ndarray | None


def read_run(folder: Path) -> tuple[GPTConfig, TrainConfig]:
    """Returns the two configurations that a run's folder was made with.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: its config.json is broken.
    """
    cfg, train_cfg, _ = _read(Path(folder))
    return cfg, train_cfg


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a config.json with a "training" part."""
    try:
        return "training" in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def resumes(train_cfg: TrainConfig, out: Path) -> bool:
    """Whether a recipe goes on with the run in `out` instead of starting one."""
    source = Path(train_cfg.init_from).expanduser()
    return source.is_dir() and out.is_dir() and source.samefile(out) and is_run(out)


@contextlib.contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Holds a run's folder while the block lasts, against a second process that would train in it.

    Raises:
        ValueError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {folder}: let it end first"
            ) from error
        except OSError:  # a file system without locks: all that is lost is this check
            pass
        yield


def prepare(cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Callable[[str], None]) -> Run:
    """Checks everything there is to check, and makes or reads the run's folder.

    Args:
        cfg: the architecture.
        train_cfg: the recipe.
        out: the run's folder: not there or empty, unless `train_cfg.init_from` is that very one.
        say: called with a line on what takes a while.

    Raises:
        ValueError, OSError: whatever is wrong, with what to do. Nothing is left of a new folder.
    """
    check_config(cfg)
    if resumes(train_cfg, out):
        return _resume(cfg, train_cfg, out, say)
    if not out.parent.is_dir() and out.parent.exists():
        raise ValueError(f"{out.parent} is a file, so {out} cannot be a folder")
    if out.exists() and (not out.is_dir() or any(map(_counts, out.iterdir()))):
        remedy = f"--init-from {out} goes on with it" if is_run(out) else "give a new folder"
        raise ValueError(f"{out} is in use, and nothing in it is overwritten: {remedy}")
    if not train_cfg.data:
        raise ValueError("data is empty: give at least one file of text")
    text = surveyed(train_cfg.data, train_cfg)
    validation = surveyed(train_cfg.validation_data, train_cfg)
    params, tokenizer = _beginning(cfg, train_cfg, text)
    _check_prompt(train_cfg, tokenizer)
    was_there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        _write(out, cfg, train_cfg, _hashes(text, validation))
        save_tokenizer(tokenizer, out)
        ids, val_windows = tokenized(cfg, train_cfg, out, tokenizer, text, validation, say)
        return Run(out, cfg, train_cfg, tokenizer, params, ids, val_windows)
    except BaseException:
        for entry in out.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not was_there:
            out.rmdir()
        raise


def _resume(asked_cfg: GPTConfig, asked: TrainConfig, out: Path, say: Callable[[str], None]) -> Run:
    cfg, was, hashes = _read(out)
    for leftover in (*out.glob(".*.tmp"), *(out / "data").glob(".*.tmp")):  # of a killed process
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    faults = _differences(cfg, asked_cfg, tuple(_names(cfg)))
    faults += _differences(was, asked, _FIXED)
    if faults:
        raise ValueError(
            f"the run in {out} cannot go on with {listed(faults)}: leave that as it was, or start "
            "a new run in another folder"
        )
    text, validation = (
        surveyed(paths, asked) if all(map(os.path.exists, paths)) or paths != before else None
        for paths, before in (
            (asked.data, was.data),
            (asked.validation_data, was.validation_data),
        )
    )
    if text is None:
        say(f"{listed(asked.data)} is no longer there; going on with the ids made of it")
    for now, then in zip(_hashes(text, validation), hashes, strict=True):
        if now not in (None, then):
            raise ValueError(
                f"the text has changed since the run in {out} began: its SHA-256 was "
                f"{str(then)[:12]}... and is {str(now)[:12]}... Put the old text back, or start a "
                "new run in another folder"
            )
    train_cfg = dataclasses.replace(asked, init_from=was.init_from)
    tokenizer, params = read_tokenizer(out), None
    if tokenizer is None:
        params, tokenizer = _beginning(cfg, train_cfg, text)
        save_tokenizer(tokenizer, out)
    elif not any(path.name.isdecimal() for path in (out / "checkpoints").glob("*")):
        params, _ = _source(cfg, train_cfg)
    _check_prompt(train_cfg, tokenizer)
    if train_cfg != was:
        _write(out, cfg, train_cfg, hashes)
    ids, val_windows = tokenized(cfg, train_cfg, out, tokenizer, text, validation, say)
    return Run(out, cfg, train_cfg, tokenizer, params, ids, val_windows)


def _beginning(
    cfg: GPTConfig, train_cfg: TrainConfig, text: TextScan | None
) -> tuple[Params | None, Tokenizer]:
    """Returns the parameters to start from, None for fresh ones, and the tokenizer."""
    params, tokenizer = _source(cfg, train_cfg)
    if train_cfg.tokenizer or tokenizer is None:
        if params is not None and not train_cfg.tokenizer:
            raise ValueError(
                f"{train_cfg.init_from} has no tokenizer that flaxgpt reads: name the one it was "
                f"trained with, as in --tokenizer gpt2, or one of {', '.join(TOKENIZER_NAMES)}, or "
                "the folder of a model that has it"
            )
        tokenizer = _tokenizer(train_cfg.tokenizer or "gpt2", text)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model vocab_size="
            f"{cfg.vocab_size}: set vocab_size={tokenizer.vocab_size} or more"
        )
    return params, tokenizer


def _source(cfg: GPTConfig, train_cfg: TrainConfig) -> tuple[Params | None, Tokenizer | None]:
    """Returns parameters and tokenizer of what a run starts from."""
    if train_cfg.init_from == "scratch":
        return None, None
    if train_cfg.init_from == "book":
        return book_params(cfg), load_tokenizer("gpt2")
    its_cfg, params, tokenizer = load(train_cfg.init_from)
    rates = ("drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
    sizes = tuple(name for name in _names(cfg) if name not in rates)
    if faults := _differences(its_cfg, cfg, sizes):
        raise ValueError(f"{train_cfg.init_from} has another architecture: {listed(faults)}")
    return params, tokenizer


def _check_prompt(train_cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    if train_cfg.sample_every:
        try:
            tokenizer.encode(train_cfg.sample_prompt)
        except ValueError as error:
            raise ValueError(f"sample_prompt={train_cfg.sample_prompt!r}: {error}") from error


def tokenizer_of(train_cfg: TrainConfig) -> Tokenizer:
    """Returns the tokenizer that a recipe's new run would have, unless it is another model's."""
    text = surveyed(train_cfg.data, train_cfg) if train_cfg.tokenizer == "characters" else None
    return _tokenizer(train_cfg.tokenizer or "gpt2", text)


def _tokenizer(name: str, text: TextScan | None) -> Tokenizer:
    if name in TOKENIZER_NAMES:
        return load_tokenizer(name)
    if name == "characters":
        if text is None:
            raise ValueError("there is no text to take characters from: give data")
        return CharTokenizer(text.alphabet)
    tokenizer = read_tokenizer(Path(name).expanduser()) if Path(name).is_dir() else None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer={name!r} must be one of {', '.join(TOKENIZER_NAMES)}, characters, or a "
            "folder that holds a tokenizer"
        )
    return tokenizer


def _hashes(text: TextScan | None, validation: TextScan | None) -> tuple[str | None, str | None]:
    return (text.sha256 if text else None, validation.sha256 if validation else None)


def _counts(entry: Path) -> bool:
    """Whether something in a folder is more than what a killed process left half written."""
    return not (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _differences(was: Any, now: Any, names: Sequence[str]) -> list[str]:
    return [
        f"{name}={getattr(now, name)!r} (was {getattr(was, name)!r})"
        for name in names
        if getattr(was, name) != getattr(now, name)
    ]


def _write(
    out: Path, cfg: GPTConfig, train_cfg: TrainConfig, hashes: tuple[str | None, str | None]
) -> None:
    contents = {
        "model": cfg.to_dict(),
        "training": train_cfg.to_dict(),
        "data": {"sha256": hashes[0], "validation_sha256": hashes[1]},
    }
    write_file_atomically(out / _CONFIG, (json.dumps(contents, indent=2) + "\n").encode())


def _read(folder: Path) -> tuple[GPTConfig, TrainConfig, tuple[str | None, str | None]]:
    path = folder / _CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}: it is not the folder of a run")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        hashes = contents["data"]["sha256"], contents["data"]["validation_sha256"]
        cfg = GPTConfig.from_dict(contents["model"])
        return cfg, TrainConfig.from_dict(contents["training"]), hashes
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not that of a run: {error!r}") from error
