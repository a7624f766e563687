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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxgpt._files import write_file_atomically
from flaxgpt.config import GPTConfig
from flaxgpt.runs.texts import Hashes
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.training.config import TrainConfig
from flaxgpt.typing import Params

_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to start or resume.

    Attributes:
        folder: the run's folder.
        cfg: the architecture.
        train_cfg: the recipe; `init_from` is what the run originally started from.
        tokenizer: the tokenizer of the data and the model.
        params: initial parameters; None initializes them randomly.
        ids: uint16 or uint32 [n], the training text, memory-mapped.
        val_windows: int32 [windows, T + 1], the validation text, or None if there is none.
    """

    folder: Path
    cfg: GPTConfig
    train_cfg: TrainConfig
    tokenizer: Tokenizer
    params: Params | None
    ids: np.ndarray
    val_windows: np.ndarray | None


class RunConfig(NamedTuple):
    """The contents of config.json."""

    cfg: GPTConfig
    train_cfg: TrainConfig
    hashes: Hashes


def read_run(folder: Path) -> tuple[GPTConfig, TrainConfig]:
    """Return the architecture and the recipe of the run in a folder.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: its config.json is invalid.
    """
    config = read_config(Path(folder))
    return config.cfg, config.train_cfg


def read_config(folder: Path) -> RunConfig:
    """Read config.json; raises as `read_run` does."""
    path = folder / _CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}: it is not the folder of a run")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return RunConfig(
            GPTConfig.from_dict(contents["model"]),
            TrainConfig.from_dict(contents["training"]),
            Hashes(contents["data"]["sha256"], contents["data"]["validation_sha256"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error!r}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json."""
    contents = {
        "model": config.cfg.to_dict(),
        "training": config.train_cfg.to_dict(),
        "data": {
            "sha256": config.hashes.training,
            "validation_sha256": config.hashes.validation,
        },
    }
    write_file_atomically(folder / _CONFIG, (json.dumps(contents, indent=2) + "\n").encode())


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it has a config.json with a "training" section."""
    try:
        return "training" in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock a run's folder during a `with` block, so that no other process trains in it.

    Raises:
        ValueError: another process has locked the folder.
    """
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
