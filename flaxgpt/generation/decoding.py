"""The decoding step and the loop around it: pure functions of arrays, free of `lax.scan`.

A step has two halves. Reading runs new ids through a model: ids and cache in, logits and cache out.
Choosing turns logits into the next id of each row. The reading function is an argument, so the loop
knows no model, and a test can drive it with a fake one.

There are three phases, which differ only in the ids that are read:

    prefill       all prompts at once, which fills the cache and chooses the first new id
    extend_step   the latest id, until `context_length` ids have been read
    window_step   the last `context_length` ids, positions counted from 0, as the book's
                  `generate_text_simple` crops: no cached key survives, so each id costs a full pass

With `Plan.window_step` n, a window has n - 1 fewer ids, and n - 1 steps extend it.

`decode` runs them in `lax.while_loop`s inside one jit. `flaxgpt.generation.stream` runs them from
Python, one jitted call per id with the state donated. Prompts of different lengths are padded on
the left, so that all rows write to the same slot:

    slot      0   1   2   3   4   5 ...
    row 0     a   b   c   d   .   .        start 0      . filled by the loop
    row 1     -   -   e   f   .   .        start 2      - padding, invisible to attention

The cache may begin with ids that all prompts have in common: they were read before, and are placed
where each row begins. Then the prefill reads `Request.unread`, the columns that follow in the
longest prompt. In shorter ones, they include ids that the cache has: these get the same keys again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flaxgpt.cache import as_column
from flaxgpt.generation.log_probs import Scores, no_scores, record
from flaxgpt.generation.sampling import NOT_A_NUMBER, mask, sample

Read = Callable[[jax.Array, ArrayLike, Any], tuple[jax.Array, Any]]
"""`read(ids, last, cache)` returns the logits float32 [B, V] that follow `ids[:, last]`, and the
cache extended by all of the ids, int32 [B, T]. Like `KVCache`, a cache is a dataclass with a field
`start`, int32 [B], and a method `rewind(length)`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """The traced inputs of the loop: NumPy scalars on the host, so that no value recompiles."""

    key: jax.Array  # keys [B], one per row, or one key [], from which row i uses `fold_in(key, i)`
    temperature: Any  # float32 []
    top_k: Any  # int32 []
    top_p: Any  # float32 []
    stop_ids: Any  # int32 [K], ids that end a row; unused entries hold NOT_A_NUMBER
    prompt_length: Any  # int32 [], ids in the longest prompt
    final_length: Any  # int32 [], `prompt_length` plus the number of new ids
    allowed: Any = None  # bool [V], the ids that may be chosen; None for all
    rows: Any = None  # int32 [], rows that count, the others being copies; None for all
    prefix: Any = None  # a cache of one row, with what all prompts begin with; None for nothing
    unread: Any = None  # int32 [B, T], the columns of the prompts that follow in the cache, if any
    logits_fn: Any = None  # `jax.tree_util.Partial`, see `flaxgpt.generation.hooks`; None for none
    patches: Any = None  # {name: `jax.tree_util.Partial`} for the reading function; None for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The loop's carry."""

    ids: jax.Array  # int32 [B, W], padding, prompt, then new ids; unwritten from `length` on
    # int32 [], entries of `ids` written so far, one more than the cache has read; while drafts are
    # verified, int32 [B], those of each row
    length: jax.Array
    start: jax.Array  # int32 [B], the position of each row's first id
    done: jax.Array  # bool [B], rows that have met a stop id
    cache: Any  # the model's cache of `ids[:, :length - 1]`
    scores: Scores | None = None  # of the new ids, if they are wanted


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static sizes of the loop, which a compilation depends on."""

    prompt_width: int  # columns for the prompts
    width: int  # columns for prompts and new ids together (W)
    context_length: int  # ids that the model can read at once
    exceeds_context: bool  # whether the ids can outgrow the context
    alternatives: int | None = None  # ids to record beside each new one's log-probability, or none
    window_step: int = 1  # ids per window that is read past the end of the context
    samples: int = 1  # rows that continue each prompt

    @property
    def window(self) -> int:
        """Ids in a window: so many that all but the last of its new ids fit the context too."""
        return self.context_length - self.window_step + 1


def decode(
    read: Read,
    plan: Plan,
    request: Request,
    ids: jax.Array,  # int32 [B, prompt_width], `request.prompt_length` ids, padded on the left
    start: jax.Array,  # int32 [B], where each row begins
    cache: Any,  # the model's, empty or with what `request.unread` follows
) -> Any:  # int32 [B, W], and with `plan.alternatives` also `Scores`
    """Return the prompts followed by new ids up to `request.final_length`.

    With `plan.samples` n, the result has n rows for each prompt, one after another.
    """
    state = last_state(read, plan, request, ids, start, cache)
    return state.ids if state.scores is None else (state.ids, state.scores)


def last_state(
    read: Read, plan: Plan, request: Request, ids: jax.Array, start: jax.Array, cache: Any
) -> DecodeState:
    """Return the state after the last new id; see `decode`."""
    state, _ = prefill(read, plan, request, ids, start, cache)
    limit = jnp.minimum(request.final_length, plan.context_length + 1)
    state = _run(extend_step, read, plan, request, limit, state)
    return decode_past_context(read, plan, request, state)


def decode_past_context(
    read: Read, plan: Plan, request: Request, state: DecodeState
) -> DecodeState:
    """Return the state with all ids, from one whose cache has read a context or that is done."""
    run = partial(_run, read=read, plan=plan, request=request)
    if plan.exceeds_context and plan.window_step == 1:
        state = run(window_step, limit=request.final_length, state=state)
    elif plan.exceeds_context:

        def read_window(*arguments: Any) -> tuple[DecodeState, Any]:
            state, _ = window_step(*arguments)
            more = jnp.minimum(request.final_length, state.length + plan.window_step - 1)
            return run(extend_step, limit=more, state=state), None

        state = run(read_window, limit=request.final_length, state=state)
    return state


def _run(
    step: Callable[..., Any],
    read: Read,
    plan: Plan,
    request: Request,
    limit: ArrayLike,
    state: DecodeState,
) -> DecodeState:
    """Return the state after as many steps as it takes to have `limit` ids."""

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.length < limit) & ~state.done.all()

    return lax.while_loop(unfinished, lambda old: step(read, plan, request, old)[0], state)


def prefill(
    read: Read, plan: Plan, request: Request, ids: jax.Array, start: jax.Array, cache: Any
) -> tuple[DecodeState, jax.Array]:
    """Return the state after the prompts and the first new ids, int32 [B]; see `decode`."""
    unread, last = unread_ids(request, ids, cache)
    cache = dataclasses.replace(cache, start=start)
    if plan.samples > 1:
        read, ids, start = _repeated(plan.samples, read, ids, start)
    batch = ids.shape[0]
    done = jnp.zeros(batch, bool) if request.rows is None else jnp.arange(batch) >= request.rows
    state = DecodeState(
        ids=jnp.zeros((batch, plan.width), jnp.int32).at[:, : plan.prompt_width].set(ids),
        length=jnp.asarray(request.prompt_length, jnp.int32),
        start=start,
        done=done,
        cache=cache,
        scores=no_scores(batch, plan.width, plan.alternatives)
        if plan.alternatives is not None
        else None,
    )
    state, new = _step(read, request, state, unread, last)
    # Slots after the prompts hold padding, which the next ids overwrite.
    rewound = state.cache.rewind(state.length - 1)
    return dataclasses.replace(state, cache=rewound), new


def unread_ids(request: Request, ids: jax.Array, cache: Any) -> tuple[jax.Array, ArrayLike]:
    """Return the ids of the prompts that the cache lacks, and which of them is the last."""
    last = request.prompt_length - 1
    return (ids, last) if request.unread is None else (request.unread, last - cache.length)


def _repeated(
    samples: int, read: Read, ids: jax.Array, start: jax.Array
) -> tuple[Read, jax.Array, jax.Array]:
    """Return a function that reads prompts once for several rows each, and ids of these rows."""

    def read_once(unread: jax.Array, last: ArrayLike, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = read(unread, last, cache)
        return jnp.repeat(logits, samples, axis=0), cache.repeat(samples)

    return read_once, jnp.repeat(ids, samples, axis=0), jnp.repeat(start, samples)


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
    _, window, start = last_window(plan.window, state.ids, state.length, state.start)
    emptied = dataclasses.replace(state.cache.rewind(0), start=start)
    state = dataclasses.replace(state, cache=emptied)
    return _step(read, request, state, window, plan.window - 1)


def keep_last_window(
    plan: Plan, request: Request, state: DecodeState
) -> tuple[DecodeState, Request]:
    """Return the state with only the last context of its ids, to free the other columns."""
    size = plan.context_length
    first, window, start = last_window(size, state.ids, state.length, state.start)
    state = dataclasses.replace(
        state,
        ids=jnp.zeros_like(state.ids).at[:, :size].set(window),
        length=jnp.full_like(state.length, size),
        start=start,
    )
    # New ids are counted from the end of the prompt, which has moved too.
    return state, dataclasses.replace(request, prompt_length=request.prompt_length - first)


def last_window(
    size: int, ids: jax.Array, length: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return where the last `size` ids begin, these ids, and where rows begin in them."""
    first = length - size
    window = lax.dynamic_slice_in_dim(ids, first, size, axis=1)
    return first, window, jnp.maximum(start - first, 0)


def _step(
    read: Read,
    request: Request,
    state: DecodeState,
    unread: jax.Array,  # int32 [B, T]: the ids that the cache lacks
    last: ArrayLike,  # int32 []: which of them the next id follows
) -> tuple[DecodeState, jax.Array]:
    logits, cache = read(unread, last, state.cache)
    new, ended = next_ids(request, state, logits)
    ids = lax.dynamic_update_slice_in_dim(state.ids, new[:, None], state.length, axis=1)
    scores = state.scores
    if scores is not None:
        scores = record(scores, logits, new, state.length)
    return DecodeState(ids, state.length + 1, state.start, state.done | ended, cache, scores), new


def next_ids(
    request: Request, state: DecodeState, logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the id that follows each row's text, int32 [B], and whether it ends the row."""
    eligible = logits
    if request.logits_fn is not None:
        eligible = _hooked(request, state, logits)
    new = choose(eligible, request, state.length - request.prompt_length)
    ended = (new[:, None] == request.stop_ids[None]).any(axis=-1) | (new == NOT_A_NUMBER)
    return new, ended


def _hooked(request: Request, state: DecodeState, logits: jax.Array) -> jax.Array:
    """Return the logits that the hook makes of these; NaN for a row without an id to choose."""
    ids, length = texts(state.ids, state.start, state.length)
    # A filter in the hook then counts allowed ids only.
    changed = request.logits_fn(ids, length, mask(logits, request.allowed))
    if not isinstance(changed, jax.Array) or changed.shape != logits.shape:
        raise ValueError(
            f"logits_fn must return logits of shape {logits.shape}, as it gets them, but returned "
            f"{getattr(changed, 'shape', changed)}"
        )
    changed = mask(changed.astype(logits.dtype), request.allowed)
    return jnp.where((changed == -jnp.inf).all(axis=-1, keepdims=True), jnp.nan, changed)


def texts(ids: jax.Array, start: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the ids of each row from its first column on, then -1, and how many they are, [B]."""
    columns = jnp.arange(ids.shape[1], dtype=jnp.int32)[None] + start[:, None]
    own = jnp.take_along_axis(ids, jnp.minimum(columns, ids.shape[1] - 1), axis=1)
    return jnp.where(columns < as_column(length), own, -1), length - start


def choose(logits: jax.Array, request: Request, count: jax.Array) -> jax.Array:
    """Return the next id of each row, int32 [B], for logits [B, V], after `count` new ids.

    The count is one number, or one per row.
    """
    keys = request.key
    if keys.ndim == 0:
        keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(logits.shape[0]))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, 0 if count.ndim else None))(keys, count)
    logits = mask(logits, request.allowed)
    return sample(logits, keys, request.temperature, request.top_k, request.top_p)
