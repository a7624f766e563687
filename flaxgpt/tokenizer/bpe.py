"""Byte-level BPE, computed by tiktoken, and the vocabularies of this kind inside the package."""

from __future__ import annotations

import base64
import functools
import importlib.resources
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import tiktoken

from flaxgpt._checks import value_errors
from flaxgpt.tokenizer.protocol import END_OF_TEXT, AllowedSpecial, VocabularyTokenizer

# GPT-2 splits text into words before it merges bytes. The published pattern (openai/gpt-2,
# src/encoder.py) is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
# This is tiktoken's equivalent (tiktoken_ext/openai_public.py), which does not backtrack in words.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

TOKENIZER_NAMES = ("gpt2", "tales")


class BPETokenizer(VocabularyTokenizer):
    """Byte-level byte-pair encoding, which can express any text and decodes to the same text.

    Args:
        pattern: a regular expression whose matches are the words within which bytes merge. Text
            that it does not match is dropped.
        ranks: the bytes of each token and its id. Lower ids are merged first.
        special_tokens: the text of each special token and its id.
        stop_ids: ids that end a text; None for that of `<|endoftext|>`, if it is a special token.

    Raises:
        ValueError: a byte has no token, an id is negative, not an integer or used twice, a special
            token is a prefix of another, a stop id has no token, or `pattern` is not a valid
            expression.

    Example:
        >>> from flaxgpt.tokenizer import load_tokenizer
        >>> load_tokenizer("gpt2").encode("Hello, I am")
        [15496, 11, 314, 716]
    """

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        stop_ids: Iterable[int] | None = None,
    ) -> None:
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"{len(missing)} of the 256 bytes have no token, the first 0x{missing[0]:02x}; "
                "expected a byte-level vocabulary, which has one for each"
            )
        self._vocab: dict[int, bytes] = {}
        special_bytes = {text.encode(): id for text, id in special_tokens.items()}
        for token, id in itertools.chain(ranks.items(), special_bytes.items()):
            if type(id) is not int or not 0 <= id < 2**32:
                raise ValueError(f"token {token!r} has id {id!r}; expected a nonnegative integer")
            if self._vocab.setdefault(id, token) != token:
                raise ValueError(
                    f"id {id} belongs to both {self._vocab[id]!r} and {token!r}; expected one token"
                )
        # tiktoken tries special tokens in no fixed order, so a common prefix would be ambiguous.
        for first, second in itertools.pairwise(sorted(special_tokens)):
            if second.startswith(first):
                raise ValueError(
                    f"special token {first!r} is a prefix of special token {second!r}, so a text "
                    "with the longer one is ambiguous; rename one of them"
                )
        if "" in special_tokens:
            raise ValueError("a special token is empty; expected at least one character")
        self.pattern, self.ranks = pattern, dict(ranks)
        self._special_tokens = special = dict(special_tokens)
        self.stop_ids = self._check_stop_ids(stop_ids)
        self._encoding = tiktoken.Encoding(
            "flaxgpt", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=special
        )

    @property
    def _definition(self) -> tuple[Any, ...]:
        return self.pattern, self.ranks, self._special_tokens, self.stop_ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self._definition == other._definition

    def __hash__(self) -> int:
        return hash((self.pattern, len(self.ranks), self.stop_ids))

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """See `Tokenizer.encode`. As in tiktoken, a lone surrogate is encoded as U+FFFD."""
        allowed = self._check_text(text, allowed_special)
        # The regex engine fails on a million spaces before a word, for example.
        problem = f"a text of {len(text)} characters could not be split into words"
        advice = "; shorten its runs of hundreds of thousands of spaces or newlines"
        with value_errors(problem, advice):
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())


@functools.cache
def shipped_tokenizer(name: str) -> BPETokenizer:
    """Return the tokenizer that flaxgpt ships under one of `TOKENIZER_NAMES`."""
    # tiktoken's loader would copy the file to a temporary folder and trust that copy later.
    file = importlib.resources.files("flaxgpt") / "vocab" / f"{name}.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return BPETokenizer(GPT2_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
