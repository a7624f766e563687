"""Where a model is: from the name that a user gives to its files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from flaxgpt._checks import listed, value_errors
from flaxgpt.config import GPTConfig
from flaxgpt.weights.hub import fetch
from flaxgpt.weights.tensors import INDEX, SINGLE, shards

_TALES = Path(__file__).resolve().parent.parent / "models" / "tales"  # made by scripts/build_tales
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_FILES = (".safetensors", *_PICKLES, ".json", ".npz", ".npy", ".h5", ".msgpack", ".gguf", ".onnx")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the path of an existing file or folder, downloading a model on the hub."""
    if source == "tales":
        return _TALES
    name, path = os.fspath(source), Path(source).expanduser()
    if name and path.exists():
        if not (path / "checkpoints").is_dir():
            return path
        if not (path / "model").is_dir():
            raise FileNotFoundError(f"the training run in {path} has not saved a model yet")
        return path / "model"
    if name.startswith("book-"):
        raise FileNotFoundError(
            f"there is no file or folder {name!r}, and the preset of that name has no weights: use "
            "'book' for the book's untrained 124M model"
        )
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and path.suffix not in _FILES:
        return fetch(name)
    raise FileNotFoundError(
        f"there is no file or folder {name!r}: expected a model's folder, a .safetensors file, a "
        "model on the Hugging Face hub such as 'openai-community/gpt2', 'tales' or 'book'"
    )


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model, given its folder or file from `locate`."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if (path / INDEX).exists():
        return shards(path / INDEX)
    entries = [path] if path.is_file() else sorted(path.iterdir())
    if others := [entry for entry in entries if entry.suffix == ".safetensors"]:
        raise FileNotFoundError(
            f"{path} has no {SINGLE}, but it has {listed([other.name for other in others])}: "
            f"give the path of the file to read, such as {str(others[0])!r}"
        )
    for entry in entries:
        if entry.suffix in _PICKLES:
            raise ValueError(
                f"{entry} is a pickle, which can run arbitrary code when opened, so flaxgpt does "
                "not read it. Convert it to safetensors where PyTorch is installed:\n"
                f'    state = torch.load({str(entry)!r}, map_location="cpu", weights_only=True)\n'
                # save_file refuses tensors that share memory, as tied weights do.
                "    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "
                f"{str(entry.with_name(SINGLE))!r})"
            )
    if path.is_file():
        raise ValueError(f"{path} is not a .safetensors file: give one or a model's folder")
    raise FileNotFoundError(
        f"{path} has neither {SINGLE} nor {INDEX}: expected a model's folder in Hugging Face's or "
        "the book's layout"
    )


def read_config_file(path: Path) -> GPTConfig:
    """Return the configuration stored with a model, given its folder or file from `locate`."""
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no config.json: expected Hugging Face's, or the book's settings as "
            "written by GPTConfig.to_dict"
        ) from error
    except ValueError as error:
        message = f"{config} is not valid JSON ({error}): copy or download it again"
        raise ValueError(message) from error
    with value_errors(config):
        return GPTConfig.from_dict(values)
