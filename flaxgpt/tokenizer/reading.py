"""Hugging Face's tokenizer files, read as `HuggingFaceTokenizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flaxgpt._checks import value_errors
from flaxgpt.tokenizer.files import read_object
from flaxgpt.tokenizer.huggingface import HuggingFaceTokenizer, byte_letters
from flaxgpt.tokenizer.settings import (
    BERT_CLASSES,
    GPT2_CLASSES,
    Settings,
    apply_settings,
    read_settings,
)


def read_huggingface(folder: Path) -> HuggingFaceTokenizer | None:
    """Read `tokenizer.json`, GPT-2's `vocab.json` with `merges.txt`, or BERT's `vocab.txt`.

    The settings beside these files are applied; see `settings`. The end-of-text token that they
    name is the stop id.

    Return None if the folder has none and is not known to need another tokenizer than GPT-2's.
    Raise a ValueError that names the file if one is damaged, missing, or of another kind.
    """
    settings = read_settings(folder)
    tokenizer = _read(folder, settings)
    if tokenizer is None or (stops := settings.stop_ids(tokenizer)) is None:
        return tokenizer
    return tokenizer.with_stop_ids(stops)


def _read(folder: Path, settings: Settings) -> HuggingFaceTokenizer | None:
    path, words = folder / "tokenizer.json", folder / "vocab.txt"
    if path.exists():
        with value_errors(path):
            tokenizer = HuggingFaceTokenizer(path.read_text(encoding="utf-8-sig"))
        definition = json.loads(tokenizer.definition)
        changed = apply_settings(definition, settings)
        return tokenizer if changed == definition else HuggingFaceTokenizer(json.dumps(changed))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if settings.kind in (None, *GPT2_CLASSES):
        for present, absent in ((vocab, merges), (merges, vocab)):
            if present.exists() and not absent.exists():
                raise ValueError(f"{absent} is missing; {present.name} cannot be read without it")
        if vocab.exists():
            return _read_gpt2(vocab, merges, settings)
    if settings.kind in BERT_CLASSES and words.exists():
        return _read_bert(words, settings)
    advice = (
        "which cannot be read without a tokenizer.json; make one with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
    if settings.kind not in (None, "GPT2Tokenizer"):
        raise ValueError(f"{settings.kind_file}: the model needs a {settings.kind}, {advice}")
    for pattern in ("*.model", "*.tiktoken", "vocab.txt"):
        for other in sorted(folder.glob(pattern)):
            raise ValueError(f"{other}: this is another kind of tokenizer than GPT-2's, {advice}")
    return None


def _read_gpt2(vocab: Path, merges: Path, settings: Settings) -> HuggingFaceTokenizer:
    tokens = read_object(vocab)
    with value_errors(merges):
        lines = merges.read_text(encoding="utf-8-sig").split("\n")
    # Only the first line can be a comment: "# #" is a merge like any other.
    pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    byte_level = {"type": "ByteLevel", "trim_offsets": False, "use_regex": True}
    definition: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": pairs},
    }
    place = f"{vocab} with {merges.name}"
    with value_errors(place):
        for token, id in tokens.items():
            if type(id) is not int or id < 0:
                raise ValueError(f"token {token!r} has id {id!r}; expected a nonnegative integer")
        HuggingFaceTokenizer(json.dumps(definition))
    definition = apply_settings(definition, settings)
    with value_errors(place):
        # A token that no merge makes can only be a control token, such as <|endoftext|>. In other
        # kinds of BPE there are many more, among them some that are not ASCII.
        made = {"".join(pair) for pair in pairs} | byte_letters().keys()
        made |= {entry["content"] for entry in definition["added_tokens"]}
        plain = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
        for token, id in tokens.items():
            if token not in made and not token.isascii():
                raise ValueError(
                    f"token {token!r} (id {id}) is made by no merge and is not an added token; "
                    "expected GPT-2's kind of vocabulary, and merges for all of it"
                )
            if token not in made:
                entry = {"id": id, "content": token, "special": True} | plain
                definition["added_tokens"].append(entry)
        definition["added_tokens"].sort(key=lambda entry: entry["id"])
        return HuggingFaceTokenizer(json.dumps(definition))


def _read_bert(path: Path, settings: Settings) -> HuggingFaceTokenizer:
    with value_errors(path):
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer | {"strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": settings.token("unk_token"),
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: id for id, word in enumerate(lines)},
        },
    }
    with value_errors(path):
        HuggingFaceTokenizer(json.dumps(definition))
    return HuggingFaceTokenizer(json.dumps(apply_settings(definition, settings)))
