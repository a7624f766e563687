"""The `Tokenizer` protocol, and what the implementations in flaxgpt share."""

from __future__ import annotations

import codecs
import copy
import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np

from flaxgpt._checks import check_stop_ids

AllowedSpecial = Collection[str] | Literal["all"]
END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = "\ufffd".encode()  # the text of an id without a token


class Tokenizer(Protocol):
    """The tokenizer interface used throughout flaxgpt; any object with these members qualifies."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the smallest `GPTConfig.vocab_size` that fits."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens and their ids, such as `{"<|endoftext|>": 50256}`.

        `encode` never produces these ids from text unless `allowed_special` permits it, except
        that of an unknown token, which stands for text outside the vocabulary.
        """

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text, such as `(50256,)`; pass them to `generate` as `stop_ids`.

        A tokenizer loaded from a folder has those of the model, from `generation_config.json`,
        `config.json` or the tokenizer's files.
        """

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any string.
            allowed_special: the special tokens to recognize in `text`, or "all". The others are
                treated as ordinary text, so a prompt cannot inject control tokens.

        Raises:
            TypeError: `text` is not a `str`.
            ValueError: the vocabulary cannot express `text`, or a name in `allowed_special` is not
                in `special_tokens`.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids.

        Bytes that are not valid UTF-8 become U+FFFD, as does an id of 0 or more without a token,
        such as the padding of a model's vocabulary.

        Args:
            ids: a sequence of integers, or a one-dimensional integer array of NumPy or JAX.

        Raises:
            ValueError: an id is negative or not an integer; the message gives its index.
        """

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text of ids as they arrive, once later ids can no longer change it.

        Args:
            ids: any iterable, such as a generator that is still sampling.
            after: the ids that come before, such as a prompt's. They are not repeated, but some
                tokenizers decode the first token of a text differently, without its space.

        Yields:
            Nonempty pieces of text, whose concatenation is what `ids` add to `decode(after)`.

        Raises:
            ValueError: an id is negative or not an integer; the message gives its index.
        """

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that an id adds to a text, possibly an incomplete UTF-8 character.

        Raises:
            ValueError: `id` is not in the vocabulary.
        """


def text_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """Return which ids of a model have a text, for the argument `allowed` of `generate`.

    A model can have more ids than its tokenizer, whose vocabulary can have gaps.

    Args:
        tokenizer: any tokenizer.
        vocab_size: of the model.

    Returns:
        bool [vocab_size], or None if all ids have a text.

    Raises:
        ValueError: no id has a text.
    """
    if isinstance(tokenizer, VocabularyTokenizer):
        known = np.fromiter(tokenizer.ids, np.int64)
    else:
        known = np.array([id for id in range(vocab_size) if _has_bytes(tokenizer, id)], np.int64)
    allowed = np.zeros(vocab_size, bool)
    allowed[known[known < vocab_size]] = True
    if not allowed.any():
        raise ValueError(
            f"none of the model's {vocab_size} ids has a token; is this the model's tokenizer?"
        )
    return None if allowed.all() else allowed


def _has_bytes(tokenizer: Tokenizer, id: int) -> bool:
    try:
        tokenizer.token_bytes(id)
    except ValueError:
        return False
    return True


class VocabularyTokenizer(Tokenizer):
    """A tokenizer with a vocabulary, whose text is by default the concatenation of its tokens."""

    _vocab: Mapping[int, Any]  # the bytes of each id
    _special_tokens: Mapping[str, int] = {}
    stop_ids: tuple[int, ...] = ()

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<{kind} with {self.vocab_size} ids, special tokens {self._special_tokens}>"

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._vocab) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special_tokens)

    @property
    def ids(self) -> Collection[int]:
        """The ids that a token has, in no particular order."""
        return self._vocab.keys()

    def has_token(self, id: int) -> bool:
        """Return whether a token has this id."""
        return id in self._vocab

    @property
    def default_stop_ids(self) -> tuple[int, ...]:
        """The id of `<|endoftext|>`, if it is a special token."""
        return tuple(id for token, id in self._special_tokens.items() if token == END_OF_TEXT)

    def with_stop_ids(self, stop_ids: Iterable[int]) -> Self:
        """Return this tokenizer with other `stop_ids`; ValueError for one that no token has."""
        checked = self._check_stop_ids(stop_ids)
        if checked == self.stop_ids:
            return self
        changed = copy.copy(self)
        object.__setattr__(changed, "stop_ids", checked)  # also if it is a frozen dataclass
        return changed

    def _check_stop_ids(self, stop_ids: Iterable[int] | None) -> tuple[int, ...]:
        """Return stop ids as a tuple; None stands for the end-of-text token, if there is one."""
        checked = self.default_stop_ids if stop_ids is None else check_stop_ids(stop_ids)
        for id in checked:
            self._check_id(id, " of stop_ids")
        return tuple(dict.fromkeys(checked))

    def decode(self, ids: Sequence[int]) -> str:
        tokens = [self._vocab.get(id, _REPLACEMENT) for id in self._check_ids(ids)]
        return b"".join(tokens).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in self._check_ids(ids, " of the stream"):
            if piece := decoder.decode(self._vocab.get(id, _REPLACEMENT)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def token_bytes(self, id: int) -> bytes:
        return self._vocab[self._check_id(id)]

    def _check_text(self, text: str, allowed: AllowedSpecial) -> set[str]:
        """Check the arguments of `encode` and return the special tokens to recognize."""
        if not isinstance(text, str):
            raise TypeError(
                f"text has type {type(text).__name__}; expected a str: encode several texts one by "
                "one, and decode bytes with .decode('utf-8') first"
            )
        if isinstance(allowed, str):
            if allowed == "all":
                return set(self._special_tokens)
            raise ValueError(
                f"allowed_special={allowed!r} is a str; expected 'all' or a collection such as "
                f"{{{allowed!r}}}"
            )
        if unknown := sorted(set(allowed).difference(self._special_tokens)):
            raise ValueError(
                f"allowed_special contains {unknown}; expected names among this tokenizer's "
                f"special tokens {sorted(self._special_tokens)}"
            )
        return set(allowed)

    def _check_ids(self, ids: Iterable[int], where: str = "") -> Iterator[int]:
        """Yield the ids as ints."""
        # Converting a NumPy or JAX array at once is far faster than element by element.
        elements = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(elements, Iterable):
            raise ValueError(f"ids={ids!r} is not a sequence of ids; for one id, pass [{ids!r}]")
        for index, id in enumerate(elements):
            known = type(id) is int and id >= 0
            yield id if known else self._check_integer(id, f" at index {index}{where}")

    def _check_integer(self, id: Any, place: str = "") -> int:
        """Return an id as an int, which need not have a token, or raise ValueError."""
        expected = f"expected an id from 0 to {self.vocab_size - 1}"
        # Older NumPy releases accept their own bool as an index.
        value: Any = None if isinstance(id, (bool, np.bool_)) else id
        try:
            number = operator.index(value)
        except TypeError:
            advice = "; decode one row at a time" if isinstance(id, list) else ""
            raise ValueError(f"id {id!r}{place} is not an integer; {expected}{advice}") from None
        if number < 0:
            raise ValueError(f"id {number}{place} is not in the vocabulary; {expected}")
        return number

    def _check_id(self, id: Any, place: str = "") -> int:
        """Return the id of a token as an int, or raise ValueError."""
        number = self._check_integer(id, place)
        if number not in self._vocab:
            unused = " that a token has" if number < self.vocab_size else ""
            raise ValueError(
                f"id {number}{place} is not in the vocabulary; expected an id from 0 to "
                f"{self.vocab_size - 1}{unused}"
            )
        return number
