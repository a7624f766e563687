"""Byte-level BPE, computed by tiktoken."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import tiktoken

from flaxgpt.tokenizer.protocol import (
    check_decode_ids,
    check_encode_arguments,
    check_id,
    decode_byte_stream,
    is_rust_panic,
)

# GPT-2 splits text into words before it merges bytes. The published pattern (openai/gpt-2,
# src/encoder.py) is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+.
# This is tiktoken's equivalent (tiktoken_ext/openai_public.py), which does not backtrack in words.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class BPETokenizer:
    """Byte-level byte-pair encoding, which can express any text and decodes to the same text.

    Example:
        >>> from flaxgpt.tokenizer import load_tokenizer
        >>> tokenizer = load_tokenizer("gpt2")
        >>> tokenizer.encode("Hello, I am")
        [15496, 11, 314, 716]
        >>> tokenizer.decode([15496, 11, 314, 716])
        'Hello, I am'
    """

    def __init__(
        self, pattern: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]
    ) -> None:
        """Create a tokenizer from the arguments of `tiktoken.Encoding`.

        Args:
            pattern: a regular expression whose matches are the words within which bytes merge.
                Text that it does not match is dropped.
            ranks: the bytes of each token and its id. Lower ids are merged first.
            special_tokens: the text of each special token and its id.

        Raises:
            ValueError: a byte has no token, an id is negative, not an integer or used twice, a
                special token is a prefix of another, or `pattern` is not a valid expression.
        """
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"{len(missing)} of the 256 bytes have no token, the first 0x{missing[0]:02x}; "
                "expected a byte-level vocabulary, which has one for each"
            )
        special_bytes = {text.encode("utf-8"): id for text, id in special_tokens.items()}
        self._bytes: dict[int, bytes] = {}
        for token, id in itertools.chain(ranks.items(), special_bytes.items()):
            if type(id) is not int or not 0 <= id < 2**32:
                raise ValueError(f"token {token!r} has id {id!r}; expected a nonnegative integer")
            if self._bytes.setdefault(id, token) != token:
                raise ValueError(
                    f"id {id} belongs to both {self._bytes[id]!r} and {token!r}; expected one token"
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
        self._vocab_size = max(self._bytes) + 1
        self._pattern = pattern
        self._ranks = dict(ranks)
        self._special_tokens = dict(special_tokens)
        self._encoding = tiktoken.Encoding(
            "flaxgpt",
            pat_str=pattern,
            mergeable_ranks=self._ranks,
            special_tokens=self._special_tokens,
        )

    def __repr__(self) -> str:
        return f"<BPETokenizer with {self.vocab_size} ids, special tokens {self._special_tokens}>"

    @property
    def pattern(self) -> str:
        """The regular expression that splits text into words."""
        return self._pattern

    @property
    def ranks(self) -> dict[bytes, int]:
        """The bytes of each token and its id, without the special tokens."""
        return dict(self._ranks)

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self._vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """See `Tokenizer.special_tokens`."""
        return dict(self._special_tokens)

    def encode(
        self, text: str, *, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """See `Tokenizer.encode`. As in tiktoken, a lone surrogate is encoded as U+FFFD."""
        allowed = check_encode_arguments(text, allowed_special, self._special_tokens)
        try:
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except BaseException as error:
            # The regex engine fails on a million spaces before a word, for example; some versions
            # of tiktoken report that as a panic.
            if not isinstance(error, ValueError) and not is_rust_panic(error):
                raise
            raise ValueError(
                f"a text of {len(text)} characters could not be split into words: {error}; "
                "shorten its runs of hundreds of thousands of spaces or newlines"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        known = check_decode_ids(ids, self._bytes, self.vocab_size)
        return b"".join(self._bytes[id] for id in known).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        """See `Tokenizer.decode_stream`. The text does not depend on `after`."""
        return decode_byte_stream(self.token_bytes, ids)

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return self._bytes[check_id(id, self._bytes, self.vocab_size)]
