"""Regular expressions to automata that read the bytes of a text in UTF-8.

The parser is that of Python's `re`, so a pattern means what it means there. The parse tree becomes
an automaton with several possible states at once (Thompson, "Regular expression search algorithm",
1968), and that one the automaton of the sets of these states, of which there is one at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from flaxgpt.generation.grammar.characters import Range, ranges_of, utf8_sequences

# There is no public function that returns the parse tree of a pattern.
_parser: Any = importlib.import_module("re._parser")

MOST_STATES = 20_000
_UNSUPPORTED = {
    "AT": "^, $, \\b and other anchors: leave them out, because the whole text matches anyway",
    "ASSERT": "lookaround, such as (?=...)",
    "ASSERT_NOT": "lookaround, such as (?!...)",
    "FAILURE": "lookaround, such as (?!...)",
    "GROUPREF": "backreferences, such as \\1",
    "GROUPREF_EXISTS": "conditions, such as (?(1)...)",
    "ATOMIC_GROUP": "atomic groups, (?>...): use (?:...)",
    "POSSESSIVE_REPEAT": "possessive repetition, such as a*+: use a*",
}


@dataclasses.dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """Reads a text byte by byte, beginning in state 0.

    Attributes:
        next_state: int32 [S, 256], the state after a byte; -1 where no match continues.
        accepting: bool [S], whether the text so far matches.
    """

    next_state: np.ndarray
    accepting: np.ndarray

    def matches(self, text: bytes) -> bool:
        """Return whether all of a text matches."""
        state = 0
        for byte in text:
            state = int(self.next_state[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


def byte_automaton(pattern: str) -> ByteAutomaton:
    """Return the automaton of a regular expression, which the whole text has to match.

    Args:
        pattern: in the syntax of `re`, with the flags `a`, `s` and `x`, and without lookaround,
            backreferences, anchors, atomic groups and possessive repetition.

    Raises:
        ValueError: it is no such pattern, or needs too many states.

    Example:
        >>> automaton = byte_automaton("(yes|no), [0-9]{1,3}")
        >>> automaton.matches(b"no, 12"), automaton.matches(b"no, ")
        (True, False)
    """
    check_pattern(pattern)
    try:
        tree = _parser.parse(pattern)
        flags = tree.state.flags
        _check_flags(pattern, flags)
        builder = _Builder(pattern, flags)
        end = builder.new_state()
        return _deterministic(pattern, builder, builder.sequence(tree, end), end)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {_short(pattern)} is not valid: {error}") from error


def check_pattern(pattern: Any) -> str:
    """Return a pattern, or raise ValueError for what is no str."""
    if not isinstance(pattern, str):
        raise ValueError(f"pattern {pattern!r} must be a str, such as '[0-9]{{1,3}}'")
    return pattern


class _Builder:
    """States of the first automaton, made from the end of the pattern to its beginning.

    Each method returns the state in which a part of the pattern begins, given the state `out` in
    which it ends.
    """

    def __init__(self, pattern: str, flags: int) -> None:
        self.pattern, self.flags = pattern, flags
        self.arcs: list[list[tuple[Range, int]]] = []  # by state: bytes, and the state after them
        self.jumps: list[list[int]] = []  # by state: states that it also is
        self._shared: dict[Any, int] = {}
        self._ranges: dict[Any, tuple[Range, ...]] = {}

    def new_state(self) -> int:
        if len(self.arcs) >= 5 * MOST_STATES:
            raise _too_large(self.pattern)
        self.arcs.append([])
        self.jumps.append([])
        return len(self.arcs) - 1

    def either(self, states: Iterable[int]) -> int:
        state = self.new_state()
        self.jumps[state] += states
        return state

    def sequence(self, nodes: Iterable[Any], out: int) -> int:
        for node in reversed(list(nodes)):
            out = self.node(node, out)
        return out

    def node(self, node: Any, out: int) -> int:
        kind, value = str(node[0]), node[1]
        match kind:
            case "LITERAL":
                return self.characters(((kind, value),), out)
            case "NOT_LITERAL":
                return self.characters((("NEGATE", None), ("LITERAL", value)), out)
            case "ANY":
                newline = () if self.flags & re.DOTALL else (("LITERAL", ord("\n")),)
                return self.characters((("NEGATE", None), *newline), out)
            case "IN":
                return self.characters(tuple((str(name), item) for name, item in value), out)
            case "BRANCH":
                return self.either(self.sequence(branch, out) for branch in value[1])
            case "SUBPATTERN":
                _, added, removed, inner = value
                _check_flags(self.pattern, added)
                before, self.flags = self.flags, (self.flags | added) & ~removed
                state = self.sequence(inner, out)
                self.flags = before
                return state
            case "MAX_REPEAT" | "MIN_REPEAT":  # which match the same texts
                least, most, inner = value
                return self.repeat(least, most, inner, out)
        reason = _UNSUPPORTED.get(kind, kind)
        raise ValueError(f"pattern {_short(self.pattern)} has unsupported syntax: {reason}")

    def repeat(self, least: int, most: Any, inner: Any, out: int) -> int:
        if most is _parser.MAXREPEAT:
            state = self.new_state()
            self.jumps[state] += [self.sequence(inner, state), out]
        else:
            state = out
            for _ in range(most - least):
                once = self.sequence(inner, state)
                if once == state:  # what is repeated is empty
                    break
                state = self.either([once, out])
        for _ in range(least):
            once = self.sequence(inner, state)
            if once == state:
                break
            state = once
        return state

    def characters(self, items: tuple[tuple[str, Any], ...], out: int) -> int:
        """Return a state with arcs for one character of a class."""
        key = (items, bool(self.flags & re.ASCII))
        if (key, out) in self._shared:
            return self._shared[key, out]
        if key not in self._ranges:
            self._ranges[key] = ranges_of(*key)
        state = self._shared[key, out] = self.new_state()
        for first, last in self._ranges[key]:
            for lead, *others in utf8_sequences(first, last):
                self.arcs[state].append((lead, self.following_bytes(tuple(others), out)))
        return state

    def following_bytes(self, sequence: tuple[Range, ...], out: int) -> int:
        """Return a state for the last bytes of a character, which other characters share."""
        if not sequence:
            return out
        if (sequence, out) not in self._shared:
            state = self._shared[sequence, out] = self.new_state()
            self.arcs[state].append((sequence[0], self.following_bytes(sequence[1:], out)))
        return self._shared[sequence, out]


def _deterministic(pattern: str, builder: _Builder, start: int, end: int) -> ByteAutomaton:
    """Return the automaton whose states are the sets of states that a text can lead to."""
    numbers: dict[frozenset[int], int] = {}
    sets: list[frozenset[int]] = []
    known: dict[frozenset[int], int] = {}  # the same, before jumps are followed

    def number(states: frozenset[int]) -> int:
        if states not in known:
            reached = _follow_jumps(builder, states, end)
            known[states] = numbers.setdefault(reached, len(sets))
            if known[states] == len(sets):
                sets.append(reached)
        return known[states]

    number(frozenset([start]))
    rows: list[list[int]] = []
    while len(rows) < len(sets):
        if len(sets) > MOST_STATES:
            raise _too_large(pattern)
        reached: list[set[int]] = [set() for _ in range(256)]
        for state in sets[len(rows)]:
            for (first, last), target in builder.arcs[state]:
                for byte in range(first, last + 1):
                    reached[byte].add(target)
        rows.append([number(frozenset(states)) if states else -1 for states in reached])
    accepting = np.array([end in states for states in sets])
    return ByteAutomaton(np.array(rows, np.int32), accepting)


def _follow_jumps(builder: _Builder, states: Iterable[int], end: int) -> frozenset[int]:
    """Return the states that these also are, without those that only jump."""
    found, waiting = set(states), list(states)
    while waiting:
        new = [state for state in builder.jumps[waiting.pop()] if state not in found]
        found.update(new)
        waiting += new
    return frozenset(state for state in found if builder.arcs[state] or state == end)


def _check_flags(pattern: str, flags: int) -> None:
    if flags & re.IGNORECASE:
        raise ValueError(
            f"pattern {_short(pattern)} has the flag i, which is not supported: write both cases, "
            "as in [Yy]es"
        )


def _too_large(pattern: str) -> ValueError:
    return ValueError(
        f"pattern {_short(pattern)} needs more than {MOST_STATES} states: use smaller numbers in "
        "{m,n}, or * and +; \\w and \\d need far fewer with (?a), which limits them to ASCII"
    )


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
