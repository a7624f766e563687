"""`Grammar`: which ids may follow so that a text matches, as a table of states and ids.

Most ids behave alike: in each state, two tokens of three letters are both excluded, or both lead
to the same state. So the table has one column per class of ids that behave alike, and the class of
each id is stored once. For the pattern of a JSON object, GPT-2's 50,257 ids fall into about a
hundred classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.tree_util import Partial

from flaxgpt._checks import check_size, check_stop_ids
from flaxgpt.generation.grammar.hook import next_ids
from flaxgpt.generation.grammar.regex import ByteAutomaton, byte_automaton, check_pattern
from flaxgpt.tokenizer import Tokenizer, text_ids

# States of the table that no text leads to. Rows of ids are in the second when they have ended.
EXCLUDED, ENDED = 0, 1
UNREACHABLE = 2**30  # ids to the end of a match where there is none

_CHUNK = 32  # states whose ids are found together
_MOST_ENTRIES = 2**24  # ids that may follow, over all states; 200 MB while it is compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """A regular expression compiled for the ids of a model; made by `compile_grammar`.

    Attributes:
        pattern: the regular expression.
        stop_ids: ids that end a text, allowed where it matches. They are no text themselves.
        vocab_size: ids of the model (V).
        next_state: int32 [S, C], the state after an id of a class: `EXCLUDED`, `ENDED` after a stop
            id, or another. A text begins in state 2.
        to_end: int32 [S], the fewest ids until the text matches, `UNREACHABLE` if it never does.
        classes: int32 [V], the class of each id.
    """

    pattern: str
    stop_ids: tuple[int, ...]
    vocab_size: int
    next_state: np.ndarray
    to_end: np.ndarray
    classes: np.ndarray

    @property
    def shortest(self) -> int:
        """The fewest ids of a text that matches."""
        return int(self.to_end[2])

    def hook(self, lengths: Any, max_new_tokens: int) -> Partial:
        """Return the hook, for `logits_fn`, that continues prompts by texts that match.

        An id is excluded if no match that starts with the new ids and this one fits.

        Args:
            lengths: int [B], ids in each prompt.
            max_new_tokens: new ids at most.

        Raises:
            ValueError: no match fits `max_new_tokens`.
        """
        if self.shortest > (most := check_size("max_new_tokens", max_new_tokens)):
            raise ValueError(
                f"max_new_tokens={most} is too few: the shortest text that matches "
                f"{self.pattern!r} has {self.shortest} ids"
            )
        begin = np.asarray(lengths, np.int32)
        arrays = (_padded(self.next_state), _padded(self.to_end), self.classes)
        return Partial(next_ids, *arrays, begin, np.int32(most))

    def text_of(self, ids: Iterable[int]) -> Iterator[int]:
        """Yield the ids before a stop id."""
        for token in ids:
            if token in self.stop_ids:
                return
            yield token


def _padded(array: np.ndarray) -> np.ndarray:
    """Return an array whose axes are powers of two, so that similar grammars compile once."""
    return np.pad(array, [(0, (1 << (size - 1).bit_length()) - size) for size in array.shape])


def compile_grammar(
    pattern: str, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int] = ()
) -> Grammar:
    """Return the grammar of a regular expression, for the argument `match` of `generate`.

    The text of ids must be the bytes of their tokens, one after another, as in byte-level BPE.
    Special tokens are no text. The latest grammars are kept, so the same one is not compiled again.

    Args:
        pattern: in the syntax of Python's `re`, for all of the text. Not supported are anchors,
            lookaround, backreferences, atomic groups, possessive repetition and the flag `i`.
        tokenizer: the tokenizer of the model.
        vocab_size: of the model.
        stop_ids: ids that end a text; by default, those of the tokenizer.

    Raises:
        ValueError: the pattern is invalid, matches no text of these tokens, or is too large, or no
            id ends a text.

    Example:
        >>> from flaxgpt.tokenizer import CharTokenizer
        >>> grammar = compile_grammar("[ab]{2}c?", CharTokenizer("abc."), 4, stop_ids=[3])
        >>> grammar.shortest
        2
    """
    vocab_size = check_size("vocab_size", vocab_size)
    ends = check_stop_ids(stop_ids, vocab_size)
    ends = ends or tuple(token for token in tokenizer.stop_ids if token < vocab_size)
    if not ends:
        raise ValueError(
            "match needs an id that ends a text, and the tokenizer has none: pass stop_ids, such "
            "as that of a newline, which then is no part of a match"
        )
    compile_once: Any = _compile
    if not isinstance(tokenizer, Hashable):
        compile_once = _compile.__wrapped__
    return compile_once(check_pattern(pattern), tokenizer, vocab_size, ends)


@functools.lru_cache(maxsize=16)
def _compile(pattern: str, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Grammar:
    automaton = byte_automaton(pattern)
    known = text_ids(tokenizer, vocab_size)
    ids = np.arange(vocab_size) if known is None else np.flatnonzero(known)
    silent = {*ends, *tokenizer.special_tokens.values()}
    texts = {id: tokenizer.token_bytes(id) for id in ids.tolist() if id not in silent}
    texts = {id: text for id, text in texts.items() if text}  # others would lead nowhere
    first, token, after, accepting = _token_steps(pattern, automaton, list(texts.values()))
    classes = np.zeros(vocab_size, np.int32)
    classes[list(texts)], columns = _alike(len(accepting), first, token, after, len(texts))
    classes[list(ends)] = 1 + len(columns)

    next_state = np.full((2 + len(accepting), 2 + len(columns)), EXCLUDED, np.int32)
    for column, (before, following) in enumerate(columns, 1):
        next_state[before + 2, column] = following + 2
    # A row that has ended, or that no match begins with, may only end again.
    next_state[np.r_[True, True, accepting], -1] = ENDED
    to_end = _to_end(first + 2, after + 2, np.r_[False, True, accepting])
    if to_end[2] == UNREACHABLE:
        raise ValueError(f"no text of this tokenizer's tokens matches the pattern {pattern!r}")
    return Grammar(pattern, ends, vocab_size, next_state, to_end, classes)


def _token_steps(
    pattern: str, automaton: ByteAutomaton, texts: list[bytes]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return all steps of the automaton by whole tokens, from the states that these lead to.

    Returns:
        The state before each step, the index of the token, the state after it, int32 [N]; and
        whether each state is accepting, bool [S]. States are numbered in the order of discovery.
    """
    longest = max(map(len, texts), default=1)
    lengths = np.array([len(text) for text in texts], np.int64)
    data = np.frombuffer(b"".join(text.ljust(longest, b"\0") for text in texts), np.uint8)
    data = data.reshape(len(texts), longest)
    number = np.full(len(automaton.next_state), -1, np.int32)
    number[0] = 0
    states = np.zeros(1, np.int64)  # of the automaton, by their number here
    done, entries, found = 0, 0, []
    while done < len(states):
        chunk = states[done : done + _CHUNK]
        place, token = np.nonzero(automaton.next_state[chunk][:, data[:, 0]] >= 0)
        running = np.stack([place, token, chunk[place]]).astype(np.int32)
        complete = []
        for depth in range(longest):
            _, token, state = running
            running[2] = automaton.next_state[state, data[token, depth]]
            is_alive, is_last = running[2] >= 0, lengths[token] == depth + 1
            complete.append(running[:, is_alive & is_last])
            running = running[:, is_alive & ~is_last]
        place, token, state = np.concatenate(complete, axis=1)
        new = np.unique(state)
        new = new[number[new] < 0]
        number[new] = len(states) + np.arange(len(new))
        states = np.r_[states, new]
        found.append(np.stack([done + place, token, number[state]]))
        done, entries = done + len(chunk), entries + len(state)
        if entries > _MOST_ENTRIES:
            raise ValueError(
                f"pattern {pattern!r} is too large for a vocabulary of {len(texts)} tokens: use "
                "smaller numbers in {m,n}, or * and +"
            )
    first, token, after = np.concatenate(found, axis=1)
    return first, token, after, automaton.accepting[states]


def _alike(
    states: int, first: np.ndarray, token: np.ndarray, after: np.ndarray, tokens: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the class of each token, from 1 or 0 for none, and the steps of each class."""
    order = np.argsort(token, kind="stable")
    steps = (first.astype(np.int64) * states + after)[order]
    bounds = np.searchsorted(token[order], np.arange(tokens + 1)).tolist()
    known: dict[bytes, int] = {b"": 0}
    classes = np.zeros(tokens, np.int32)
    for i in range(tokens):
        classes[i] = known.setdefault(steps[bounds[i] : bounds[i + 1]].tobytes(), len(known))
    columns = (np.frombuffer(key, np.int64) for key in list(known)[1:])
    return classes, [np.divmod(column, states) for column in columns]


def _to_end(first: np.ndarray, after: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Return the fewest steps from each state to an accepting one, int32 [S]."""
    pairs = np.unique(first.astype(np.int64) * len(accepting) + after)
    first, after = np.divmod(pairs, len(accepting))
    distance = np.where(accepting, 0, UNREACHABLE)
    while True:
        nearer = distance.copy()
        np.minimum.at(nearer, first, np.minimum(distance[after] + 1, UNREACHABLE))
        if (nearer == distance).all():
            return distance.astype(np.int32)
        distance = nearer
