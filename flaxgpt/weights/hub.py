"""Downloads from the Hugging Face hub, with its client and cache."""

from __future__ import annotations

import contextlib
from pathlib import Path

from flaxgpt.weights.tensors import FLAX_SINGLE, INDEXES, SINGLE, shards

# A repository often has several copies of the weights: pickles, ONNX, other frameworks' files and
# variants such as model.fp16.safetensors. flaxgpt reads none of these, except Flax's files if there
# are no safetensors.
_WANTED = ["model.safetensors", "model-*.safetensors", "*.json"]
_WANTED += ["merges.txt", "vocab.txt", "*.model", "*.tiktoken"]  # also to tell kinds of tokenizers
_FLAX = ["flax_model.msgpack", "flax_model-*.msgpack"]


def fetch(model_id: str) -> Path:
    """Return the local folder of a model on the hub, downloading the files that are not cached."""
    # Imported only here: the import is slow, and nothing else needs it.
    from huggingface_hub import constants, errors, snapshot_download

    absent = f"there is no file or folder {model_id!r} here, and"
    try:
        path = snapshot_download(model_id, allow_patterns=_WANTED, ignore_patterns=["*/*"])
        if not _is_complete(Path(path)):
            path = snapshot_download(model_id, allow_patterns=_FLAX, ignore_patterns=["*/*"])
        return Path(path)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{absent} {model_id!r} on the Hugging Face hub is gated: request access on its page, "
            "then log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{absent} the Hugging Face hub has no model of that name, or it is private: check "
            "the spelling, as in 'openai-community/gpt2', or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the client's network errors have no common base class
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the file system, such as a full disk
        # The client refuses a cache without any of the files in `_WANTED`, most of them optional.
        if (cached := _cached(model_id)) is not None:
            return cached
        reason = "the whole model is not in the Hugging Face hub's cache, and "
        if (response := getattr(error, "response", None)) is not None:
            answer = f"{response.status_code}: {str(error).strip().splitlines()[0]}"
            reason = f"the Hugging Face hub responded with {answer}; try again later"
        elif constants.HF_HUB_OFFLINE:
            reason += "HF_HUB_OFFLINE is set: unset it to download the model"
        else:
            reason += f"the hub could not be reached ({type(error).__name__}): check the network"
        raise ConnectionError(f"{absent} {reason}, or give the path of a folder") from error


def _cached(model_id: str) -> Path | None:
    """Return the cached folder of a model if it has the configuration and all weights."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{model_id.replace('/', '--')}").expanduser()
    if (reference := folder / "refs" / "main").is_file():
        snapshots = [folder / "snapshots" / reference.read_text(encoding="utf-8").strip()]
    else:
        snapshots = list(folder.glob("snapshots/*"))
    complete = [snapshot for snapshot in snapshots if _is_complete(snapshot)]
    return complete[0] if len(complete) == 1 else None  # several without a reference: which one?


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if any((folder / name).is_file() for name in (SINGLE, FLAX_SINGLE)):
        return True
    for index in INDEXES:
        with contextlib.suppress(OSError, ValueError):
            return bool(shards(folder / index))
    return False
