"""Where a model is: from the name that a user gives to its files."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path

from flaxgpt._checks import listed, value_errors
from flaxgpt.config import GPTConfig
from flaxgpt.weights.hub import fetch
from flaxgpt.weights.tensors import FLAX_SINGLE, INDEXES, SINGLE, shards

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
        if not is_run(path):
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


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: its config.json has a "training" section."""
    try:
        return "training" in json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, TypeError):
        return False


def weight_files(path: Path) -> list[Path]:
    """Return the files with the weights of a model, given its folder or file from `locate`."""
    folder = path if path.is_dir() else path.parent
    if (adapter := folder / "adapter_config.json").exists():
        has_weights = any((folder / name).exists() for name in (SINGLE, FLAX_SINGLE, *INDEXES))
        if path.name.startswith("adapter_model.") or not has_weights:
            raise _adapter_error(adapter)
        warnings.warn(f"the adapter beside the model, {adapter}, is not applied", stacklevel=2)
    if path.is_file() and path.suffix in (".safetensors", ".msgpack"):
        return [path]
    for index in INDEXES:
        single = path / index.removesuffix(".index.json")
        if single.exists():
            return [single]
        if (path / index).exists():
            return shards(path / index)
    entries = [path] if path.is_file() else sorted(path.iterdir())
    if others := [entry for entry in entries if entry.suffix in (".safetensors", ".msgpack")]:
        raise FileNotFoundError(
            f"{path} has no {SINGLE}, but it has {listed([other.name for other in others])}: "
            f"give the path of the file to read, such as {str(others[0])!r}"
        )
    for entry in entries:
        if entry.suffix in _PICKLES:
            raise _pickle_error(entry)
    if path.is_file():
        raise ValueError(f"{path} is not a .safetensors file: give one or a model's folder")
    inside = [entry.name for entry in entries if (entry / "config.json").exists()]
    hint = f", such as {listed(inside)} in it" if inside else ""
    raise FileNotFoundError(
        f"{path} has neither {SINGLE} nor {INDEXES[0]}: expected a model's folder in Hugging "
        f"Face's, nanoGPT's or the book's layout{hint}"
    )


def _adapter_error(path: Path) -> ValueError:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        kind, base = values.get("peft_type", "LORA"), values.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        kind, base = "LORA", None
    folder = str(path.parent)
    return ValueError(
        f"{folder} holds a {kind} adapter and not a model: it only changes the weights of its base "
        f"model, {base or 'which its adapter_config.json does not name'}. Merge the two where peft "
        "is installed:\n"
        f"    base = transformers.AutoModelForCausalLM.from_pretrained({base or '...'!r})\n"
        f"    merged = peft.PeftModel.from_pretrained(base, {folder!r}).merge_and_unload()\n"
        f"    merged.save_pretrained({folder + '-merged'!r})"
    )


def _pickle_error(path: Path) -> ValueError:
    output = f"{str(path.with_name(SINGLE))!r}"
    lines = [f'state = torch.load({str(path)!r}, map_location="cpu", weights_only=True)']
    if _is_nanogpt(path):
        config = str(path.with_name("config.json"))
        lines += [
            f'json.dump(state["model_args"], open({config!r}, "w"))',
            'state = state["model"]',
        ]
    # save_file refuses tensors that share memory, as tied weights do.
    copies = "{k: v.clone().contiguous() for k, v in state.items()}"
    lines += [f"safetensors.torch.save_file({copies}, {output})"]
    return ValueError(
        f"{path} is a pickle, which can run arbitrary code when opened, so flaxgpt does not read "
        "it. Convert it to safetensors where PyTorch is installed:\n    " + "\n    ".join(lines)
    )


def _is_nanogpt(path: Path) -> bool:
    """Return whether a checkpoint of PyTorch is one of nanoGPT's train.py, without loading it."""
    try:
        with zipfile.ZipFile(path) as file:
            (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
            return b"model_args" in file.read(name)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def read_config_file(path: Path) -> GPTConfig:
    """Return the configuration stored with a model, given its folder or file from `locate`."""
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no config.json: expected Hugging Face's, nanoGPT's model_args, or the "
            "book's settings as written by GPTConfig.to_dict"
        ) from error
    except ValueError as error:
        message = f"{config} is not valid JSON ({error}): copy or download it again"
        raise ValueError(message) from error
    with value_errors(config):
        return GPTConfig.from_dict(values)
