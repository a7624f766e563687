"""Starting a new run: its checks, initial parameters and tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.data import TextScan
from flaxgpt.runs.folder import Run, RunConfig, is_run, write_config
from flaxgpt.runs.texts import survey_files, tokenize_files
from flaxgpt.tokenizer import TOKENIZER_NAMES, CharTokenizer, Tokenizer, load_tokenizer
from flaxgpt.tokenizer.folder import read_tokenizer, save_tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params
from flaxgpt.weights import book_params, load


def start_run(cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Callable[[str], None]) -> Run:
    """Check all inputs of a new run, then create its folder and tokenize its texts.

    If an input is invalid or unreadable, which raises ValueError or OSError, the folder is removed.
    """
    check_config(cfg)
    _check_new_folder(out)
    if not train_cfg.data:
        raise ValueError("data is empty: give at least one text file")
    texts = survey_files(train_cfg)
    params, tokenizer = initial_model(cfg, train_cfg, texts.training)
    check_prompt(train_cfg, tokenizer)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_config(out, RunConfig(cfg, train_cfg, texts.hashes))
        save_tokenizer(tokenizer, out)
        data = tokenize_files(cfg, train_cfg, out, tokenizer, texts, say)
    except BaseException:
        for entry in out.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not existed:
            out.rmdir()
        raise
    return Run(out, cfg, train_cfg, tokenizer, params, *data)


def initial_model(
    cfg: GPTConfig, train_cfg: TrainConfig, text: TextScan | None
) -> tuple[Params | None, Tokenizer]:
    """Return the initial parameters, None for random ones, and the tokenizer.

    Raises ValueError if the model that `init_from` names has no tokenizer, another architecture or
    too small a vocabulary.
    """
    params, tokenizer = load_source(cfg, train_cfg)
    if train_cfg.tokenizer or tokenizer is None:
        if params is not None and not train_cfg.tokenizer:
            raise ValueError(
                f"{train_cfg.init_from} has no tokenizer that flaxgpt can read: set --tokenizer to "
                f"the one it was trained with, which is one of {', '.join(TOKENIZER_NAMES)}, or "
                "the folder of a model that has it"
            )
        tokenizer = _make_tokenizer(train_cfg.tokenizer or "gpt2", text)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size="
            f"{cfg.vocab_size}: set vocab_size={tokenizer.vocab_size} or more"
        )
    return params, tokenizer


def load_source(cfg: GPTConfig, train_cfg: TrainConfig) -> tuple[Params | None, Tokenizer | None]:
    """Return parameters and tokenizer of the model that `init_from` names, if any."""
    if train_cfg.init_from == "scratch":
        return None, None
    if train_cfg.init_from == "book":
        return book_params(cfg), load_tokenizer("gpt2")
    source_cfg, params, tokenizer = load(train_cfg.init_from)
    names = [name for name in vars(cfg) if not name.startswith("drop_rate")]
    if faults := list_changes(source_cfg, cfg, names):
        raise ValueError(f"{train_cfg.init_from} has another architecture: {listed(faults)}")
    return params, tokenizer


def tokenizer_of(train_cfg: TrainConfig) -> Tokenizer:
    """Return the tokenizer of a new run that trains from scratch."""
    text = survey_files(train_cfg).training if train_cfg.tokenizer == "characters" else None
    return _make_tokenizer(train_cfg.tokenizer or "gpt2", text)


def check_prompt(train_cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError if samples are due and the tokenizer cannot encode their prompt."""
    if train_cfg.sample_every:
        try:
            tokenizer.encode(train_cfg.sample_prompt)
        except ValueError as error:
            raise ValueError(f"sample_prompt={train_cfg.sample_prompt!r}: {error}") from error


def list_changes(old: Any, new: Any, names: Iterable[str]) -> list[str]:
    """Return "name=new (was old)" for each attribute that differs."""
    return [
        f"{name}={getattr(new, name)!r} (was {getattr(old, name)!r})"
        for name in names
        if getattr(old, name) != getattr(new, name)
    ]


def _check_new_folder(out: Path) -> None:
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"{out.parent} is a file, so {out} cannot be a folder")
    if not out.exists():
        return
    # A killed process may have left temporary files.
    if not out.is_dir() or any(not entry.match(".*.tmp") for entry in out.iterdir()):
        advice = f"--init-from {out} resumes it" if is_run(out) else "choose a new folder"
        raise ValueError(f"{out} is in use, and nothing in it is overwritten: {advice}")


def _make_tokenizer(name: str, text: TextScan | None) -> Tokenizer:
    if name in TOKENIZER_NAMES:
        return load_tokenizer(name)
    if name == "characters":
        if text is None:
            raise ValueError("tokenizer='characters' needs text to take characters from: give data")
        return CharTokenizer(text.alphabet)
    tokenizer = read_tokenizer(Path(name).expanduser()) if Path(name).is_dir() else None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer={name!r} must be one of {', '.join(TOKENIZER_NAMES)}, characters, or a "
            "folder that holds a tokenizer"
        )
    return tokenizer
