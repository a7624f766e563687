"""One id per character."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flaxgpt.tokenizer.protocol import AllowedSpecial, VocabularyTokenizer


@dataclass(frozen=True)
class CharTokenizer(VocabularyTokenizer):
    """One id per character, in the order of `characters`; no other text can be encoded.

    Args:
        characters: the vocabulary, with each character once.
        stop_ids: ids that end a text.

    Raises:
        ValueError: `characters` is empty, repeats a character or contains a lone surrogate, or a
            stop id is not in the vocabulary.

    Example:
        >>> CharTokenizer.from_text("hello").encode("hole")
        [1, 3, 2, 0]
    """

    characters: str
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.characters, str) or not self.characters:
            raise ValueError(f"characters is {self.characters!r}; expected at least one character")
        for id, character in enumerate(self.characters):
            if self._ids[character] != id:
                raise ValueError(
                    f"character {character!r} is at positions {id} and {self._ids[character]}; "
                    "expected each once; CharTokenizer.from_text accepts repetitions"
                )
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"character {character!r} at position {id} is a lone surrogate, which UTF-8 "
                    "cannot encode; remove it"
                )
        vocab = {id: character.encode() for id, character in enumerate(self.characters)}
        object.__setattr__(self, "_vocab", vocab)
        object.__setattr__(self, "stop_ids", self._check_stop_ids(self.stop_ids))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer for the characters of `text`, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: id for id, character in enumerate(self.characters)}

    def encode(self, text: str, *, allowed_special: AllowedSpecial = ()) -> list[int]:
        self._check_text(text, allowed_special)
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at position "
                f"{text.index(character)} is not among this tokenizer's {self.vocab_size} "
                "characters; remove it, or build the tokenizer from text that contains it"
            ) from None
