"""The decoding step and the loop around it: pure functions of arrays, free of `lax.scan`.

A step has two halves. Reading runs new ids through a model: ids and cache in, logits and cache out.
Choosing turns logits into the next id of each row. The reading function is an argument, so the loop
knows no model, and a test can drive it with a fake one.

There are three phases, which differ only in the ids that are read:

    prefill       all prompts at once, which fills the cache and chooses the first new id
    extend_step   the latest id, until `context_length` ids have been read
    window_step   the last `context_length` ids, positions counted from 0, as the book's
                  `generate_text_simple` crops: no cached key survives, so each id costs a full pass

`decode` runs them in `lax.while_loop`s inside one jit. `flaxgpt.generation.stream` runs them from
Python, one jitted call per id with the state donated. Prompts of different lengths are padded on
the left, so that all rows write to the same slot:

    slot      0   1   2   3   4   5 ...
    row 0     a   b   c   d   .   .        start 0      . filled by the loop
    row 1     -   -   e   f   .   .        start 2      - padding, invisible to attention
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flaxgpt.generation.sampling import NOT_A_NUMBER, sample


class Cache(Protocol):
    """What the loop needs to know about a model's cache, a pytree."""

    @property
    def start(self) -> jax.Array:
        """int32 [B], the first slot that belongs to each row."""
        ...

    def rewind(self, length: ArrayLike) -> Self:
        """Return the cache as it was when `length` slots were filled."""
        ...


Read = Callable[[jax.Array, ArrayLike, Any], tuple[jax.Array, Any]]
"""`read(ids, last, cache)` returns the logits float32 [B, V] that follow `ids[:, last]`, and the
cache extended by all of the ids, int32 [B, T]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """The traced inputs of the loop: NumPy scalars on the host, so that no value recompiles.

    Attributes:
        key: random keys [B], one per row, or one key [], from which row i uses `fold_in(key, i)`.
        temperature: float32 [].
        top_k: int32 [].
        top_p: float32 [].
        stop_ids: int32 [K], ids that end a row; unused entries hold NOT_A_NUMBER.
        prompt_length: int32 [], ids in the longest prompt.
        final_length: int32 [], `prompt_length` plus the number of new ids.
    """

    key: jax.Array
    temperature: Any
    top_k: Any
    top_p: Any
    stop_ids: Any
    prompt_length: Any
    final_length: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The loop's carry.

    Attributes:
        ids: int32 [B, W], padding, prompt, then new ids; entries from `length` on are unwritten.
        length: int32 [], entries of `ids` written so far, one more than the cache has read.
        start: int32 [B], the position of each row's first id.
        done: bool [B], rows that have met a stop id.
        cache: the model's cache of `ids[:, :length - 1]`.
    """

    ids: jax.Array
    length: jax.Array
    start: jax.Array
    done: jax.Array
    cache: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static sizes of the loop, which a compilation depends on.

    Attributes:
        prompt_width: columns for the prompts.
        width: columns for prompts and new ids together (W).
        context_length: ids that the model can read at once.
        exceeds_context: whether the ids can outgrow the context.
    """

    prompt_width: int
    width: int
    context_length: int
    exceeds_context: bool


def decode(
    read: Read, plan: Plan, request: Request, ids: jax.Array, start: jax.Array, cache: Cache
) -> jax.Array:
    """Return the prompts followed by new ids up to `request.final_length`.

    Args:
        read: the model; see `Read`.
        plan: static sizes.
        request: what to sample, and when to stop.
        ids: int32 [B, prompt_width], rows of `request.prompt_length` ids, padded on the left.
        start: int32 [B], where each row begins.
        cache: the model's empty cache.

    Returns:
        int32 [B, W].
    """

    def unfinished(limit: ArrayLike, state: DecodeState) -> jax.Array:
        return (state.length < limit) & ~state.done.all()

    def next_state(step: Any, state: DecodeState) -> DecodeState:
        return step(read, plan, request, state)[0]

    state, _ = prefill(read, plan, request, ids, start, cache)
    full = jnp.minimum(request.final_length, plan.context_length + 1)
    state = lax.while_loop(partial(unfinished, full), partial(next_state, extend_step), state)
    if plan.exceeds_context:
        rest = partial(unfinished, request.final_length)
        state = lax.while_loop(rest, partial(next_state, window_step), state)
    return state.ids


def prefill(
    read: Read, plan: Plan, request: Request, ids: jax.Array, start: jax.Array, cache: Any
) -> tuple[DecodeState, jax.Array]:
    """Return the state after the prompts and the first new ids, int32 [B]; see `decode`."""
    batch = ids.shape[0]
    state = DecodeState(
        ids=jnp.zeros((batch, plan.width), jnp.int32).at[:, : plan.prompt_width].set(ids),
        length=jnp.asarray(request.prompt_length, jnp.int32),
        start=start,
        done=jnp.zeros(batch, bool),
        cache=dataclasses.replace(cache, start=start),
    )
    state, new = _step(read, request, state, ids, request.prompt_length - 1)
    # Slots after the prompts hold padding, which the next ids overwrite.
    rewound = state.cache.rewind(state.length - 1)
    return dataclasses.replace(state, cache=rewound), new


def extend_step(
    read: Read, plan: Plan, request: Request, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
    """Return the state with one more id, and that id, int32 [B], within the context."""
    latest = lax.dynamic_slice_in_dim(state.ids, state.length - 1, 1, axis=1)
    return _step(read, request, state, latest, 0)


def window_step(
    read: Read, plan: Plan, request: Request, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
    """Return the state with one more id, and that id, int32 [B], past the end of the context."""
    first = state.length - plan.context_length
    window = lax.dynamic_slice_in_dim(state.ids, first, plan.context_length, axis=1)
    start = jnp.maximum(state.start - first, 0)
    emptied = dataclasses.replace(state.cache.rewind(0), start=start)
    state = dataclasses.replace(state, cache=emptied)
    return _step(read, request, state, window, plan.context_length - 1)


def keep_last_window(
    plan: Plan, request: Request, state: DecodeState
) -> tuple[DecodeState, Request]:
    """Return the state with only the last context of its ids, to free the other columns."""
    first = state.length - plan.context_length
    window = lax.dynamic_slice_in_dim(state.ids, first, plan.context_length, axis=1)
    state = dataclasses.replace(
        state,
        ids=jnp.zeros_like(state.ids).at[:, : plan.context_length].set(window),
        length=jnp.full_like(state.length, plan.context_length),
        start=jnp.maximum(state.start - first, 0),
    )
    # New ids are counted from the end of the prompt, which has moved too.
    return state, dataclasses.replace(request, prompt_length=request.prompt_length - first)


def _step(
    read: Read,
    request: Request,
    state: DecodeState,
    unread: jax.Array,  # int32 [B, T]: the ids that the cache lacks
    last: ArrayLike,  # int32 []: which of them the next id follows
) -> tuple[DecodeState, jax.Array]:
    logits, cache = read(unread, last, state.cache)
    new = choose(logits, request, state.length - request.prompt_length)
    ended = (new[:, None] == request.stop_ids[None]).any(axis=-1) | (new == NOT_A_NUMBER)
    state = DecodeState(
        ids=lax.dynamic_update_slice_in_dim(state.ids, new[:, None], state.length, axis=1),
        length=state.length + 1,
        start=state.start,
        done=state.done | ended,
        cache=cache,
    )
    return state, new


def choose(logits: jax.Array, request: Request, count: jax.Array) -> jax.Array:
    """Return the next id of each row, int32 [B].

    Args:
        logits: float32 [B, V].
        request: how to sample.
        count: int32 [], new ids chosen before this one; folded into the keys.
    """
    keys = request.key
    if keys.ndim == 0:
        keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(logits.shape[0]))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
    return sample(logits, keys, request.temperature, request.top_k, request.top_p)
