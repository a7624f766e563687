"""Starting and resuming a run: its inputs are checked before any of its files is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from flaxgpt._checks import listed, value_errors
from flaxgpt._files import foreign_files, is_temporary
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.data import TextScan
from flaxgpt.runs.folder import Run, Say, lock_run, read_config, write_config
from flaxgpt.runs.processes import from_first, in_step, is_first
from flaxgpt.runs.texts import scan_files, tokenize_files
from flaxgpt.sharding import Mesh, ShardRules
from flaxgpt.tokenizer import TOKENIZER_NAMES, CharTokenizer, Tokenizer, load_tokenizer
from flaxgpt.tokenizer.folder import (
    FILE_NAME,
    UnreadableTokenizerWarning,
    read_tokenizer,
    save_tokenizer,
)
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params
from flaxgpt.weights import book_params, load
from flaxgpt.weights.saving import REPLACEABLE
from flaxgpt.weights.source import is_run

# Settings that cannot change when a run is resumed: the parameters, the optimizer state or the
# position in the data would no longer fit.
_FIXED = (
    "tokenizer",
    "text_field",
    "document_separator",
    "val_fraction",
    "batch_size",
    "windows",
    "seed",
    "optimizer",
)


def resumes(train_cfg: TrainConfig, out: Path) -> bool:
    """Return whether a recipe resumes the run in `out` instead of starting a new one."""
    source = Path(os.path.expanduser(train_cfg.init_from))
    return source.is_dir() and out.is_dir() and source.samefile(out) and is_run(out)


def settings_to_agree_on(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: Path,
    mesh: Mesh | None,
    rules: ShardRules | None,
) -> dict[str, Any]:
    """Return what must be equal in all processes."""
    sizes = None if mesh is None else dict(mesh.shape)
    return (
        cfg.to_dict()
        | train_cfg.to_dict()
        | {
            "out": str(out),
            "mesh": sizes,
            "rules": repr(rules),
        }
    )


def open_run(
    stack: contextlib.ExitStack,
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: Path,
    mesh: Mesh | None,
    say: Say,
) -> Run:
    """Start or resume the run: process 0 changes its folder, and the others wait."""

    def lead() -> Run | None:
        if not is_first():
            return None
        if resumes(train_cfg, out):
            stack.enter_context(lock_run(out))  # before any of its files is changed
            return resume_run(cfg, train_cfg, out, say, mesh)
        run = start_run(cfg, train_cfg, out, say, mesh)
        stack.enter_context(lock_run(out))
        return run

    is_new, existed = from_first(str(not resumes(train_cfg, out))) == "True", out.exists()
    run = in_step(lead)
    if jax.process_count() == 1:
        assert run is not None
        return run
    try:
        run = in_step(lambda: join_run(cfg, train_cfg, out, say, mesh) if run is None else run)
        if is_new:
            from flaxgpt.runs.checkpoints import check_folder

            check_folder(out)
        return run
    except (OSError, ValueError):
        if is_new and is_first():
            remove_inputs(out, existed)
        raise


def start_run(
    cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Say, mesh: Mesh | None = None
) -> Run:
    """Check all inputs of a new run, then create its folder and tokenize its texts.

    If an input is invalid or unreadable, which raises ValueError or OSError, the folder is removed.
    """
    check_config(cfg)
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"{out.parent} is a file, so {out} cannot be a folder")
    existed = out.exists()
    # A killed process may have left temporary files.
    if existed and not (out.is_dir() and all(map(is_temporary, out.iterdir()))):
        advice = f"--init-from {out} resumes it" if is_run(out) else "choose a new folder"
        raise ValueError(f"{out} is in use, and nothing in it is overwritten: {advice}")
    if not train_cfg.data:
        raise ValueError("data is empty: give at least one text file")
    _check_outside(out, (*train_cfg.data, *train_cfg.validation_data))
    texts = scan_files(train_cfg)
    params, tokenizer = _initial_model(cfg, train_cfg, texts.training, mesh)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if jax.process_count() == 1:
            # Imported here because orbax takes as long as loading a small model.
            from flaxgpt.runs.checkpoints import check_folder

            check_folder(out)
        write_config(out, cfg, train_cfg, texts.hashes)
        save_tokenizer(tokenizer, out)
        data = tokenize_files(cfg, train_cfg, out, tokenizer, texts, say, mesh)
    except BaseException:
        remove_inputs(out, existed)
        raise
    return Run(out, cfg, train_cfg, tokenizer, params, *data)


def join_run(cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Say, mesh: Mesh | None) -> Run:
    """Return the run that another process has started or resumed; no file is changed.

    Raises ValueError if this process has other texts, OSError if it does not see the folder.
    """
    try:
        _, old, hashes = read_config(out)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{out} is not there, but process 0 has it: use a folder that all processes share"
        ) from error
    texts = scan_files(train_cfg, old)
    if any(now not in (None, was) for was, now in zip(hashes, texts.hashes, strict=True)):
        raise ValueError(
            f"the text {listed(train_cfg.data)} is not the one that process 0 has: give all "
            "processes the same files"
        )
    tokenizer, params = read_tokenizer(out), None
    assert tokenizer is not None
    train_cfg = dataclasses.replace(train_cfg, init_from=old.init_from)
    if not has_checkpoints(out):
        params, _ = _load_source(cfg, train_cfg, mesh)
    data = tokenize_files(cfg, train_cfg, out, tokenizer, texts, say, mesh)
    return Run(out, cfg, train_cfg, tokenizer, params, *data)


def has_checkpoints(out: Path) -> bool:
    """Return whether the folder of a run has checkpoints."""
    return any(path.name.isdecimal() for path in (out / "checkpoints").glob("*"))


def resume_run(
    cfg: GPTConfig, train_cfg: TrainConfig, out: Path, say: Say, mesh: Mesh | None = None
) -> Run:
    """Check the inputs of a run against the folder it left, and update the folder.

    Raises ValueError or OSError if a setting or text has changed that cannot, or a file is invalid.
    """
    check_config(cfg)
    old_cfg, old, hashes = read_config(out)
    _remove_temporary(out, say)  # of a killed process
    _remove_temporary(out / "data", say)
    if faults := _changes(old_cfg, cfg, vars(cfg)) + _changes(old, train_cfg, _FIXED):
        raise ValueError(
            f"the run in {out} cannot resume with {listed(faults)}: use the old values, or start "
            "a new run in another folder"
        )
    texts = scan_files(train_cfg, old)
    if texts.training is None:
        say(f"{listed(train_cfg.data)} no longer exists: using its ids in {out / 'data'}")
    for was, now in zip(hashes, texts.hashes, strict=True):
        if now not in (None, was):
            raise ValueError(
                f"the text has changed since the run in {out} started: its SHA-256 was "
                f"{str(was)[:12]}... and is now {now[:12]}... Restore the old text, or start a new "
                "run in another folder"
            )
    train_cfg = dataclasses.replace(train_cfg, init_from=old.init_from)
    tokenizer, params = read_tokenizer(out), None
    if tokenizer is None:  # killed before it was saved
        params, tokenizer = _initial_model(cfg, train_cfg, texts.training, mesh)
        save_tokenizer(tokenizer, out)
    elif not has_checkpoints(out):
        params, _ = _load_source(cfg, train_cfg, mesh)
    _check_prompt(train_cfg, tokenizer)
    if train_cfg != old:
        write_config(out, cfg, train_cfg, hashes)
    data = tokenize_files(cfg, train_cfg, out, tokenizer, texts, say, mesh)
    return Run(out, cfg, train_cfg, tokenizer, params, *data)


def _check_outside(out: Path, paths: Iterable[str]) -> None:
    for folder in (Path(os.path.expanduser(path)) for path in paths):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{out} is in the data folder {folder}, and its files would be read as text when "
                "the run resumes: choose a folder outside"
            )


def remove_inputs(out: Path, existed: bool) -> None:
    """Remove what `start_run` has written, and no other files."""
    for name in ("config.json", FILE_NAME, "tokenizer.json", ".lock"):
        (out / name).unlink(missing_ok=True)
    for name in ("train.npy", "train.json", "val.npy", "val.json"):
        (out / "data" / name).unlink(missing_ok=True)
    for folder in [out / "data", out][: 1 if existed else 2]:
        with contextlib.suppress(OSError):  # it holds other files, or does not exist
            folder.rmdir()


def _remove_temporary(folder: Path, say: Say) -> None:
    """Remove temporary files, but none that was added to the model while it was replaced."""
    for path in filter(is_temporary, folder.iterdir() if folder.is_dir() else ()):
        if not path.is_dir():
            path.unlink()
        elif path.match(".model.*") and (others := foreign_files(path, REPLACEABLE)):
            say(f"{path}, of a killed process, also holds {listed(others)}: left in place")
        else:
            shutil.rmtree(path)


def tokenizer_of(train_cfg: TrainConfig) -> Tokenizer:
    """Return the tokenizer of a new run that trains from scratch."""
    text = scan_files(train_cfg).training if train_cfg.tokenizer == "characters" else None
    return _make_tokenizer(train_cfg.tokenizer or "gpt2", text)


def _initial_model(
    cfg: GPTConfig, train_cfg: TrainConfig, text: TextScan | None, mesh: Mesh | None
) -> tuple[Params | None, Tokenizer]:
    """Return the initial parameters, None for random ones, and the tokenizer."""
    params, tokenizer = _load_source(cfg, train_cfg, mesh)
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
    _check_prompt(train_cfg, tokenizer)
    return params, tokenizer


def _load_source(
    cfg: GPTConfig, train_cfg: TrainConfig, mesh: Mesh | None
) -> tuple[Params | None, Tokenizer | None]:
    """Return parameters and tokenizer of the model that `init_from` names, if any.

    For a mesh, the parameters are in host memory, as they may be too large for one device.
    """
    if train_cfg.init_from == "scratch":
        return None, None
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS excludes the host
                stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        if train_cfg.init_from == "book":
            return book_params(cfg), load_tokenizer("gpt2")
        stack.enter_context(warnings.catch_warnings())
        if train_cfg.tokenizer:  # the model's own is not used
            warnings.simplefilter("ignore", UnreadableTokenizerWarning)
        source_cfg, params, tokenizer = load(train_cfg.init_from)
    names = [name for name in vars(cfg) if not name.startswith("drop_rate")]
    if faults := _changes(source_cfg, cfg, names):
        raise ValueError(f"{train_cfg.init_from} has another architecture: {listed(faults)}")
    return params, tokenizer


def _make_tokenizer(name: str, text: TextScan | None) -> Tokenizer:
    if name in TOKENIZER_NAMES:
        return load_tokenizer(name)
    if name == "characters":
        if text is None:
            raise ValueError("tokenizer='characters' needs text to take characters from: give data")
        return CharTokenizer(text.alphabet)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() and (tokenizer := read_tokenizer(folder)):
        return tokenizer
    raise ValueError(
        f"tokenizer={name!r} must be one of {', '.join(TOKENIZER_NAMES)}, characters, or a folder "
        "that holds a tokenizer"
    )


def _check_prompt(train_cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    if train_cfg.sample_every:
        with value_errors(f"sample_prompt={train_cfg.sample_prompt!r}"):
            tokenizer.encode(train_cfg.sample_prompt)


def _changes(old: Any, new: Any, names: Iterable[str]) -> list[str]:
    """Return "name=new (was old)" for each attribute that differs."""
    return [
        f"{name}={getattr(new, name)!r} (was {getattr(old, name)!r})"
        for name in names
        if getattr(old, name) != getattr(new, name)
    ]
