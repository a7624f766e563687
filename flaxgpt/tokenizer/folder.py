"""Tokenizers in folders: flaxgpt's own file, and Hugging Face's files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flaxgpt._checks import unknown_name
from flaxgpt._files import write_file_atomically
from flaxgpt.tokenizer.bpe import BPETokenizer
from flaxgpt.tokenizer.characters import CharTokenizer
from flaxgpt.tokenizer.huggingface import HuggingFaceTokenizer, read_huggingface
from flaxgpt.tokenizer.json_files import read_object, value_errors_naming
from flaxgpt.tokenizer.protocol import Tokenizer
from flaxgpt.tokenizer.shipped import TOKENIZER_NAMES, shipped_tokenizer

FILE_NAME = "flaxgpt_tokenizer.json"


class UnreadableTokenizerWarning(UserWarning):
    """A model was loaded without its tokenizer, because flaxgpt cannot read it."""


def load_tokenizer(source: str | os.PathLike[str] = "gpt2") -> Tokenizer:
    """Load a tokenizer that ships with flaxgpt, or the one in a folder. Nothing is downloaded.

    Args:
        source: "gpt2", "tales", or the path of a folder (`./gpt2` for one of these names). A folder
            may contain `flaxgpt_tokenizer.json` or Hugging Face's files: `tokenizer.json`,
            `vocab.json` with `merges.txt`, or `vocab.txt`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is no such tokenizer, or its files cannot be read.
    """
    if isinstance(source, str) and source in TOKENIZER_NAMES:
        return shipped_tokenizer(source)
    if isinstance(source, (str, os.PathLike)) and source and os.path.isdir(source):
        tokenizer = read_tokenizer(Path(source))
        if tokenizer is None:
            raise ValueError(
                f"{source} contains no tokenizer; expected {FILE_NAME}, tokenizer.json, "
                "vocab.json with merges.txt, or vocab.txt"
            )
        return tokenizer
    names = " or ".join(map(repr, TOKENIZER_NAMES))
    advice = f"expected {names}, or the path of a folder that contains a tokenizer"
    raise unknown_name("tokenizer", source, TOKENIZER_NAMES, advice)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder, which is created if necessary.

    A tokenizer read from Hugging Face's files becomes `tokenizer.json`. Any other becomes
    `flaxgpt_tokenizer.json`, which contains the name of a tokenizer that ships with flaxgpt, or the
    whole vocabulary.

    Raises:
        ValueError: flaxgpt cannot store this type of tokenizer.
    """
    recipe = tokenizer_recipe(tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_file_atomically(folder / "tokenizer.json", tokenizer.definition.encode())
        (folder / FILE_NAME).unlink(missing_ok=True)  # it would be read first
    else:
        write_file_atomically(folder / FILE_NAME, (json.dumps(recipe) + "\n").encode())


def tokenizer_recipe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a JSON object that defines a tokenizer.

    Returns:
        An object whose "kind" is the name of a tokenizer that ships with flaxgpt, or "characters",
        "bpe" or "huggingface" beside the whole vocabulary.

    Raises:
        ValueError: flaxgpt cannot store this type of tokenizer.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {"kind": "huggingface", "tokenizer": json.loads(tokenizer.definition)}
    if isinstance(tokenizer, CharTokenizer):
        return {"kind": "characters", "characters": tokenizer.characters}
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"a tokenizer of type {type(tokenizer).__name__} cannot be stored; expected one that "
            "load_tokenizer returns, a BPETokenizer or a CharTokenizer"
        )
    recipe = _bpe_recipe(tokenizer)
    for name in TOKENIZER_NAMES:
        if recipe == _bpe_recipe(shipped_tokenizer(name)):
            return {"kind": name}
    return recipe


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of `tokenizer_recipe`, which is equal for equal tokenizers."""
    recipe = json.dumps(tokenizer_recipe(tokenizer), sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in a folder: `flaxgpt_tokenizer.json`, or else Hugging Face's files.

    Returns:
        The tokenizer, or None if the folder has none and is not known to need another than GPT-2's.

    Raises:
        ValueError: a file is damaged or of a kind that cannot be read; the message names it.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return read_huggingface(Path(folder))
    recipe = read_object(path)
    with value_errors_naming(path):
        kind = recipe.get("kind")
        if kind in TOKENIZER_NAMES:
            return shipped_tokenizer(kind)
        if kind == "characters":
            return CharTokenizer(_entry(recipe, "characters", str))
        if kind == "bpe":
            ranks = _entry(recipe, "ranks", dict)
            return BPETokenizer(
                _entry(recipe, "pattern", str),
                {base64.b64decode(token, validate=True): id for token, id in ranks.items()},
                _entry(recipe, "special_tokens", dict),
            )
        kinds = ", ".join(map(repr, (*TOKENIZER_NAMES, "characters", "bpe")))
        raise ValueError(f"kind is {kind!r}; expected one of {kinds}")


def _bpe_recipe(tokenizer: BPETokenizer) -> dict[str, Any]:
    return {
        "kind": "bpe",
        "pattern": tokenizer.pattern,
        "ranks": {base64.b64encode(token).decode(): id for token, id in tokenizer.ranks.items()},
        "special_tokens": tokenizer.special_tokens,
    }


def _entry(data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} is {str(value)[:60]!r}; expected {kind.__name__}")
    return value
