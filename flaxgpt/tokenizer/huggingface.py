"""Tokenizers in Hugging Face's `tokenizer.json`, computed by the `tokenizers` library.

The library is imported on first use, because most uses of flaxgpt do not need it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flaxgpt._checks import value_errors
from flaxgpt.tokenizer.files import parse_object
from flaxgpt.tokenizer.protocol import AllowedSpecial, VocabularyTokenizer

if TYPE_CHECKING:
    import tokenizers

_CONTEXT = 16  # ids of `after` that are decoded with the first piece of a stream
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for a byte where characters can be spelled in bytes
_UNREADABLE = "the tokenizers library cannot read this tokenizer"


@dataclass(unsafe_hash=True, repr=False)
class HuggingFaceTokenizer(VocabularyTokenizer):
    """Any tokenizer that the `tokenizers` library reads, such as BPE, WordPiece or Unigram.

    Truncation, padding, BPE dropout and the tokens that a template adds around a text do not
    apply: ids stand for the text and nothing else. The special tokens are the added tokens that are
    marked as special; other added tokens are always recognized, as in the library.

    Args:
        definition: the contents of a `tokenizer.json`. Tokenizers are equal if it and the stop ids
            are.
        stop_ids: ids that end a text; None for that of `<|endoftext|>`, if it is a special token.

    Raises:
        ValueError: the library cannot read the definition, or would change ids in it, or a stop id
            has no token.
    """

    definition: str
    stop_ids: tuple[int, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._json = parse_object(self.definition)
        self._library = build(self._json)  # recognizes all special tokens
        self._encoders = {frozenset[str](): self._library}  # by the special tokens they ignore
        self._vocab = {id: token for token, id in self._library.get_vocab().items()}
        flagged = sorted(self._library.get_added_tokens_decoder().items())
        # Some vocabularies mark the bytes that spell unknown characters as special.
        spells = _BYTE.fullmatch if self._json["model"].get("byte_fallback") else lambda _: None
        special = {token.content: id for id, token in flagged if token.special}
        self._special_tokens = {name: id for name, id in special.items() if not spells(name)}
        self._added: list[dict[str, Any]] = self._json.get("added_tokens") or []
        self._decoder_kinds = _kinds(self._json.get("decoder"))
        if not self._vocab:
            raise ValueError("the vocabulary is empty; expected at least one token")
        vocab = (model := self._json["model"]).get("vocab", {})
        self._missing_bytes: set[int] = set()  # which byte-level BPE would silently drop
        if "ByteLevel" in _kinds(self._json.get("pre_tokenizer")) and not model.get("unk_token"):
            letters = byte_letters().items()
            self._missing_bytes = {byte for letter, byte in letters if letter not in vocab}
        if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
            ((shared, _),) = collections.Counter(vocab.values()).most_common(1)
            raise ValueError(
                f"id {shared} belongs to {[token for token in vocab if vocab[token] == shared]}; "
                "expected one token"
            )
        self.stop_ids = self._check_stop_ids(self.stop_ids)
        for entry in self._added:
            if self._vocab.get(entry["id"]) != entry["content"]:
                raise ValueError(
                    f"added token {entry['content']!r} has id {entry['id']}, but the library gives "
                    f"it {self._library.token_to_id(entry['content'])}; expected its id in the "
                    "vocabulary, or ids that continue it without a gap"
                )

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        return self._library.token_to_id(token)

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """See `Tokenizer.encode`. A lone surrogate is encoded as U+FFFD."""
        hidden = frozenset(self._special_tokens) - self._check_text(text, allowed_special)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self._check_bytes(text)
        if hidden not in self._encoders:
            self._encoders[hidden] = build(_without_tokens(self._json, hidden))
        with value_errors("the tokenizers library cannot encode this text"):
            return self._encoders[hidden].encode(text, add_special_tokens=False).ids

    def _check_bytes(self, text: str) -> None:
        if not self._missing_bytes:
            return
        for entry in self._added:
            text = text.replace(entry["content"], "")
        if normalizer := self._library.normalizer:
            text = normalizer.normalize_str(text)
        if missing := self._missing_bytes.intersection(text.encode()):
            raise ValueError(
                f"the vocabulary has no token for byte 0x{min(missing):02x} of the text; remove "
                "the character, or use a tokenizer whose vocabulary has all 256 bytes"
            )

    def decode(self, ids: Sequence[int]) -> str:
        return self._text(list(self._check_ids(ids)))

    def _text(self, ids: list[int]) -> str:
        # The library omits ids without a token.
        return "".join(
            self._library.decode(list(run), skip_special_tokens=False)
            if known
            else "\ufffd" * len(list(run))
            for known, run in itertools.groupby(ids, self.has_token)
        )

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        # A token alone may decode differently than after others, so a piece is what its ids add to
        # the text of the ids before them; those of one piece are enough.
        window = list(self._check_ids(after))[-_CONTEXT:]
        before, settled = self._text(window), len(window)
        for id in self._check_ids(ids, " of the stream"):
            window.append(id)
            text = self._text(window)
            if text.endswith("\ufffd") or self._is_byte(id) or text == before:
                continue
            yield text[len(before) :]
            window = window[settled:]
            before, settled = self._text(window), len(window)
        if rest := self._text(window)[len(before) :]:
            yield rest

    def _is_byte(self, id: int) -> bool:
        # The text of a run of byte tokens is known at its end: if the run is not valid UTF-8, the
        # library replaces each of its bytes.
        byte_fallback = "ByteFallback" in self._decoder_kinds
        return byte_fallback and bool(_BYTE.fullmatch(self._vocab.get(id, "")))

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`. A space before a word belongs to the word's token."""
        id = self._check_id(id)
        token, letters = self._vocab[id], byte_letters()
        if self._decoder_kinds == ["ByteLevel"]:
            known = letters.keys() >= set(token)
            return bytes(letters[letter] for letter in token) if known else token.encode()
        if self._is_byte(id):
            return bytes([int(token[1:-1], 16)])
        # Only the first token of a text can lose its space, so the second shows all of it.
        return self._text([id, id])[len(self._text([id])) :].encode()


@functools.cache
def byte_letters() -> dict[str, int]:
    """Return the byte of each printable character that stands for one in byte-level vocabularies.

    They spell a token as a word without spaces: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]
    return dict(zip(letters, printable + others, strict=True))


def build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, without what adds to the ids of a text or changes them."""
    import tokenizers

    plain = definition | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(model := plain.get("model"), dict) and model.get("dropout"):
        plain["model"] = model | {"dropout": None}
    with value_errors(_UNREADABLE):
        return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _without_tokens(definition: dict[str, Any], hidden: frozenset[str]) -> dict[str, Any]:
    """Return a definition with the same ids in which no text can match the tokens `hidden`.

    The library's `encode_special_tokens` is not enough: it ignores special tokens when it splits a
    text, but a vocabulary that contains them, such as Unigram's, still produces their ids.
    """
    # No text contains a random name, except by a coincidence of 122 bits.
    names = {token: f"\U0010fffd{uuid.uuid4().hex}" for token in hidden}

    def renamed(token: str) -> str:
        return names.get(token, token)

    model = dict(definition["model"])
    if isinstance(vocab := model["vocab"], dict):
        model["vocab"] = {renamed(token): id for token, id in vocab.items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in vocab]
    if "unk_token" in model:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if hidden.isdisjoint([*pair, "".join(pair)])]
    added = [entry | {"content": renamed(entry["content"])} for entry in definition["added_tokens"]]
    return definition | {"model": model, "added_tokens": added}


def _kinds(component: Any) -> list[str]:
    """Return the types of a pre-tokenizer or decoder, those in a sequence one by one."""
    if not isinstance(component, dict):
        return []
    parts = component.get("decoders") or component.get("pretokenizers") or []
    return [kind for part in parts for kind in _kinds(part)] or [component.get("type", "")]
