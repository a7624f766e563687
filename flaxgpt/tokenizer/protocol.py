"""The `Tokenizer` protocol, and the argument checks that its implementations share."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import Literal, Protocol


class Tokenizer(Protocol):
    """The tokenizer interface used throughout flaxgpt; any object with these members qualifies."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the smallest `GPTConfig.vocab_size` that fits."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens and their ids, such as `{"<|endoftext|>": 50256}`.

        `encode` never produces these ids from text unless `allowed_special` permits it, except
        that of an unknown token, which stands for text outside the vocabulary.
        """
        ...

    def encode(
        self, text: str, *, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any string.
            allowed_special: the special tokens to recognize in `text`, or "all". The others are
                treated as ordinary text, so a prompt cannot inject control tokens.

        Raises:
            TypeError: `text` is not a `str`.
            ValueError: the vocabulary cannot express `text`, or `allowed_special` contains a name
                that is not in `special_tokens`.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids. Bytes that are not valid UTF-8 become U+FFFD.

        Args:
            ids: a sequence of integers, or a one-dimensional integer array of NumPy or JAX.

        Raises:
            ValueError: an id is not in the vocabulary; the message gives its index.
        """
        ...

    def decode_stream(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text of ids as they arrive.

        A piece is held back until later ids cannot change it, for example until all bytes of a
        character are known.

        Args:
            ids: any iterable, such as a generator that is still sampling.
            after: the ids that come before, such as a prompt's. They are not repeated, but some
                tokenizers decode the first token of a text differently, without its space.

        Yields:
            Pieces of text, none empty, whose concatenation is `decode(ids)`, or with `after` what
            `ids` add to `decode(after)`.

        Raises:
            ValueError: an id is not in the vocabulary; the message gives its index.
        """
        ...

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that an id adds to a text, possibly an incomplete UTF-8 character.

        Raises:
            ValueError: `id` is not in the vocabulary.
        """
        ...


def check_encode_arguments(
    text: str, allowed: Collection[str] | Literal["all"], special_tokens: Collection[str]
) -> set[str]:
    """Check the arguments of `Tokenizer.encode` and return the special tokens to recognize."""
    if not isinstance(text, str):
        raise TypeError(
            f"text has type {type(text).__name__}; expected a str: encode several texts one by "
            "one, and decode bytes with .decode('utf-8') first"
        )
    if isinstance(allowed, str):
        if allowed == "all":
            return set(special_tokens)
        raise ValueError(
            f"allowed_special={allowed!r} is a str; expected 'all' or a collection such as "
            f"{{{allowed!r}}}"
        )
    unknown = sorted(set(allowed).difference(special_tokens))
    if unknown:
        raise ValueError(
            f"allowed_special contains {unknown}; expected names among this tokenizer's special "
            f"tokens {sorted(special_tokens)}"
        )
    return set(allowed)


def check_decode_ids(ids: Sequence[int], known: Container[int], vocab_size: int) -> list[int]:
    """Return `ids` as a list of ints, all in `known`."""
    # Converting a NumPy or JAX array at once is far faster than element by element.
    elements = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(elements, Iterable):
        raise ValueError(f"ids={ids!r} is not a sequence of ids; for one id, pass [{ids!r}]")
    return [
        check_id(id, known, vocab_size, f" at index {index}") for index, id in enumerate(elements)
    ]


def check_id(id: object, known: Container[int], vocab_size: int, place: str = "") -> int:
    """Return `id` as an int in `known`."""
    number = id if type(id) is int else _integer(id)
    expected = f"expected an id from 0 to {vocab_size - 1}"
    if number is None:
        advice = "; decode one row at a time" if isinstance(id, list) else ""
        raise ValueError(f"id {id!r}{place} is not an integer; {expected}{advice}")
    if number not in known:
        unused = " that a token has" if 0 <= number < vocab_size else ""
        raise ValueError(f"id {number}{place} is not in the vocabulary; {expected}{unused}")
    return number


def _integer(value: object) -> int | None:
    # operator.index accepts True, and older NumPy releases accept their own bool as well.
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def decode_byte_stream(token_bytes: Callable[[int], bytes], ids: Iterable[int]) -> Iterator[str]:
    """Implement `Tokenizer.decode_stream` for a text that is the concatenation of token bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for index, id in enumerate(ids):
        try:
            piece = decoder.decode(token_bytes(id))
        except ValueError as error:
            raise stream_error(index, error) from None
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def stream_error(index: int, error: ValueError) -> ValueError:
    """Return the error for an id of a stream, with its index."""
    return ValueError(f"at index {index} of the stream: {error}")


def is_rust_panic(error: BaseException) -> bool:
    """Tell whether an exception is a Rust panic, which `except Exception` does not catch."""
    return type(error).__name__ == "PanicException"
