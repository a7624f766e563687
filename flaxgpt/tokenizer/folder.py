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
from flaxgpt.tokenizer.protocol import Tokenizer, VocabularyTokenizer
from flaxgpt.tokenizer.reading import read_huggingface
from flaxgpt.tokenizer.settings import CONFIG, settings_of, sign_of_another

FILE_NAME = "flaxgpt_tokenizer.json"
_bpe_parts = operator.attrgetter("pattern", "ranks", "special_tokens")


class UnreadableTokenizerWarning(UserWarning):
    """A model was loaded without its tokenizer, which is missing or cannot be read."""


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
        settings = json.dumps(settings_of(tokenizer), indent=2) + "\n"
        write_file_atomically(folder / CONFIG, settings.encode())
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
        characters = {"kind": "characters", "characters": tokenizer.characters}
        return characters | _changed_stop_ids(tokenizer, ())
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"a tokenizer of type {type(tokenizer).__name__} cannot be stored; expected one that "
            "load_tokenizer returns, a BPETokenizer or a CharTokenizer"
        )
    pattern, ranks, special = parts = _bpe_parts(tokenizer)
    stop_ids = _changed_stop_ids(tokenizer, tokenizer.default_stop_ids)
    for name in TOKENIZER_NAMES:
        if parts == _bpe_parts(shipped_tokenizer(name)):
            return {"kind": name} | stop_ids
    ranks = {base64.b64encode(token).decode(): id for token, id in ranks.items()}
    vocabulary = {"pattern": pattern, "ranks": ranks, "special_tokens": special}
    return {"kind": "bpe"} | vocabulary | stop_ids


def _changed_stop_ids(tokenizer: Tokenizer, default: tuple[int, ...]) -> dict[str, Any]:
    return {} if tokenizer.stop_ids == default else {"stop_ids": list(tokenizer.stop_ids)}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of `tokenizer_recipe` without stop ids, on which no encoding depends."""
    recipe = {key: part for key, part in tokenizer_recipe(tokenizer).items() if key != "stop_ids"}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in a folder: `flaxgpt_tokenizer.json`, or else Hugging Face's files.

    Return None if the folder has none and is not known to need another than GPT-2's. Raise a
    ValueError that names the file if one is damaged or of a kind that cannot be read.
    """
    path = folder / FILE_NAME
    tokenizer = _read_recipe(path) if path.exists() else read_huggingface(folder)
    return tokenizer and with_model_stop_ids(tokenizer, folder)


def read_model_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Read the tokenizer of a model, or return GPT-2's if everything in the folder agrees with it.

    Return None if there is no tokenizer. Raise ValueError as `read_tokenizer` does, or if the model
    has GPT-2's vocabulary size but needs another tokenizer.
    """
    tokenizer, gpt2 = read_tokenizer(folder), shipped_tokenizer("gpt2")
    # nanoGPT stores no tokenizer, and pads GPT-2's vocabulary to a multiple of 64.
    is_padded = vocab_size == 50304 and "block_size" in read_object(folder / "config.json")
    if tokenizer is not None or not (vocab_size == gpt2.vocab_size or is_padded):
        return tokenizer
    if sign := sign_of_another(folder, gpt2):
        raise ValueError(
            f"{sign}, so the model's tokenizer is not GPT-2's, although its vocabulary size is; "
            f"add the tokenizer's files to {folder}"
        )
    return with_model_stop_ids(gpt2, folder)


def with_model_stop_ids(tokenizer: VocabularyTokenizer, folder: Path) -> VocabularyTokenizer:
    """Return a tokenizer with the `eos_token_id` of the model in a folder, if there is one.

    As in transformers, generation_config.json takes precedence over config.json. Ids that the
    tokenizer lacks are ignored: configurations for GPT-2 have 50256 by default, whatever the
    vocabulary.
    """
    for file in ("generation_config.json", "config.json"):
        value = read_object(folder / file).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(id) is int for id in ids):
            raise ValueError(
                f"{folder / file}: 'eos_token_id' is {value!r}; expected an id or a list of ids"
            )
        if known := [id for id in ids if tokenizer.has_token(id)]:
            return tokenizer.with_stop_ids(known)
    return tokenizer


def _read_recipe(path: Path) -> VocabularyTokenizer:
    recipe = read_object(path)

    def entry(key: str, kind: type) -> Any:
        if not isinstance(value := recipe.get(key), kind):
            raise ValueError(f"{key!r} is {str(value)[:60]!r}; expected {kind.__name__}")
        return value

    def tokenizer() -> VocabularyTokenizer:
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

    with value_errors(path):
        found = tokenizer()
        return found.with_stop_ids(entry("stop_ids", list)) if "stop_ids" in recipe else found
