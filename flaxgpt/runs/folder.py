"""The folder of a run: its configuration and its lock.

RUN/config.json              the two configurations, and the hashes of the texts
RUN/flaxgpt_tokenizer.json   the tokenizer
RUN/data/*.npy, *.json       the tokenized texts
RUN/checkpoints/             see `flaxgpt.runs.checkpoints`
RUN/metrics.jsonl, loss.png, samples.txt    see `flaxgpt.runs.report`
RUN/model/                   the best model so far, as written by `flaxgpt.save`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flaxgpt._files import write_file_atomically
from flaxgpt.config import GPTConfig
from flaxgpt.data import BatchIterator
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params

_CONFIG = "config.json"
_HASHES = ("sha256", "validation_sha256")  # of the training text and of the validation text
Hashes = list[str | None]
Say = Callable[[str], None]  # shows a line of text


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to start or resume."""

    folder: Path
    cfg: GPTConfig
    train_cfg: TrainConfig  # `init_from` is what the run originally started from
    tokenizer: Tokenizer
    params: Params | None  # initial parameters; None initializes them randomly
    ids: np.ndarray  # uint16 or uint32 [n], the training text, memory-mapped
    batches: BatchIterator  # of the training text
    val_windows: np.ndarray | None  # int32 [windows, T + 1], or None without validation


def read_run(folder: Path) -> tuple[GPTConfig, TrainConfig]:
    """Return the architecture and the recipe of the run in a folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: its config.json is invalid.
    """
    cfg, train_cfg, _ = read_config(Path(folder))
    return cfg, train_cfg


def read_config(folder: Path) -> tuple[GPTConfig, TrainConfig, Hashes]:
    """Return the contents of config.json; raises as `read_run` does."""
    path = folder / _CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}: it is not the folder of a run")
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
        cfg, train_cfg = GPTConfig.from_dict(contents["model"]), contents["training"]
        hashes = [contents["data"][name] for name in _HASHES]
        return cfg, TrainConfig.from_dict(train_cfg), hashes
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error!r}") from error


def write_config(folder: Path, cfg: GPTConfig, train_cfg: TrainConfig, hashes: Hashes) -> None:
    """Write config.json."""
    data = dict(zip(_HASHES, hashes, strict=True))
    contents = {"model": cfg.to_dict(), "training": train_cfg.to_dict(), "data": data}
    write_file_atomically(folder / _CONFIG, (json.dumps(contents, indent=2) + "\n").encode())


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock a run's folder during a `with` block, so that no other process trains in it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {folder}: wait for it to finish, or stop it"
            ) from error
        except OSError:  # The file system has no locks; only this check is lost.
            pass
        yield
