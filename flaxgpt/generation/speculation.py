"""The decoding loop that verifies several drafted ids at once: pure, free of `lax.scan`.

A draft is a guess of the next K ids of a row. The model reads the latest id and the draft together,
which is faster than one by one, and gives the logits after each of them. From these, ids are
chosen one after another by the function of the plain loop, with the same key for each. As long as
the chosen id is the drafted one, the logits that follow are those of the row's text, and the next
id is chosen too. The first one that differs is a new id like any other, and the rest of the draft
is dropped. A step yields between 1 and K + 1 ids.

So the ids are those of the plain loop with the same key, whatever the drafts are. Hooks, filters
and log-probabilities see the same text. For drafts that are not random, such as those of prompt
lookup, this is the rejection rule of Leviathan et al. 2023 and Chen et al. 2023: an id is accepted
with the probability that the model gives it, and otherwise another one is drawn from the rest.

Rows accept different numbers of ids, so each has its own length. `KVCache.rewind` drops what was
read of rejected ids, and later ids overwrite it. Past the context, where every id takes a full
pass, all rows have the same length again, and the plain loop continues.

A step in which no row has a draft is a plain one. Where drafts fail, the loop pauses them for twice
as many steps each time, because a step is longer with them. Where a row gains one id or more on
average, the pause gets half as long, and where it gains half of the draft or more, it ends. All
rows pause together, because one draft makes the step longer for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxgpt.generation import decoding
from flaxgpt.generation.decoding import DecodeState, Plan, Read, Request
from flaxgpt.generation.log_probs import no_scores, record

LONGEST_PAUSE = 32  # steps without drafts, where none is accepted

ReadAll = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
"""`read_all(ids, cache)` returns the logits float32 [B, T, V] that follow each of the ids, and the
cache extended by them, int32 [B, T]."""

Propose = Callable[[DecodeState, Any, jax.Array], tuple[jax.Array, Any]]
"""`propose(text, memory, wanted)` returns a draft for each row, int32 [B, K] with -1 for none, and
what it remembers between calls. If `wanted`, bool [], is False, the draft does not matter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the steps after the prompts were."""

    plain: jax.Array  # int32 [], steps that read one id per row
    verifying: jax.Array  # int32 [], steps that read a draft too
    accepted: jax.Array  # int32 [B], drafted ids that were chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculativeState:
    """The loop's carry."""

    text: DecodeState  # with a length per row
    draft: jax.Array  # int32 [B, K], for the next step; -1 for none
    memory: Any  # of `propose`
    wait: jax.Array  # int32 [], steps without drafts from here
    pause: jax.Array  # int32 [], steps without drafts after the last one
    counts: Counts

    @property
    def has_draft(self) -> jax.Array:
        """Whether any row has a draft, bool []."""
        return (self.draft >= 0).any()


@dataclasses.dataclass(frozen=True)
class Speculation:
    """The functions of the loop: those of the model, and that of the drafts."""

    read: Read
    read_all: ReadAll
    propose: Propose
    size: int  # ids in a draft (K)


def decode(
    functions: Speculation,
    plan: Plan,
    request: Request,
    ids: jax.Array,  # int32 [B, prompt_width], `request.prompt_length` ids, padded on the left
    start: jax.Array,  # int32 [B], where each row begins
    cache: Any,  # the model's, as in the plain loop, with K + 1 slots more than `columns(plan)`
    memory: Any,  # of `functions.propose`, with a row per row of the loop
) -> tuple[Any, Counts]:
    """Return what `flaxgpt.generation.decoding.decode` returns, and what the steps were."""
    state, _ = prefill(functions, plan, request, ids, start, cache, memory)

    def with_drafts(state: SpeculativeState) -> SpeculativeState:
        state = lax.while_loop(
            lambda state: is_unfinished(plan, request, state.text) & ~state.has_draft,
            lambda state: plain_step(functions, plan, request, state),
            state,
        )
        return lax.while_loop(
            lambda state: state.has_draft,
            lambda state: verifying_step(functions, plan, request, state),
            state,
        )

    # Two loops instead of a condition, through which XLA would copy the cache.
    state = lax.while_loop(
        lambda state: is_unfinished(plan, request, state.text), with_drafts, state
    )
    text = without_drafts(plan, request, state)
    text = decoding.decode_past_context(functions.read, plan, request, text)
    return (text.ids if text.scores is None else (text.ids, text.scores)), state.counts


def columns(plan: Plan) -> int:
    """Return the most ids that a row can have while drafts are still verified."""
    return min(plan.width, plan.context_length + 1)


def prefill(
    functions: Speculation,
    plan: Plan,
    request: Request,
    ids: jax.Array,
    start: jax.Array,
    cache: Any,
    memory: Any,
) -> tuple[SpeculativeState, jax.Array]:
    """Return the state after the prompts and the first new ids, int32 [B]; see `decode`."""
    narrow = dataclasses.replace(plan, width=columns(plan))
    text, new = decoding.prefill(functions.read, narrow, request, ids, start, cache)
    text = _with_lengths(text, jnp.full_like(text.start, text.length))
    zero = jnp.zeros((), jnp.int32)
    state = SpeculativeState(
        text=text,
        draft=jnp.full((len(text.ids), functions.size), -1, jnp.int32),
        memory=memory,
        wait=zero,
        pause=zero,
        counts=Counts(zero, zero, jnp.zeros_like(text.start)),
    )
    return _with_draft(functions, plan, request, state), new


def plain_step(
    functions: Speculation, plan: Plan, request: Request, state: SpeculativeState
) -> SpeculativeState:
    """Return the state with one more id in each unfinished row."""
    text = state.text
    logits, cache = functions.read(latest(text), 0, text.cache)
    text, _ = append(request, text, logits, unfinished_rows(plan, request, text))
    text = _with_lengths(dataclasses.replace(text, cache=cache), text.length)
    counts = dataclasses.replace(state.counts, plain=state.counts.plain + 1)
    wait = jnp.maximum(state.wait - 1, 0)
    state = dataclasses.replace(state, text=text, counts=counts, wait=wait)
    return _with_draft(functions, plan, request, state)


def verifying_step(
    functions: Speculation, plan: Plan, request: Request, state: SpeculativeState
) -> SpeculativeState:
    """Return the state with 1 to K + 1 more ids in each unfinished row."""
    text, size = state.text, functions.size
    unread = jnp.concatenate([latest(text), jnp.maximum(state.draft, 0)], axis=1)
    logits, cache = functions.read_all(unread, text.cache)
    drafted = jnp.pad(state.draft, ((0, 0), (0, 1)), constant_values=-1)
    live = unfinished_rows(plan, request, text)

    def choose(
        carry: tuple[DecodeState, jax.Array, jax.Array, jax.Array],
    ) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
        text, place, live, accepted = carry
        following = lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False)
        text, new = append(request, text, following, live)
        guess = lax.dynamic_index_in_dim(drafted, place, axis=1, keepdims=False)
        is_right = live & (new == guess) & (guess >= 0)
        live = is_right & unfinished_rows(plan, request, text)
        return text, place + 1, live, accepted + is_right.astype(jnp.int32)

    chosen = dataclasses.replace(text, cache=None)
    initial = (chosen, jnp.zeros((), jnp.int32), live, jnp.zeros_like(text.length))
    chosen, _, _, accepted = lax.while_loop(lambda carry: carry[2].any(), choose, initial)
    text = _with_lengths(dataclasses.replace(chosen, cache=cache), chosen.length)

    gain, rows = accepted.sum(), live.sum()
    longer = jnp.clip(2 * state.pause, 1, LONGEST_PAUSE)
    shorter = jnp.where(2 * gain < size * rows, state.pause // 2, 0)
    pause = jnp.where(gain < rows, longer, shorter)
    counts = dataclasses.replace(
        state.counts,
        verifying=state.counts.verifying + 1,
        accepted=state.counts.accepted + accepted,
    )
    state = dataclasses.replace(state, text=text, counts=counts, wait=pause, pause=pause)
    return _with_draft(functions, plan, request, state)


def without_drafts(plan: Plan, request: Request, state: SpeculativeState) -> DecodeState:
    """Return the state from which the plain loop continues, past the context."""
    text = state.text
    more = plan.width - columns(plan)

    def widen(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))

    return dataclasses.replace(
        text,
        ids=widen(text.ids),
        length=_limit(plan, request),
        cache=text.cache.rewind(0),  # a window begins with an empty one
        scores=jax.tree.map(widen, text.scores),
    )


def is_unfinished(plan: Plan, request: Request, text: DecodeState) -> jax.Array:
    """Return whether any row needs more ids before the end of the context, bool []."""
    return unfinished_rows(plan, request, text).any()


def unfinished_rows(plan: Plan, request: Request, text: DecodeState) -> jax.Array:
    """Return which rows need more ids before the end of the context, bool [B]."""
    return (text.length < _limit(plan, request)) & ~text.done


def latest(text: DecodeState) -> jax.Array:
    """Return the last id of each row, int32 [B, 1]."""
    return jnp.take_along_axis(text.ids, text.length[:, None] - 1, axis=1)


def append(
    request: Request,
    text: DecodeState,
    logits: jax.Array,  # float32 [B, V], those that follow each text
    live: jax.Array,  # bool [B], rows that get an id
) -> tuple[DecodeState, jax.Array]:
    """Return the texts with one more id, and that id of each row, int32 [B]."""
    new, ended = decoding.next_ids(request, text, logits)
    numbers = jnp.arange(text.ids.shape[1], dtype=jnp.int32)[None]
    here = (numbers == text.length[:, None]) & live[:, None]

    def write(old: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(here.reshape(*here.shape, *[1] * (old.ndim - 2)), value, old)

    scores = text.scores
    if scores is not None:
        one = no_scores(len(new), 1, scores.top.shape[-1])
        one = record(one, logits, new, jnp.zeros((), jnp.int32))
        scores = jax.tree.map(write, scores, one)
    text = dataclasses.replace(
        text,
        ids=write(text.ids, new[:, None]),
        length=text.length + live.astype(jnp.int32),
        done=text.done | (live & ended),
        scores=scores,
    )
    return text, new


def _limit(plan: Plan, request: Request) -> jax.Array:
    return jnp.minimum(jnp.asarray(request.final_length, jnp.int32), plan.context_length + 1)


def _with_lengths(text: DecodeState, length: jax.Array) -> DecodeState:
    """Return the state with these lengths, [B], and a cache of all ids but the last."""
    return dataclasses.replace(text, length=length, cache=text.cache.rewind(length - 1))


def _with_draft(
    functions: Speculation, plan: Plan, request: Request, state: SpeculativeState
) -> SpeculativeState:
    """Return the state with the draft for the next step."""
    live = unfinished_rows(plan, request, state.text)
    wanted = live.any() & (state.wait == 0)
    draft, memory = functions.propose(state.text, state.memory, wanted)
    draft = jnp.where(wanted & live[:, None], draft, -1)
    return dataclasses.replace(state, draft=draft, memory=memory)
