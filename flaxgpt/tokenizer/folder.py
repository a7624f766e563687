"""Tokenizers in folders: flaxgpt's own file, and Hugging Face's files."""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import os
from pathlib import Path
from typing import Any

from flaxgpt._checks import unknown_name, value_errors
from flaxgpt._files import write_file_atomically
from flaxgpt.tokenizer.bpe import TOKENIZER_NAMES, BPETokenizer, shipped_tokenizer
from flaxgpt.tokenizer.characters import CharTokenizer
from flaxgpt.tokenizer.files import read_object
from flaxgpt.tokenizer.huggingface import HuggingFaceTokenizer
from flaxgpt.tokenizer.protocol import Tokenizer
from flaxgpt.tokenizer.reading import read_huggingface

FILE_NAME = "flaxgpt_tokenizer.json"
_bpe_parts = operator.attrgetter("pattern", "ranks", "special_tokens")


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
        if tokenizer := read_tokenizer(Path(source)):
            return tokenizer
        raise ValueError(
            f"{source} contains no tokenizer; expected {FILE_NAME}, tokenizer.json, vocab.json "
            "with merges.txt, or vocab.txt"
        )
    names = " or ".join(map(repr, TOKENIZER_NAMES))
    advice = f"expected {names}, or the path of a folder that contains a tokenizer"
    raise unknown_name("tokenizer", source, TOKENIZER_NAMES, advice)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder, created if necessary, unless `tokenizer_recipe` raises."""
    recipe = tokenizer_recipe(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_file_atomically(folder / "tokenizer.json", tokenizer.definition.encode())
        (folder / FILE_NAME).unlink(missing_ok=True)  # it would be read first
    else:
        write_file_atomically(folder / FILE_NAME, (json.dumps(recipe) + "\n").encode())


def tokenizer_recipe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a JSON object that defines a tokenizer: its "kind", and the vocabulary if not shipped.

    Raise ValueError for a type that flaxgpt cannot store.
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
    pattern, ranks, special = parts = _bpe_parts(tokenizer)
    for name in TOKENIZER_NAMES:
        if parts == _bpe_parts(shipped_tokenizer(name)):
            return {"kind": name}
    ranks = {base64.b64encode(token).decode(): id for token, id in ranks.items()}
    return {"kind": "bpe", "pattern": pattern, "ranks": ranks, "special_tokens": special}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of `tokenizer_recipe`, which is equal for equal tokenizers."""
    recipe = json.dumps(tokenizer_recipe(tokenizer), sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in a folder: `flaxgpt_tokenizer.json`, or else Hugging Face's files.

    Return None if the folder has none and is not known to need another than GPT-2's. Raise a
    ValueError that names the file if one is damaged or of a kind that cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return read_huggingface(folder)
    recipe = read_object(path)

    def entry(key: str, kind: type) -> Any:
        if not isinstance(value := recipe.get(key), kind):
            raise ValueError(f"{key!r} is {str(value)[:60]!r}; expected {kind.__name__}")
        return value

    with value_errors(path):
        kind = recipe.get("kind")
        if kind in TOKENIZER_NAMES:
            return shipped_tokenizer(kind)
        if kind == "characters":
            return CharTokenizer(entry("characters", str))
        if kind == "bpe":
            encoded = entry("ranks", dict).items()
            ranks = {base64.b64decode(token, validate=True): id for token, id in encoded}
            return BPETokenizer(entry("pattern", str), ranks, entry("special_tokens", dict))
        kinds = ", ".join(map(repr, (*TOKENIZER_NAMES, "characters", "bpe")))
        raise ValueError(f"kind is {kind!r}; expected one of {kinds}")
