"""The folder of a run's best model, which may also hold files of others."""

from __future__ import annotations

import os
from pathlib import Path

from flaxgpt._checks import listed
from flaxgpt._files import ForeignFilesError, sync, temporary_folder
from flaxgpt.config import GPTConfig
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.typing import Params
from flaxgpt.weights import save


def save_model(
    folder: Path, cfg: GPTConfig, params: Params, tokenizer: Tokenizer
) -> tuple[str, ...]:
    """Save a model, and return the names of other files in its folder, which are left in place.

    A folder without other files is replaced in one step, as by `flaxgpt.save`; otherwise each file
    is.

    Raises:
        ValueError, OSError: the model cannot be saved. All files of others are unchanged.
    """
    try:
        save(folder, cfg, params, tokenizer=tokenizer)
    except ForeignFilesError as error:
        with temporary_folder(folder.with_name("saving")) as new:
            save(new / "model", cfg, params, tokenizer=tokenizer)
            files = sorted((new / "model").iterdir())
            if blocked := [path.name for path in files if path.name in error.names]:
                raise OSError(
                    f"{listed(blocked)} in {folder} is a folder or a link: move it away"
                ) from error
            for path in files:
                os.replace(path, folder / path.name)
            sync(folder)
        return error.names
    return ()
