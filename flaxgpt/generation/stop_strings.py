"""Stop strings: text that arrives in pieces, up to the first of several strings. Knows no model.

All strings are searched for at once with the automaton of Aho and Corasick, "Efficient string
matching: an aid to bibliographic search" (1975). Its nodes are the beginnings of the strings, and
after each character it is at the longest one that the text so far ends with. That is the text
to hold back, and it need not be stored, because the node says what it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """The strings that end a text. Validates itself.

    A text ends at the string that ends first in it. Of several that end at the same place, the
    longest counts.

    Attributes:
        strings: the strings, none of them empty; without any, texts do not end early.
        include: whether the text includes the string.

    Raises:
        ValueError: `strings` are not a list of strings, one is empty, or `include` has no effect.

    Example:
        >>> stops = StopStrings(["User:", "stop"])
        >>> list(stops.cut(["Hello. Us", "e it. U", "ser", ": and so on"]))
        ['Hello. ', 'Use it. ']
    """

    strings: Sequence[str] = ()
    include: bool = False

    def __post_init__(self) -> None:
        given = self.strings
        if isinstance(given, str):
            raise ValueError(f"stop must be a list of strings; for one string, use [{given!r}]")
        if not isinstance(given, Iterable):
            raise ValueError(f'stop={given!r} must be a list of strings, such as ["User:"]')
        object.__setattr__(self, "strings", tuple(given))
        for string in self.strings:
            if not isinstance(string, str):
                raise ValueError(
                    f"stop string {string!r} must be a str; for token ids, use stop_ids"
                )
            if not string:
                raise ValueError(
                    "stop string '' is empty, so it would end every text at its beginning: leave "
                    "it out"
                )
        if not isinstance(self.include, bool):
            raise ValueError(f"include_stop={self.include!r} must be True or False")
        if self.include and not self.strings:
            raise ValueError(
                "include_stop has no effect without stop strings: pass a list of them as stop, or "
                "leave include_stop out"
            )

    @functools.cached_property
    def _automaton(self) -> _Automaton:
        return _Automaton(self.strings)

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield a text as it arrives, until it contains one of the strings.

        Text that could become a string is held back until it cannot; with `include`, all of it
        is part of the result, so nothing is held back. The time is linear in the lengths of the
        text and the strings.

        Args:
            pieces: any iterable, such as a generator; not read further once a string is complete.

        Yields:
            Nonempty pieces, none of which is ever taken back.
        """
        automaton, node = self._automaton, 0
        for piece in pieces:
            string, held = automaton.string[node], 0 if self.include else automaton.depth[node]
            found, end = 0, 0
            for end, character in enumerate(piece, 1):  # noqa: B007
                node = automaton.step(node, character)
                if found := automaton.found[node]:
                    break
            kept = 0 if self.include else found or automaton.depth[node]
            if ready := held + end - kept:
                yield string[: min(ready, held)] + piece[: max(ready - held, 0)]
            if found:
                return
        if not self.include and node:
            yield automaton.string[node][: automaton.depth[node]]


class _Automaton:
    """A tree of the strings' beginnings, with the root 0, and links between them."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.string = [""]  # one that the node is the beginning of
        self.depth = [0]  # how many characters of it
        self.found = [0]  # length of the longest string that the node ends with, or 0
        self._child: dict[tuple[int, str], int] = {}
        self._shorter = [0]  # the node of the longest other beginning that this one ends with
        for string in strings:
            node = 0
            for depth, character in enumerate(string, 1):
                child = self._child.setdefault((node, character), len(self.depth))
                if child == len(self.depth):
                    self.string.append(string)
                    self.depth.append(depth)
                    self.found.append(0)
                    self._shorter.append(0)
                node = child
            self.found[node] = len(string)
        # Shorter beginnings first, because the links of longer ones follow theirs.
        for (parent, character), node in sorted(
            self._child.items(), key=lambda edge: self.depth[edge[1]]
        ):
            if parent:
                self._shorter[node] = self.step(self._shorter[parent], character)
            self.found[node] = self.found[node] or self.found[self._shorter[node]]

    def step(self, node: int, character: str) -> int:
        """Return the node after another character."""
        while (child := self._child.get((node, character))) is None:
            if node == 0:
                return 0
            node = self._shorter[node]
        return child
