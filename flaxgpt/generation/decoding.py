"""The decoding step and the loop around it: pure functions of arrays, no `lax.scan`.

Three phases, each the same `_advance` over other ids:

    prefill     the prompts through the model at once, filling the cache; draws the first id
    cached      one id at a time, until the cache holds `context_length` ids
    slid        beyond that the book's `generate_text_simple` crops to the last `context_length`
                ids and counts positions from 0: no cached key survives, each id is a new prefill

`decode` walks them in `lax.while_loop`s inside one jit; `flaxgpt.generation.stream` walks them from
Python, one jitted call an id, the state donated. Prompts of unequal lengths are padded on the left,
so that all rows write to the same slot:

    slot      0   1   2   3   4   5 ...
    row 0     a   b   c   d   .   .        start 0      . filled by the loop
    row 1     -   -   e   f   .   .        start 2      - padding, invisible to attention
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flaxgpt.cache import KVCache, init_cache, merge_heads
from flaxgpt.config import GPTConfig
from flaxgpt.generation.sampling import NOT_A_NUMBER, sample
from flaxgpt.model.gpt import GPT
from flaxgpt.typing import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: NumPy scalars on the host, traced in the loop, so no value compiles.

    Attributes:
        key: random keys [B], one a row, or one key [], of which row i uses `fold_in(key, i)`.
        temperature, top_p: float32 [].
        top_k: int32 [].
        stop_ids: int32 [K], ids that end a row; unused places hold NOT_A_NUMBER.
        prompt_length: int32 [], ids in the longest prompt.
        final_length: int32 [], that and the new ids.
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
    """What the loop carries.

    Attributes:
        ids: int32 [B, W], padding, prompt, then new ids; what lies from `length` on is unwritten.
        length: int32 [], places of `ids` written so far, one more than the cache has seen.
        start: int32 [B], the place of each row's first id.
        done: bool [B], rows that have met a stop id.
        cache: keys and values of `ids[:, :length - 1]`.
    """

    ids: jax.Array
    length: jax.Array
    start: jax.Array
    done: jax.Array
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compilation depends on, beside the configuration and the batch.

    Attributes:
        prompt_width: places given to the prompts.
        width: places given to prompts and new ids together (W).
        slides: whether the ids outgrow the context.
        merged: whether the cache's batch and head axes are merged; see `flaxgpt.cache`.
        dtype: what is computed in.
    """

    prompt_width: int
    width: int
    slides: bool
    merged: bool
    dtype: Any


def decode(
    cfg: GPTConfig,
    plan: Plan,
    params: Params,
    request: Request,
    ids: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """Returns int32 [B, W]: the ids given, followed by new ones up to `request.final_length`.

    To jit it, make the first two arguments static; `generate` shows how the others are made.

    Args:
        ids: int32 [B, prompt_width], rows of `request.prompt_length` ids, padded on the left.
        start: int32 [B], where each row begins.
    """

    def unfinished(limit: ArrayLike, state: DecodeState) -> jax.Array:
        return (state.length < limit) & ~state.done.all()

    def cached_step(state: DecodeState) -> DecodeState:
        return cached(cfg, plan, params, request, state)[0]

    def slid_step(state: DecodeState) -> DecodeState:
        return slid(cfg, plan, params, request, state)[0]

    state, _ = prefill(cfg, plan, params, request, ids, start)
    full = jnp.minimum(request.final_length, cfg.context_length + 1)
    state = lax.while_loop(partial(unfinished, full), cached_step, state)
    if plan.slides:
        state = lax.while_loop(partial(unfinished, request.final_length), slid_step, state)
    return state.ids


def prefill(
    cfg: GPTConfig,
    plan: Plan,
    params: Params,
    request: Request,
    ids: jax.Array,
    start: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after the prompts, and the first new ids, int32 [B]; see `decode`."""
    batch = ids.shape[0]
    cache = init_cache(cfg, batch, min(plan.width, cfg.context_length), plan.dtype)
    state = DecodeState(
        ids=jnp.zeros((batch, plan.width), jnp.int32).at[:, : plan.prompt_width].set(ids),
        length=jnp.asarray(request.prompt_length, jnp.int32),
        start=start,
        done=jnp.zeros(batch, bool),
        cache=dataclasses.replace(merge_heads(cache) if plan.merged else cache, start=start),
    )
    state, new = _advance(cfg, plan, params, request, state, ids, request.prompt_length - 1)
    # What was written beyond the prompts is filler: the next ids take its slots.
    seen = dataclasses.replace(state.cache, length=state.length - 1)
    return dataclasses.replace(state, cache=seen), new


def cached(
    cfg: GPTConfig, plan: Plan, params: Params, request: Request, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after one more id, and it, int32 [B], while all ids fit the context."""
    latest = lax.dynamic_slice_in_dim(state.ids, state.length - 1, 1, axis=1)
    return _advance(cfg, plan, params, request, state, latest, 0)


def slid(
    cfg: GPTConfig, plan: Plan, params: Params, request: Request, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after one more id, and it, int32 [B], past the end of the context."""
    first = state.length - cfg.context_length
    window = lax.dynamic_slice_in_dim(state.ids, first, cfg.context_length, axis=1)
    emptied = dataclasses.replace(
        state.cache, length=jnp.zeros((), jnp.int32), start=jnp.maximum(state.start - first, 0)
    )
    state = dataclasses.replace(state, cache=emptied)
    return _advance(cfg, plan, params, request, state, window, cfg.context_length - 1)


def _advance(
    cfg: GPTConfig,
    plan: Plan,
    params: Params,
    request: Request,
    state: DecodeState,
    chunk: jax.Array,  # int32 [B, T]: the ids that the cache lacks
    last: ArrayLike,  # int32 []: which of them the next id follows
) -> tuple[DecodeState, jax.Array]:
    model: Any = GPT(cfg, plan.dtype, parent=None)
    x, cache = model.apply({"params": params}, chunk, state.cache, method=GPT.trunk)
    final = lax.dynamic_index_in_dim(x, last, axis=1, keepdims=False)  # [B, D]
    logits = model.apply({"params": params}, final, method=GPT.head)  # [B, V]

    keys = request.key
    if keys.ndim == 0:
        keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(chunk.shape[0]))
    drawn = state.length - request.prompt_length
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, drawn)
    new = sample(logits, keys, request.temperature, request.top_k, request.top_p)

    advanced = DecodeState(
        ids=lax.dynamic_update_slice_in_dim(state.ids, new[:, None], state.length, axis=1),
        length=state.length + 1,
        start=state.start,
        done=state.done | (new[:, None] == request.stop_ids).any(axis=-1) | (new == NOT_A_NUMBER),
        cache=cache,
    )
    return advanced, new


@partial(jax.jit, static_argnums=0)
def moved_back(cfg: GPTConfig, state: DecodeState, request: Request) -> tuple[DecodeState, Request]:
    """Returns the state with only the last context of its ids, and the rest of W free again."""
    first = state.length - cfg.context_length
    window = lax.dynamic_slice_in_dim(state.ids, first, cfg.context_length, axis=1)
    state = dataclasses.replace(
        state,
        ids=jnp.zeros_like(state.ids).at[:, : cfg.context_length].set(window),
        length=jnp.full_like(state.length, cfg.context_length),
        start=jnp.maximum(state.start - first, 0),
    )
    # The number of ids drawn is counted from the prompt's end, which has moved too.
    return state, dataclasses.replace(request, prompt_length=request.prompt_length - first)


decode_jitted = jax.jit(decode, static_argnums=(0, 1))
# From jax 0.11 on, this pass takes the loop's body for a small one and runs it on one thread.
decode_on_cpu = jax.jit(
    decode,
    static_argnums=(0, 1),
    compiler_options={"xla_disable_hlo_passes": "small-while-loop-hoisting"},
)
prefill_jitted = jax.jit(prefill, static_argnums=(0, 1))
cached_jitted = jax.jit(cached, static_argnums=(0, 1), donate_argnames="state")
slid_jitted = jax.jit(slid, static_argnums=(0, 1), donate_argnames="state")
