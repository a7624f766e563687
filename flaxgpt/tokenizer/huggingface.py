"""Tokenizers in Hugging Face's files, computed by the `tokenizers` library.

The library is imported on first use, because most uses of flaxgpt do not need it.
"""

from __future__ import annotations

import collections
import functools
import json
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from flaxgpt.tokenizer.json_files import parse_object, read_object, value_errors_naming
from flaxgpt.tokenizer.protocol import (
    check_decode_ids,
    check_encode_arguments,
    check_id,
    is_rust_panic,
    stream_error,
)

if TYPE_CHECKING:
    import tokenizers

_CONTEXT = 16  # ids of `after` that are decoded with the first piece of a stream
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")

# The classes of transformers that keep GPT-2's kind of tokenizer in vocab.json and merges.txt, and
# BERT's kind in vocab.txt.
_GPT2_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer")
_BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")

_T = TypeVar("_T")


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """Any tokenizer that the `tokenizers` library reads, such as BPE, WordPiece or Unigram.

    Truncation, padding, BPE dropout and the tokens that a template adds around a text do not
    apply: ids stand for the text and nothing else.

    Args:
        definition: the contents of a `tokenizer.json`.

    Raises:
        ValueError: the library cannot read the definition, or would change ids in it.
    """

    definition: str

    def __repr__(self) -> str:
        return f"<HuggingFaceTokenizer with {self.vocab_size} ids, special tokens {self._specials}>"

    def __post_init__(self) -> None:
        tokens = self._tokens
        if not tokens:
            raise ValueError("the vocabulary is empty; expected at least one token")
        vocab = self._json["model"].get("vocab")
        if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
            ((shared, _),) = collections.Counter(vocab.values()).most_common(1)
            raise ValueError(
                f"id {shared} belongs to {[token for token in vocab if vocab[token] == shared]}; "
                "expected one token"
            )
        for entry in self._json.get("added_tokens") or []:
            if tokens.get(entry["id"]) != entry["content"]:
                raise ValueError(
                    f"added token {entry['content']!r} has id {entry['id']}, but the library gives "
                    f"it {self._everything.token_to_id(entry['content'])}; expected its id in the "
                    "vocabulary, or ids that continue it without a gap"
                )

    @functools.cached_property
    def _json(self) -> dict[str, Any]:
        return parse_object(self.definition)

    @functools.cached_property
    def _everything(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, which recognizes all special tokens."""
        return _build(self._json)

    @functools.cached_property
    def _encoders(self) -> dict[frozenset[str], tokenizers.Tokenizer]:
        return {frozenset(): self._everything}

    @functools.cached_property
    def _tokens(self) -> dict[int, str]:
        return {id: token for token, id in self._everything.get_vocab().items()}

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        added = self._everything.get_added_tokens_decoder()
        return {token.content: id for id, token in sorted(added.items()) if token.special}

    @functools.cached_property
    def _decoder_kinds(self) -> list[str]:
        return _kinds(self._json.get("decoder"))

    @functools.cached_property
    def _missing_bytes(self) -> frozenset[int]:
        """The bytes that byte-level BPE would drop from a text without a word."""
        model = self._json["model"]
        if "ByteLevel" not in _kinds(self._json.get("pre_tokenizer")) or model.get("unk_token"):
            return frozenset()
        vocab = model.get("vocab", {})
        return frozenset(byte for letter, byte in byte_letters().items() if letter not in vocab)

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return max(self._tokens) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        """See `Tokenizer.special_tokens`: the added tokens that are marked as special."""
        return dict(self._specials)

    def encode(
        self, text: str, *, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """See `Tokenizer.encode`. A lone surrogate is encoded as U+FFFD.

        Added tokens that are not special are always recognized, as in the library.
        """
        allowed = check_encode_arguments(text, allowed_special, self._specials)
        text = _well_formed(text)
        if self._missing_bytes:
            self._check_bytes(text)
        hidden = frozenset(self._specials).difference(allowed)
        if hidden not in self._encoders:
            self._encoders[hidden] = _build(_without_tokens(self._json, hidden))
        encoder = self._encoders[hidden]
        return _call(lambda: encoder.encode(text, add_special_tokens=False).ids, "encode this text")

    def _check_bytes(self, text: str) -> None:
        for entry in self._json.get("added_tokens") or []:
            text = text.replace(entry["content"], "")
        if normalizer := self._everything.normalizer:
            text = normalizer.normalize_str(text)
        if missing := self._missing_bytes.intersection(text.encode()):
            raise ValueError(
                f"the vocabulary has no token for byte 0x{min(missing):02x} of the text; remove "
                "the character, or use a tokenizer whose vocabulary has all 256 bytes"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._text(check_decode_ids(ids, self._tokens, self.vocab_size))

    def _text(self, ids: list[int]) -> str:
        return self._everything.decode(ids, skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        """See `Tokenizer.decode_stream`."""
        # A token alone may decode differently than after others, so a piece is what its ids add to
        # the text of the ids before them; those of one piece are enough.
        window = check_decode_ids(after, self._tokens, self.vocab_size)[-_CONTEXT:]
        before, settled = self._text(window), len(window)
        for index, id in enumerate(ids):
            try:
                window.append(check_id(id, self._tokens, self.vocab_size))
            except ValueError as error:
                raise stream_error(index, error) from None
            text = self._text(window)
            if text.endswith("\ufffd") or self._is_byte(window[-1]) or text == before:
                continue
            yield text[len(before) :]
            window = window[settled:]
            before, settled = self._text(window), len(window)
        if rest := self._text(window)[len(before) :]:
            yield rest

    def _is_byte(self, id: int) -> bool:
        # The text of a run of byte tokens is known at its end: if the run is not valid UTF-8, the
        # library replaces each of its bytes.
        return "ByteFallback" in self._decoder_kinds and bool(
            _BYTE_TOKEN.fullmatch(self._tokens[id])
        )

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`. A space before a word belongs to the word's token."""
        id = check_id(id, self._tokens, self.vocab_size)
        token = self._tokens[id]
        if self._decoder_kinds == ["ByteLevel"]:
            letters = byte_letters()
            if all(letter in letters for letter in token):
                return bytes(letters[letter] for letter in token)
            return token.encode()
        if self._is_byte(id):
            return bytes([int(token[1:-1], 16)])
        # Only the first token of a text can lose its space, so the second shows all of it.
        return self._text([id, id])[len(self._text([id])) :].encode()


@functools.cache
def byte_letters() -> dict[str, int]:
    """Return the printable character that stands for each byte in byte-level vocabularies.

    They spell a token as a word without spaces: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    plain = definition | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(model := plain.get("model"), dict) and model.get("dropout"):
        plain["model"] = model | {"dropout": None}
    text = json.dumps(plain)
    return _call(lambda: tokenizers.Tokenizer.from_str(text), "read this tokenizer")


def _without_tokens(definition: dict[str, Any], hidden: frozenset[str]) -> dict[str, Any]:
    """Return a definition with the same ids in which no text can match the tokens `hidden`.

    The library's `encode_special_tokens` is not enough: it ignores special tokens when it splits a
    text, but a vocabulary that contains them, such as Unigram's, still produces their ids.
    """
    # No text contains a random name, except by a coincidence of 122 bits.
    names = {token: f"\U0010fffd{uuid.uuid4().hex}" for token in hidden}
    model = dict(definition["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            merge
            for merge in model["merges"]
            if hidden.isdisjoint([*(parts := _parts(merge)), "".join(parts)])
        ]
    added = [
        entry | {"content": names.get(entry["content"], entry["content"])}
        for entry in definition["added_tokens"]
    ]
    return definition | {"model": model, "added_tokens": added}


def _parts(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _kinds(component: Any) -> list[str]:
    """Return the types of a pre-tokenizer or decoder, those in a sequence one by one."""
    if not isinstance(component, dict):
        return []
    parts = component.get("decoders") or component.get("pretokenizers") or []
    return [kind for part in parts for kind in _kinds(part)] or [component.get("type", "")]


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate; pairs of them are joined
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _call(function: Callable[[], _T], purpose: str) -> _T:
    """Call the library, whose errors have no type of their own, and raise ValueError for them."""
    try:
        return function()
    except BaseException as error:
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise ValueError(f"the tokenizers library cannot {purpose}: {error}") from error


def read_huggingface(folder: Path) -> HuggingFaceTokenizer | None:
    """Read the tokenizer that Hugging Face's files define.

    These are `tokenizer.json`, or `vocab.json` with `merges.txt` and perhaps `added_tokens.json`
    (GPT-2's kind), or `vocab.txt` (BERT's kind).

    Returns:
        The tokenizer, or None if the folder has none and is not known to need another than GPT-2's.

    Raises:
        ValueError: a file is damaged, missing, or of a kind that cannot be read; the message names
            it.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        with value_errors_naming(path):
            return HuggingFaceTokenizer(path.read_text(encoding="utf-8"))
    settings, source = _settings(folder)
    kind = settings.get("tokenizer_class")
    name = kind.removesuffix("Fast") if isinstance(kind, str) else None
    vocab, merges, words = (folder / file for file in ("vocab.json", "merges.txt", "vocab.txt"))
    if name is None or name in _GPT2_CLASSES:
        for present, absent in ((vocab, merges), (merges, vocab)):
            if present.exists() and not absent.exists():
                raise ValueError(f"{absent} is missing; {present.name} cannot be read without it")
        if vocab.exists():
            return _read_gpt2(vocab, merges, settings)
    if name in _BERT_CLASSES and words.exists():
        return _read_bert(words, settings)
    advice = (
        "which cannot be read without a tokenizer.json; make one with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
    if name not in (None, "GPT2Tokenizer"):
        raise ValueError(f"{source}: the model needs a {kind}, {advice}")
    for pattern in ("*.model", "*.tiktoken", "vocab.txt"):
        for other in sorted(folder.glob(pattern)):
            raise ValueError(f"{other}: this is another kind of tokenizer than GPT-2's, {advice}")
    return None


def _settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings of a folder's tokenizer, and the file that names its class."""
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.exists() else {}
    config = folder / "config.json"
    if settings.get("tokenizer_class") is None and config.exists():
        return settings | {"tokenizer_class": read_object(config).get("tokenizer_class")}, config
    return settings, path


def _read_gpt2(vocab: Path, merges: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    tokens, path = read_object(vocab), vocab.with_name("added_tokens.json")
    added = read_object(path) if path.exists() else {}
    with value_errors_naming(merges):
        lines = merges.read_text(encoding="utf-8").split("\n")
    # Only the first line can be a comment: "# #" is a merge like any other.
    pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    known = settings.get("added_tokens_decoder")
    flags = known if isinstance(known, dict) else {}
    with value_errors_naming(f"{vocab} with {merges.name}"):
        for token, id in (tokens | added).items():
            if type(id) is not int or id < 0:
                raise ValueError(f"token {token!r} has id {id!r}; expected a nonnegative integer")
        # A token that no merge makes can only be a control token, such as <|endoftext|>. In other
        # kinds of BPE there are many more, among them some that are not ASCII.
        made = {"".join(pair) for pair in pairs} | byte_letters().keys()
        others = {token: id for token, id in tokens.items() if token not in made | added.keys()}
        for token, id in others.items():
            if not token.isascii():
                raise ValueError(
                    f"token {token!r} (id {id}) is made by no merge and is not an added token; "
                    "expected GPT-2's kind of vocabulary, and merges for all of it"
                )
        added = others | added
        entries = [
            {"id": id, "content": token, "special": True, "normalized": False}
            | {name: False for name in ("lstrip", "rstrip", "single_word")}
            | flags.get(str(id), {})
            for token, id in sorted(added.items(), key=lambda item: item[1])
        ]
        byte_level = {"type": "ByteLevel", "trim_offsets": False, "use_regex": True}
        space = bool(settings.get("add_prefix_space", False))
        definition = {
            "version": "1.0",
            "added_tokens": entries,
            "pre_tokenizer": byte_level | {"add_prefix_space": space},
            "decoder": byte_level | {"add_prefix_space": True},
            "model": {"type": "BPE", "vocab": tokens, "merges": pairs},
        }
        return HuggingFaceTokenizer(json.dumps(definition))


def _read_bert(vocab: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    from tokenizers import BertWordPieceTokenizer

    with value_errors_naming(vocab):
        library = _call(
            lambda: BertWordPieceTokenizer.from_file(
                str(vocab),
                lowercase=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            ),
            "read this tokenizer",
        )
        return HuggingFaceTokenizer(library.to_str())
