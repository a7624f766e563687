"""Beam search: pure functions of arrays, free of `lax.scan`.

Each row has K running beams, which are continuations with the sum of their log-probabilities. A
step extends each of them by every id. The best K continuations that do not end are the next running
beams. Those among the best K of all that do end, by a stop id or at the last step, are finished.
Their score is the sum over the length to the power of a length penalty, and a row keeps the K best.

The rules are those of `num_beams` in Hugging Face's transformers 5. There, a step takes the best
(1 + number of stop ids) * K candidates, so that K of them go on. Here, stop ids are separate
candidates, which gives the same beams, and no size depends on the number of stop ids.

As in `flaxgpt.generation.decoding`, the model is an argument, and prompts of different lengths are
padded on the left. The prompts are read once, and `KVCache.take` turns their cache into one of K
rows per prompt. In each step it puts the cache into the order of the new beams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flaxgpt.generation.decoding import Plan, Read, Request, last_window, unread_ids
from flaxgpt.generation.sampling import mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """How finished beams are scored, and when a row is done: NumPy scalars on the host."""

    length_penalty: Any  # float32 []
    stop_when_full: Any  # bool [], whether a row is done once it has K finished beams
    look_ahead: Any  # bool [], whether running beams are judged by the length they can reach


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """The finished beams of each row, best first."""

    ids: jax.Array  # int32 [B, K, W], padding, prompt, then new ids
    lengths: jax.Array  # int32 [B, K], new ids, with the stop id
    scores: jax.Array  # float32 [B, K], -inf for none
    nan_at: jax.Array  # int32 [B], the new id whose logits were NaN; -1 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The loop's carry. Before the first new ids, each row has one running beam (R = 1), then K."""

    ids: jax.Array  # int32 [B, R, W], padding, prompt, then new ids; unwritten from `length` on
    sums: jax.Array  # float32 [B, R], log-probabilities of the new ids, best first; -inf for none
    length: jax.Array  # int32 [], entries of `ids` written so far
    start: jax.Array  # int32 [B], the position of each row's first id
    done: jax.Array  # bool [B], rows whose finished beams no longer change
    finished: Finished
    cache: Any  # the model's cache, of B * R rows


class Candidates(NamedTuple):
    """Continuations of running beams by one id, [B, C] each."""

    sums: jax.Array  # float32
    parents: jax.Array  # int32, the running beam
    tokens: jax.Array  # int32

    def best(self, count: int) -> Candidates:
        """Return the `count` best of each row, best first."""
        sums, places = lax.top_k(self.sums, count)
        pick = partial(jnp.take_along_axis, indices=places, axis=1)
        return Candidates(sums, pick(self.parents), pick(self.tokens))

    def join(self, other: Candidates) -> Candidates:
        """Return the candidates of both."""
        return Candidates(
            *(jnp.concatenate(pair, axis=1) for pair in zip(self, other, strict=True))
        )


def search(
    read: Read,
    plan: Plan,
    beams: int,
    request: Request,
    rules: Rules,
    ids: jax.Array,  # int32 [B, prompt_width], `request.prompt_length` ids, padded on the left
    start: jax.Array,  # int32 [B], where each row begins
    cache: Any,  # the model's, of B rows, empty or with what `request.unread` follows
) -> Finished:
    """Return the best finished beams of each row.

    Args:
        read: the model's reading function, whose caches also have a method `take(rows)`.
        plan: the sizes of the loop.
        beams: the number of beams (K), at most the number of ids that may be chosen.
        request: the options of the loop; temperature, top-k, top-p and key do not matter.
        rules: the options of the search.
        ids: the prompts.
        start: where they begin.
        cache: where keys and values are kept.
    """
    step = partial(_step, read, beams, request, rules)

    def extend(state: BeamState) -> BeamState:
        flat = state.ids.reshape(-1, plan.width)
        return step(state, lax.dynamic_slice_in_dim(flat, state.length - 1, 1, axis=1), 0)

    def move_window(state: BeamState) -> BeamState:
        flat, starts = state.ids.reshape(-1, plan.width), jnp.repeat(state.start, beams)
        _, window, starts = last_window(plan.context_length, flat, state.length, starts)
        emptied = dataclasses.replace(state.cache.rewind(0), start=starts)
        state = dataclasses.replace(state, cache=emptied)
        return step(state, window, plan.context_length - 1)

    def run(
        body: Callable[[BeamState], BeamState], limit: ArrayLike, state: BeamState
    ) -> BeamState:
        def unfinished(state: BeamState) -> jax.Array:
            return (state.length < limit) & ~state.done.all()

        return lax.while_loop(unfinished, body, state)

    state = _initial(plan, beams, request, ids, start, cache)
    state = step(state, *unread_ids(request, ids, cache))
    # Slots after the prompts hold padding, which the next ids overwrite.
    state = dataclasses.replace(state, cache=state.cache.rewind(state.length - 1))
    state = run(extend, jnp.minimum(request.final_length, plan.context_length + 1), state)
    state = run(move_window, request.final_length, state) if plan.exceeds_context else state
    return state.finished


def _initial(
    plan: Plan, beams: int, request: Request, ids: jax.Array, start: jax.Array, cache: Any
) -> BeamState:
    batch = ids.shape[0]
    done = jnp.zeros(batch, bool) if request.rows is None else jnp.arange(batch) >= request.rows
    return BeamState(
        ids=jnp.zeros((batch, 1, plan.width), jnp.int32).at[:, 0, : plan.prompt_width].set(ids),
        sums=jnp.zeros((batch, 1), jnp.float32),
        length=jnp.asarray(request.prompt_length, jnp.int32),
        start=start,
        done=done,
        finished=Finished(
            ids=jnp.zeros((batch, beams, plan.width), jnp.int32),
            lengths=jnp.zeros((batch, beams), jnp.int32),
            scores=jnp.full((batch, beams), -jnp.inf, jnp.float32),
            nan_at=jnp.full(batch, -1, jnp.int32),
        ),
        cache=dataclasses.replace(cache, start=start),
    )


def _step(
    read: Read,
    beams: int,
    request: Request,
    rules: Rules,
    state: BeamState,
    unread: jax.Array,  # int32 [B*R, T]: the ids that the cache lacks
    last: ArrayLike,  # int32 []: which of them the next id follows
) -> BeamState:
    logits, cache = read(unread, last, state.cache)
    # Masked afterwards, so that the sums are the model's log-probabilities.
    log_probs = mask(jax.nn.log_softmax(logits, axis=-1), request.allowed)
    going, best = _continuations(beams, request, state.sums, log_probs)
    count = state.length - request.prompt_length  # new ids before this one
    is_nan = jnp.isnan(log_probs).reshape(len(state.done), -1).any(axis=-1) & ~state.done
    finished = _finish(request, rules, state, best)
    finished = dataclasses.replace(finished, nan_at=jnp.where(is_nan, count, finished.nan_at))

    total = jnp.asarray(request.final_length - request.prompt_length, jnp.int32)
    reached = jnp.where(rules.look_ahead, total, count + 1)
    attainable = going.sums[:, 0] / _norm(reached, rules)
    worst = finished.scores.min(axis=-1)
    is_full = rules.stop_when_full & jnp.isfinite(worst)

    batch, parents = state.sums.shape
    rows = going.parents + parents * jnp.arange(batch, dtype=jnp.int32)[:, None]
    return BeamState(
        ids=_extended(state, going),
        sums=going.sums,
        length=state.length + 1,
        start=state.start,
        done=state.done | is_nan | is_full | ~(attainable > worst),
        finished=finished,
        cache=cache.take(rows.reshape(-1)),
    )


def _continuations(
    beams: int,
    request: Request,
    sums: jax.Array,  # float32 [B, R]
    log_probs: jax.Array,  # float32 [B*R, V]
) -> tuple[Candidates, Candidates]:
    """Return the best K continuations that do not end with a stop id, and the best K of all."""
    batch, parents = sums.shape
    vocabulary, stops = log_probs.shape[-1], jnp.asarray(request.stop_ids)
    totals = sums.reshape(-1, 1) + log_probs

    def candidates(sums: jax.Array, tokens: jax.Array) -> Candidates:
        each = jnp.repeat(jnp.arange(parents, dtype=jnp.int32), sums.shape[-1])
        each = jnp.broadcast_to(each, (batch, each.size))
        return Candidates(sums.reshape(batch, -1), each, tokens.reshape(batch, -1))

    is_stop = (jnp.arange(vocabulary)[:, None] == stops[None]).any(axis=-1)
    # First the best of each beam, because a row of all beams would be too long to sort.
    going = candidates(*lax.top_k(jnp.where(is_stop[None], -jnp.inf, totals), beams)).best(beams)
    ends = totals.at[:, stops].get(mode="clip")  # unused entries of `stops` are negative
    ends = jnp.where(stops[None] >= 0, ends, -jnp.inf)
    ending = candidates(ends, jnp.broadcast_to(stops, ends.shape))
    return going, going.join(ending).best(beams)


def _finish(request: Request, rules: Rules, state: BeamState, best: Candidates) -> Finished:
    """Return the finished beams with those of the candidates that end and are better."""
    old, beams = state.finished, best.sums.shape[-1]
    count = state.length + 1 - request.prompt_length
    is_stop = (best.tokens[..., None] == jnp.asarray(request.stop_ids)[None, None]).any(axis=-1)
    ends = (is_stop | (state.length + 1 >= request.final_length)) & ~state.done[:, None]
    new = jnp.where(ends, best.sums / _norm(count, rules), -jnp.inf)
    scores, places = lax.top_k(jnp.concatenate([old.scores, new], axis=1), beams)

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, places.reshape(*places.shape, *[1] * (both.ndim - 2)), 1)

    return Finished(
        ids=pick(old.ids, _extended(state, best)),
        lengths=pick(old.lengths, jnp.full_like(old.lengths, count)),
        scores=scores,
        nan_at=old.nan_at,
    )


def _extended(state: BeamState, chosen: Candidates) -> jax.Array:
    """Return the ids of candidates, int32 [B, C, W]."""
    ids = jnp.take_along_axis(state.ids, chosen.parents[..., None], axis=1)
    return lax.dynamic_update_slice_in_dim(ids, chosen.tokens[..., None], state.length, axis=2)


def _norm(length: jax.Array, rules: Rules) -> jax.Array:
    return length.astype(jnp.float32) ** rules.length_penalty
