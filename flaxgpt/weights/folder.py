"""Models in folders: `load` and `save`, in Hugging Face's layout and the book's."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.numpy import save_file

from flaxgpt._checks import check_params
from flaxgpt._files import replacing_folder
from flaxgpt.config import GPTConfig
from flaxgpt.model import param_shapes
from flaxgpt.tokenizer import Tokenizer, load_tokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning, read_tokenizer, save_tokenizer
from flaxgpt.typing import Params, Progress
from flaxgpt.weights.book_init import book_params
from flaxgpt.weights.hub import fetch
from flaxgpt.weights.reading import LAYOUTS, read_params, stored_bytes
from flaxgpt.weights.table import export
from flaxgpt.weights.tensors import INDEX, SINGLE, shards

__all__ = ["book_params", "load", "read_config", "read_stored_bytes", "save"]

_TALES = Path(__file__).resolve().parent.parent / "models" / "tales"  # made by scripts/build_tales
_GPT2_VOCABULARY = 50257
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_FILES = (".safetensors", *_PICKLES, ".json", ".npz", ".npy", ".h5", ".msgpack", ".gguf", ".onnx")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# What `save` and transformers' save_pretrained write, so all that `save` may replace.
_SAVED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "flaxgpt_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load(
    source: str | os.PathLike[str], *, progress: Progress | None = None
) -> tuple[GPTConfig, Params, Tokenizer | None]:
    """Reads a model: its configuration, parameters and tokenizer.

    Args:
        source: a folder in Hugging Face's layout or the book's, with a `config.json` and either one
            `model.safetensors` or several and their index; a `.safetensors` file beside a
            `config.json`; the folder of a training run, for its best model; else a model on the
            Hugging Face hub, such as `gpt2` or `openai-community/gpt2-medium`, which is downloaded
            unless its cache has it. `tales` is the small trained model inside the package, `book`
            the book's untrained 124M model (folders of these names are `./tales` and `./book`).
        progress: called with (parameters read, parameters in all) as they come.

    Returns:
        The configuration; the parameters, a nested dict of float32 arrays whatever the file has;
        and the tokenizer kept with the model, else GPT-2's if the vocabulary has its size, else
        None. A tokenizer that flaxgpt cannot read is a warning, and None.

    Raises:
        FileNotFoundError: there is no such folder, file or model.
        PermissionError: the model on the hub is gated.
        ConnectionError: the hub cannot be reached.
        ValueError: a file is damaged, of a kind that is not read, or does not fit the
            configuration.
    """
    if source == "book":
        cfg = GPTConfig.preset("book-124M")
        return cfg, book_params(cfg, progress=progress), load_tokenizer("gpt2")
    path = _locate(source)
    folder = path if path.is_dir() else path.parent
    paths = _weight_files(path)
    cfg = _read_config(folder)
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        # Many GPT-2 models have another kind of tokenizer; their weights are none the worse.
        warnings.warn(f"no tokenizer: {error}", UnreadableTokenizerWarning, stacklevel=2)
        return cfg, read_params(cfg, paths, progress), None
    if tokenizer is None and cfg.vocab_size == _GPT2_VOCABULARY:
        tokenizer = load_tokenizer("gpt2")
    return cfg, read_params(cfg, paths, progress), tokenizer


def save(
    folder: str | os.PathLike[str],
    cfg: GPTConfig,
    params: Params,
    *,
    layout: Literal["huggingface", "book"] = "huggingface",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a model into a folder, which after a crash at any moment is the old or the new one.

    Hugging Face's layout opens in transformers' `GPT2LMHeadModel`, the book's layout in its
    `GPTModel`; `load` reads both back to the bit.

    Args:
        folder: a new folder, or one that holds nothing but a saved model, which is replaced.
        cfg: the configuration.
        params: its parameters, of JAX or NumPy arrays. bfloat16 and float16 are written as they
            are, all else as float32.
        layout: `huggingface` or `book`.
        tokenizer: kept beside the weights if given.

    Raises:
        ValueError: params do not fit `cfg`, an unknown layout, or a folder that holds other things.
        OSError: it cannot be written; what was there is untouched.
    """
    by_name = {known.name: known for known in LAYOUTS}
    if layout not in by_name:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(map(repr, by_name))}")
    check_params(param_shapes(cfg), params)
    table = by_name[layout]
    with replacing_folder(Path(folder).expanduser(), _SAVED) as temporary:
        config = json.dumps(table.write_config(cfg), indent=2) + "\n"
        (temporary / "config.json").write_text(config, encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        try:
            save_file(export(table, cfg, params), temporary / SINGLE, table.metadata)
        except SafetensorError as error:
            raise OSError(f"the weights could not be written to {folder}: {error}") from error


def read_config(source: str | os.PathLike[str]) -> GPTConfig:
    """Returns the configuration of a model, without its weights.

    Args:
        source: as for `load`.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `load`.
    """
    if source == "book":
        return GPTConfig.preset("book-124M")
    path = _locate(source)
    return _read_config(path if path.is_dir() else path.parent)


def read_stored_bytes(source: str | os.PathLike[str]) -> dict[str, int]:
    """Returns what a model's numbers take in its files, in bytes by dtype, largest first.

    `load` gives float32 whatever they are there.

    Args:
        source: as for `load`; `book`, which is computed, has none.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `load`.
    """
    return {} if source == "book" else stored_bytes(_weight_files(_locate(source)))


def _locate(source: str | os.PathLike[str]) -> Path:
    """Returns the path that is meant, of a folder or a file that is there."""
    if source == "tales":
        return _TALES
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.exists():
        if not (path / "checkpoints").is_dir():
            return path
        if not (path / "model").is_dir():
            raise FileNotFoundError(f"the training run in {path} has saved no model yet")
        return path / "model"
    is_id = isinstance(source, str) and _HUB_ID.fullmatch(name) is not None
    if name.startswith("book-"):
        raise FileNotFoundError(
            f"there is no file or folder {name!r}: as a preset it has a shape and no weights; "
            "'book' has those of the book's untrained 124M model"
        )
    if is_id and path.suffix not in _FILES:
        return fetch(name)
    raise FileNotFoundError(
        f"there is no file or folder {name!r}: expected a model's folder, a .safetensors file, a "
        "model on the Hugging Face hub such as 'openai-community/gpt2', 'tales' or 'book'"
    )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise ValueError(_about_pickles(path))
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a .safetensors file: give one, or the folder of a model"
            )
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if (path / INDEX).exists():
        return shards(path / INDEX)
    others = sorted(entry for entry in path.iterdir() if entry.suffix == ".safetensors")
    if others:
        raise FileNotFoundError(
            f"{path} has no {SINGLE} but {', '.join(other.name for other in others[:8])}: give the "
            f"file that is meant, such as {str(others[0])!r}"
        )
    if pickles := sorted(entry for entry in path.iterdir() if entry.suffix in _PICKLES):
        raise ValueError(_about_pickles(pickles[0]))
    raise FileNotFoundError(
        f"{path} has no {SINGLE}, nor {INDEX}: expected a model's folder in Hugging Face's or the "
        "book's layout"
    )


def _about_pickles(path: Path) -> str:
    target = str(path.with_name(SINGLE))
    return (
        f"{path} is a pickle, which can run any code when it is opened, so flaxgpt does not. Where "
        "PyTorch is installed, turn it into safetensors:\n"
        f'    state = torch.load({str(path)!r}, map_location="cpu", weights_only=True)\n'
        # save_file refuses tensors that share memory, as tied ones do
        f"    safetensors.torch.save_file({{k: v.clone() for k, v in state.items()}}, {target!r})"
    )


def _read_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no config.json: expected Hugging Face's, or the book's dict of settings "
            "as GPTConfig.to_dict gives it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is broken JSON ({error}): copy or download it again") from error
    try:
        return GPTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
