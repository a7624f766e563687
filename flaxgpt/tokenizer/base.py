"""Text to token ids and back: GPT-2's byte-level BPE, and one id per character.

Reading and writing tokenizers in model folders is `flaxgpt.tokenizer.folder`.
"""

import base64
import difflib
import functools
import importlib.resources
import itertools
import operator
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import tiktoken

# GPT-2 splits text into words before merging bytes. The published pattern (openai/gpt-2,
# src/encoder.py) is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+;
# this is tiktoken's equivalent (tiktoken_ext/openai_public.py), which does not backtrack in words.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer(Protocol):
    """What the rest of flaxgpt asks of a tokenizer; any object with these members is one."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what `GPTConfig.vocab_size` must be, at least."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids that text never encodes to unless asked, such as `{"<|endoftext|>": 50256}`."""
        ...

    def encode(
        self, text: str, *, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """Turns text into ids.

        Args:
            text: any string.
            allowed_special: the special tokens to recognise in `text`. The rest are ordinary
                text, so that a prompt cannot smuggle one in.

        Raises:
            TypeError: `text` is not a `str`.
            ValueError: the vocabulary cannot express `text`, or `allowed_special` names a token
                that is not among `special_tokens`.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turns ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: integers, or a one-dimensional integer array of NumPy or JAX.

        Raises:
            ValueError: an id is not in the vocabulary; says which and where.
        """
        ...

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for, which need not be whole UTF-8 characters.

        Raises:
            ValueError: `id` is not in the vocabulary.
        """
        ...


class BPETokenizer:
    """Byte-level byte-pair encoding: any text can be encoded, and decodes to itself.

    Example:
        >>> tokenizer = load_tokenizer("gpt2")
        >>> tokenizer.encode("Hello, I am")
        [15496, 11, 314, 716]
        >>> tokenizer.decode([15496, 11, 314, 716])
        'Hello, I am'
    """

    def __init__(
        self, pattern: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]
    ) -> None:
        """Builds the tokenizer from what `tiktoken.Encoding` needs.

        Args:
            pattern: regular expression whose matches are the words within which bytes merge; what
                it matches nowhere is left out of the ids.
            ranks: each token's bytes and its id. The lower of two ids is merged first.
            special_tokens: each special token's text and its id.

        Raises:
            ValueError: a byte has no token, an id is no integer from 0 on or is taken twice, one
                special token begins another, or `pattern` is no valid expression.
        """
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"{len(missing)} of the 256 bytes have no token, the first 0x{missing[0]:02x}; "
                "a byte-level vocabulary needs all of them to express any text"
            )
        special_bytes = {text.encode("utf-8"): id for text, id in special_tokens.items()}
        self._bytes: dict[int, bytes] = {}
        for token, id in itertools.chain(ranks.items(), special_bytes.items()):
            if type(id) is not int or not 0 <= id < 2**32:
                raise ValueError(f"token {token!r} has id {id!r}; expected an integer from 0 on")
            if self._bytes.setdefault(id, token) != token:
                raise ValueError(
                    f"id {id} stands for both {self._bytes[id]!r} and {token!r}; expected one each"
                )
        # tiktoken tries special tokens in no fixed order, so which of two would win is chance.
        for first, second in itertools.pairwise(sorted(special_tokens)):
            if second.startswith(first):
                raise ValueError(
                    f"special token {first!r} begins special token {second!r}, so text holding "
                    "the longer could be read either way; rename one"
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
        return f"<BPETokenizer of {self.vocab_size} ids, special tokens {self._special_tokens}>"

    @property
    def pattern(self) -> str:
        """The regular expression that splits text into words."""
        return self._pattern

    @property
    def ranks(self) -> dict[bytes, int]:
        """Each token's bytes and its id, without the special tokens."""
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
        allowed = _checked_request(text, allowed_special, self._special_tokens)
        try:
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except BaseException as error:
            # The regex engine gives up on, say, a million spaces before a word. tiktoken reports
            # this as a Rust panic in some versions, which no `except Exception` would stop.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"a text of {len(text)} characters could not be split into words: {error}; "
                "shorten its runs of hundreds of thousands of spaces or newlines"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        known = _checked_ids(ids, self._bytes, self.vocab_size)
        return b"".join(self._bytes[id] for id in known).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return self._bytes[_checked_id(id, self._bytes, self.vocab_size)]


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character, in the order of `characters`; text with any other is refused.

    Args:
        characters: the vocabulary, each character once.

    Raises:
        ValueError: `characters` is empty, repeats a character or holds a lone surrogate.

    Example:
        >>> CharTokenizer.from_text("hello").encode("hole")
        [1, 3, 2, 0]
    """

    characters: str

    def __post_init__(self) -> None:
        if not isinstance(self.characters, str) or not self.characters:
            raise ValueError(f"characters is {self.characters!r}; expected at least one character")
        for id, character in enumerate(self.characters):
            if self._ids[character] != id:
                raise ValueError(
                    f"character {character!r} is at positions {id} and {self._ids[character]}; "
                    "expected each once: CharTokenizer.from_text takes any text"
                )
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"character {character!r} at position {id} is a lone surrogate, which no "
                    "UTF-8 text holds; remove it"
                )

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The characters of `text`, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: id for id, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return len(self.characters)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Empty: every id is a character."""
        return {}

    def encode(
        self, text: str, *, allowed_special: Collection[str] | Literal["all"] = ()
    ) -> list[int]:
        """See `Tokenizer.encode`."""
        _checked_request(text, allowed_special, {})
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at position "
                f"{text.index(character)} is not among this tokenizer's {self.vocab_size} "
                "characters; remove it, or build the tokenizer from text that has it"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        known = _checked_ids(ids, range(self.vocab_size), self.vocab_size)
        return "".join(self.characters[id] for id in known)

    def token_bytes(self, id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        known = _checked_id(id, range(self.vocab_size), self.vocab_size)
        return self.characters[known].encode("utf-8")


def load_tokenizer(name: str = "gpt2") -> BPETokenizer:
    """Returns the tokenizer that ships with flaxgpt under `name`. Nothing is downloaded.

    Args:
        name: one of `TOKENIZER_NAMES`.

    Raises:
        ValueError: there is no such tokenizer; names those there are.
    """
    if name not in TOKENIZER_NAMES:
        near = difflib.get_close_matches(str(name).lower(), TOKENIZER_NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown tokenizer {name!r}; {hint}flaxgpt ships "
            f"{', '.join(map(repr, TOKENIZER_NAMES))}, and read_tokenizer reads one from a model's "
            "folder"
        )
    return _shipped(name)


@functools.cache
def _shipped(name: str) -> BPETokenizer:
    # tiktoken's own loader would copy the file to a temporary folder and trust that copy later.
    file = importlib.resources.files("flaxgpt") / "vocab" / f"{name}.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return BPETokenizer(GPT2_PATTERN, ranks, {"<|endoftext|>": len(ranks)})


TOKENIZER_NAMES = ("gpt2", "tales")


def _checked_request(
    text: str, allowed: Collection[str] | Literal["all"], special_tokens: Collection[str]
) -> set[str]:
    if not isinstance(text, str):
        raise TypeError(
            f"encode takes text, a str; got {type(text).__name__}: "
            "encode several texts one by one, and read bytes with .decode('utf-8') first"
        )
    if isinstance(allowed, str):
        if allowed == "all":
            return set(special_tokens)
        raise ValueError(
            f"allowed_special is {allowed!r}; expected 'all' or a collection: {{{allowed!r}}}"
        )
    unknown = sorted(set(allowed).difference(special_tokens))
    if unknown:
        raise ValueError(
            f"allowed_special names {unknown}, but this tokenizer's special tokens are "
            f"{sorted(special_tokens)}"
        )
    return set(allowed)


def _checked_ids(ids: Sequence[int], known: Container[int], size: int) -> list[int]:
    # Arrays of NumPy and JAX give up all their elements at once far faster than one by one.
    elements = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(elements, Iterable):
        raise ValueError(f"ids is {ids!r}; expected a sequence of ids: pass [{ids!r}] for one")
    return [_checked_id(id, known, size, f" at index {place}") for place, id in enumerate(elements)]


def _checked_id(id: object, known: Container[int], size: int, place: str = "") -> int:
    number = id if type(id) is int else _integer(id)
    if number is None:
        raise ValueError(
            f"id {id!r}{place} is not an integer; expected an id from 0 to {size - 1}"
            + (": decode rows one by one" if isinstance(id, list) else "")
        )
    if number not in known:
        raise ValueError(
            f"id {number}{place} is not in the vocabulary; expected an id from 0 to {size - 1}"
            + (", and no token has this one" if 0 <= number < size else "")
        )
    return number


def _integer(value: object) -> int | None:
    # operator.index takes True as 1, and so it does NumPy's True in older NumPy.
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
