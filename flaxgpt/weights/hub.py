"""Model folders from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from pathlib import Path

# A snapshot has many copies of the same weights: pickles, ONNX, other frameworks'. `model.*` and
# `model-*` leave out variants such as model.fp16.safetensors, which nothing here would read.
_WANTED = ("model.safetensors", "model-*.safetensors", "*.json", "merges.txt")
_NESTED = "*/*"


def fetch(model_id: str) -> Path:
    """Returns the local folder of a model on the hub, downloading what the cache lacks.

    Args:
        model_id: such as `gpt2` or `openai-community/gpt2-medium`.

    Raises:
        FileNotFoundError: the hub has no such model.
        PermissionError: its owner gives it out on request only.
        ConnectionError: the hub could not be asked, and the cache does not have the model.
        OSError: the cache cannot be written.
    """
    # Imported only here: it takes long, and everything else works without it.
    from huggingface_hub import constants, errors, snapshot_download

    absent = f"there is no file or folder {model_id!r} here, and"
    try:
        return Path(
            snapshot_download(model_id, allow_patterns=list(_WANTED), ignore_patterns=[_NESTED])
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{absent} {model_id!r} on the Hugging Face hub is gated: ask for access on its page, "
            "then log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{absent} the Hugging Face hub has no model of that name (or it is private): check "
            "the spelling, as in 'openai-community/gpt2', or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the client's own network errors have no common base
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk, a cache that may not be written
        response = getattr(error, "response", None)
        if response is not None:
            raise ConnectionError(
                f"{absent} the Hugging Face hub answered with {response.status_code}: "
                f"{str(error).strip().splitlines()[0]}; try again later, or give the path of a "
                "folder"
            ) from error
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError(
                f"{absent} the Hugging Face hub may not be asked, because HF_HUB_OFFLINE is set, "
                "nor is the whole model in its cache: unset HF_HUB_OFFLINE to download it, or give "
                "the path of a folder"
            ) from error
        raise ConnectionError(
            f"{absent} the Hugging Face hub could not be reached ({type(error).__name__}), nor is "
            "the whole model in its cache: check the network and try again, or give the path of a "
            "folder"
        ) from error
