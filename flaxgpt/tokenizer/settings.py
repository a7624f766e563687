"""The settings that transformers keeps beside a vocabulary, and what they change in a tokenizer.

The rules are those of transformers 4 and 5 for `AutoTokenizer.from_pretrained(folder)`. Settings of
the tokens around a text, of padding, truncation and decoding have no effect on the ids of the text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flaxgpt.tokenizer.files import read_object
from flaxgpt.tokenizer.huggingface import HuggingFaceTokenizer, build
from flaxgpt.tokenizer.protocol import VocabularyTokenizer

CONFIG, TOKENS_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

# The classes of transformers that keep GPT-2's kind of tokenizer in vocab.json and merges.txt, and
# BERT's kind in vocab.txt. The generic ones add nothing to tokenizer.json.
GPT2_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer")
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMED = tuple(f"{name}_token" for name in _NAMES)
_STOPS = "stop_ids"  # flaxgpt's own setting
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_ROBERTA_TOKENS = {
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"},
    **{"pad_token": "<pad>", "cls_token": "<s>"},
    "mask_token": {"content": "<mask>", "lstrip": True, "normalized": False},
}
_BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls")}
_BERT_TOKENS |= {"mask_token": "[MASK]"}
_DEFAULT_TOKENS: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": _GPT2_TOKENS,
    "RobertaTokenizer": _ROBERTA_TOKENS,
    **dict.fromkeys(BERT_CLASSES, _BERT_TOKENS),
}

# Names under which other programs keep vocabularies, and that flaxgpt does not read.
_VOCABULARY_FILES = (
    *("*vocab*.json", "*vocab*.txt", "*vocab*.pkl", "*.vocab", "meta.pkl", "dict.txt", "*.codes"),
    *("*.model", "*.spm", "*spiece*", "*sentencepiece*", "*.tiktoken", "tekken.json"),
    *("*tokenizer*.pkl", "*tokenizer*.bin", "tokenizer.txt", "*merges*.txt"),
)

# Settings of BERT's classes, the fields of a BertNormalizer and their defaults in these classes.
_BERT_FIELDS = (
    ("do_lower_case", "lowercase", True),
    ("strip_accents", "strip_accents", None),
    ("tokenize_chinese_chars", "handle_chinese_chars", True),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings in a folder.

    Attributes:
        folder: the folder, for messages.
        kind: the tokenizer's class in transformers without "Fast", or None.
        kind_file: the file that names the class.
        values: the contents of tokenizer_config.json. As in transformers, special_tokens_map.json
            takes precedence unless tokenizer_config.json lists the added tokens.
        added: added tokens by id, in the form of tokenizer.json.
    """

    folder: Path
    kind: str | None
    kind_file: Path
    values: dict[str, Any]
    added: dict[int, dict[str, Any]]

    @property
    def named(self) -> dict[str, dict[str, Any]]:
        """The special tokens that settings or the class name, by content."""
        defaults = _DEFAULT_TOKENS.get(self.kind or "", {})
        return {
            token["content"]: token
            for _, token in _named(self.folder / CONFIG, defaults | self.values)
        }

    @property
    def explicit(self) -> set[str]:
        """The contents of the special tokens that the settings name."""
        return {token["content"] for _, token in _named(self.folder / CONFIG, self.values)}

    def token(self, name: str) -> str | None:
        """Return the content of a special token such as "eos_token"."""
        tokens = dict(self._tokens())
        return tokens[name]["content"] if name in tokens else None

    def _tokens(self) -> Iterator[tuple[str, dict[str, Any]]]:
        defaults = _DEFAULT_TOKENS.get(self.kind or "", {})
        return _named(self.folder / CONFIG, defaults | self.values)

    def stop_ids(self, tokenizer: HuggingFaceTokenizer) -> list[int] | None:
        """Return the ids that end a text, or None if the settings have none."""
        if (stops := self.values.get(_STOPS)) is not None:
            ids: list[Any] = stops if isinstance(stops, list) else [None]
            if not all(type(id) is int and tokenizer.has_token(id) for id in ids):
                place = f"{self.folder / CONFIG}: {_STOPS!r}"
                raise ValueError(f"{place} is {stops!r}; expected ids of the vocabulary")
            return ids
        token = self.token("eos_token")
        if token is None:
            others = dict(_named(self.folder / TOKENS_MAP, read_object(self.folder / TOKENS_MAP)))
            token = others["eos_token"]["content"] if "eos_token" in others else None
        return None if token is None or (id := tokenizer.token_id(token)) is None else [id]

    def flag(self, key: str, default: bool | None) -> bool | None:
        """Return a setting that is true, false or, if that is the default, null."""
        value = self.values.get(key, default)
        if value is not default and not isinstance(value, bool):
            raise ValueError(
                f"{self.folder / CONFIG}: {key!r} is {value!r}; expected true or false"
            )
        return value


def read_settings(folder: Path) -> Settings:
    """Read the settings in a folder, all of whose files may be missing.

    Raises:
        ValueError: a file is damaged, or a token has an unknown form; the message names the file.
    """
    source = folder / CONFIG
    values = read_object(source)
    kind = values.get("tokenizer_class")
    if kind is None and (config := folder / "config.json").exists():
        source, kind = config, read_object(config).get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{source}: 'tokenizer_class' is {kind!r}; expected a name")
    if (listed := values.get("added_tokens_decoder")) is not None:
        where = f"{folder / CONFIG}: 'added_tokens_decoder'"
        if not isinstance(listed, dict) or not all(map(str.isdecimal, listed)):
            raise ValueError(f"{where} must give a token for each id, got {str(listed)[:60]!r}")
        added = {int(id): _entry(where, entry) for id, entry in listed.items()}
    else:
        tokens_map = read_object(folder / TOKENS_MAP)
        list(_named(folder / TOKENS_MAP, tokens_map))  # check them under the name of their file
        values = values | tokens_map
        special = {token["content"] for _, token in _named(folder / CONFIG, values)}
        added = {}
        where = str(folder / ADDED)
        for token, id in read_object(folder / ADDED).items():
            if type(id) is not int or id < 0:
                expected = "expected a nonnegative integer"
                raise ValueError(f"{where}: token {token!r} has id {id!r}; {expected}")
            if id in added:
                both = f"{added[id]['content']!r} and {token!r}"
                raise ValueError(f"{where}: id {id} belongs to both {both}; expected one token")
            added[id] = _entry(where, {"content": token, "special": token in special})
    return Settings(folder, kind and kind.removesuffix("Fast"), source, values, added)


def settings_of(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """Return the tokenizer_config.json with which transformers reads the tokenizer.json alike."""
    words = json.loads(tokenizer.definition).get("pre_tokenizer") or {}
    # Some versions would otherwise replace it by false.
    space = {key: value for key, value in words.items() if key == "add_prefix_space"}
    stops = [name for name, id in tokenizer.special_tokens.items() if id in tokenizer.stop_ids[:1]]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **space,
        "clean_up_tokenization_spaces": False,
        "eos_token": stops[0] if stops else None,
        _STOPS: list(tokenizer.stop_ids),
    }


def sign_of_another(folder: Path, expected: VocabularyTokenizer) -> str | None:
    """Return what in a folder without a vocabulary names another tokenizer than the expected one.

    The folder names the special tokens, the settings or the files of the other tokenizer.
    """
    settings = read_settings(folder)
    tokens_map = read_object(folder / TOKENS_MAP)
    added = [token["content"] for token in settings.added.values()]
    named = _named(folder / TOKENS_MAP, tokens_map | settings.values)
    for token in (*added, *(token["content"] for _, token in named)):
        if token not in expected.special_tokens:
            return f"{folder} names the special token {token!r} in its settings"
    for key, _, _ in _BERT_FIELDS:
        if key in settings.values:
            return f"{folder / CONFIG} has the setting {key!r}"
    config = read_object(folder / "config.json")
    ids = [config.get(key) for key in ("bos_token_id", "eos_token_id")]
    if all(type(id) is int and id not in expected.stop_ids for id in ids):
        return f"{folder / 'config.json'} has bos_token_id {ids[0]} and eos_token_id {ids[1]}"
    for pattern in _VOCABULARY_FILES:
        for path in sorted(folder.glob(pattern)):
            return f"{path} is a file of a tokenizer"
    return None


def apply_settings(definition: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the contents of a tokenizer.json with the effect of the settings beside it.

    Raises:
        ValueError: transformers would not give the ids that a setting asks for, or its versions
            differ; the message names the file and the key.
    """
    return _add_tokens(_set_case(_set_prefix_space(definition, settings), settings), settings)


def _set_prefix_space(definition: dict[str, Any], settings: Settings) -> dict[str, Any]:
    wanted = settings.flag("add_prefix_space", False if settings.kind in GPT2_CLASSES else None)
    words = definition.get("pre_tokenizer")
    parts = [*_parts(words), *_parts(definition.get("normalizer"))]
    if wanted is None:
        return definition
    if isinstance(words, dict) and words.get("type") == "ByteLevel":
        if words.get("add_prefix_space") is wanted:
            return definition
        if settings.kind not in GENERIC_CLASSES:
            return definition | {"pre_tokenizer": words | {"add_prefix_space": wanted}}
    elif settings.kind in GENERIC_CLASSES:
        return definition
    else:
        # Outside of byte-level BPE, SentencePiece's vocabularies have this setting.
        marks = [part for part in parts if part.get("type") in ("Metaspace", "Prepend")]
        agrees = wanted is any(part.get("prepend_scheme") != "never" for part in marks)
        if not marks or agrees or "add_prefix_space" not in settings.values:
            return definition
    raise ValueError(
        f"{settings.folder / CONFIG}: 'add_prefix_space' is {str(wanted).lower()}, but "
        "tokenizer.json says otherwise, and versions of transformers follow one or the other; "
        "remove the key, or set it to what the model was trained with in both files"
    )


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the parts of a pre-tokenizer or normalizer, those in a sequence one by one."""
    if not isinstance(component, dict):
        return []
    parts = component.get("pretokenizers") or component.get("normalizers") or []
    return [part for inner in parts for part in _parts(inner)] or [component]


def _set_case(definition: dict[str, Any], settings: Settings) -> dict[str, Any]:
    normalizer = definition.get("normalizer")
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return definition
    if settings.kind in (*GENERIC_CLASSES, *GPT2_CLASSES):
        return definition
    changed = dict(normalizer)
    for key, field, default in _BERT_FIELDS:
        if settings.kind in BERT_CLASSES or key in settings.values:
            changed[field] = settings.flag(key, default)
    return definition if changed == normalizer else definition | {"normalizer": changed}


def _add_tokens(definition: dict[str, Any], settings: Settings) -> dict[str, Any]:
    entries = definition.get("added_tokens") or []
    present = [{field: entry[field] for field in ("content", *_FLAGS)} for entry in entries]
    new = [token for _, token in sorted(settings.added.items()) if token not in present]
    known = {token["content"] for token in [*present, *new]}
    vocab = definition["model"].get("vocab", {})
    tokens = set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}
    named, explicit = settings.named, settings.explicit
    for content, token in named.items():
        # A default of the class that the vocabulary lacks would only add an id that no text has.
        if content and content not in known and (content in explicit or content in tokens):
            new.append(token)
    if not new:
        return definition
    import tokenizers

    library = build(definition)
    for token in new:
        special = token["special"] or token["content"] in named
        library.add_tokens([tokenizers.AddedToken(**token | {"special": special})])
    for id, token in settings.added.items():
        if (found := library.token_to_id(token["content"])) != id:
            file = CONFIG if "added_tokens_decoder" in settings.values else ADDED
            raise ValueError(
                f"{settings.folder / file}: added token {token['content']!r} has id {id}, but the "
                f"library gives it {found}; expected its id in the vocabulary, or ids that "
                "continue it without a gap"
            )
    added = sorted(library.get_added_tokens_decoder().items())
    return definition | {"added_tokens": [{"id": id} | _fields(token) for id, token in added]}


def _fields(token: Any) -> dict[str, Any]:
    """Return an added token of the library as a dict."""
    return {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}


def _named(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the token of each special token that settings name."""
    for key in _NAMED:
        if (value := values.get(key)) is not None:
            yield key, _entry(f"{path}: {key!r}", value, special=True)
    for key in _LISTS:
        tokens = values.get(key) or []
        if not isinstance(tokens, (list, dict)):
            raise ValueError(f"{path}: {key!r} is {tokens!r}; expected a list of tokens")
        for value in tokens.values() if isinstance(tokens, dict) else tokens:
            yield key, _entry(f"{path}: {key!r}", value, special=True)


def _entry(where: str, value: Any, special: bool = False) -> dict[str, Any]:
    """Return an added token with all its fields, from its text or some of its fields."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f"{where} holds {str(value)[:60]!r}; expected a token")
    flags = {flag: fields[flag] for flag in _FLAGS if flag in fields}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{where} holds {str(value)[:60]!r}, whose flags must be true or false")
    special = flags.get("special", special)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"content": fields["content"]} | plain | {"special": special} | flags
