"""The decoding loop with the GPT put in, compiled: one program per phase."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
from jax import lax

from flaxgpt.cache import KVCache, init_cache
from flaxgpt.config import GPTConfig
from flaxgpt.generation import beams, decoding
from flaxgpt.generation.beams import Finished, Rules
from flaxgpt.generation.decoding import DecodeState, Plan, Read, Request
from flaxgpt.generation.prompt_reading import read_few_rows_at_a_time
from flaxgpt.generation.recording import observed_read, recording
from flaxgpt.model.gpt import apply_logits, apply_states
from flaxgpt.platform import Platform
from flaxgpt.sharding import Mesh, in_force, replicated
from flaxgpt.typing import Params


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a compilation depends on besides the number of rows."""

    cfg: GPTConfig
    plan: Plan
    platform: Platform
    dtype: Any  # to compute in
    mesh: Mesh | None = None  # of several devices, which hold the parameters
    capture: tuple[str, ...] = ()  # intermediate values to record

    def read_with(self, params: Params, patches: Any = None) -> Read:
        """Return the model's reading function; see `Request.patches`."""
        if self.capture or patches:
            return observed_read(self.cfg, self.platform, params, self.capture, patches or {})

        def read(ids: jax.Array, last: Any, cache: KVCache) -> tuple[jax.Array, KVCache]:
            rows = self.platform.prompts_at_once(ids.shape[1])
            if cache.is_empty and rows < ids.shape[0] and not self.mesh:
                return read_few_rows_at_a_time(read, rows, self._cache, ids, last, cache)
            states, cache = apply_states(self.cfg, self.platform, params, ids, cache)
            final = lax.dynamic_index_in_dim(states, last, axis=1, keepdims=False)  # [B, D]
            return apply_logits(self.cfg, self.platform, params, final), cache

        return read

    @property
    def cache_size(self) -> int:
        """Slots for as many ids as the loop writes, or the context if that is less."""
        return min(self.plan.width, self.cfg.context_length)

    def empty_cache(self, batch: int) -> KVCache:
        """Return a cache of that size."""
        cache = self._cache(batch, self.cache_size)
        return recording(cache) if self.capture else cache

    def first_cache(self, request: Request, start: jax.Array) -> KVCache:
        """Return a cache with the prefix of the prompts, or an empty one; `start` is int32 [B]."""
        if request.prefix is None:
            return self.empty_cache(start.shape[0])
        return request.prefix.place(start, self.cache_size)

    def _cache(self, batch: int, length: int) -> KVCache:
        layout = self.platform.cache_layout
        return init_cache(self.cfg, batch, length, self.dtype, layout=layout).rewind(0)


def decode(
    program: Program, params: Params, request: Request, ids: jax.Array, start: jax.Array
) -> Any:
    """Run `flaxgpt.generation.decoding.decode` with a GPT. Pure, not compiled.

    With `program.capture`, also return what was recorded.
    """
    with in_force(program.mesh):
        cache = program.first_cache(request, start)
        arguments = program.read_with(params, request.patches), program.plan, request, ids, start
        if program.capture:
            state = decoding.last_state(*arguments, cache)
            found = state.ids, state.cache.seen
        else:
            found = decoding.decode(*arguments, cache)
        return jax.tree.map(replicated, found)


@functools.cache
def compiled_decode(options: tuple[tuple[str, str], ...]) -> Any:
    """Return `decode` under `jit`, its program static, with a platform's compiler options."""
    return jax.jit(decode, static_argnums=0, compiler_options=dict(options) or None)


def search(
    program: Program,
    width: int,
    params: Params,
    request: Request,
    rules: Rules,
    ids: jax.Array,
    start: jax.Array,
) -> Finished:
    """Run `flaxgpt.generation.beams.search` with a GPT and `width` beams. Pure, not compiled."""
    with in_force(program.mesh):
        cache = program.first_cache(request, start)
        read, plan = program.read_with(params), program.plan
        found = beams.search(read, plan, width, request, rules, ids, start, cache)
        return jax.tree.map(replicated, found)


@functools.cache
def compiled_search(options: tuple[tuple[str, str], ...]) -> Any:
    """Return `search` under `jit`, as `compiled_decode` does; the beams are static too."""
    return jax.jit(search, static_argnums=(0, 1), compiler_options=dict(options) or None)


@partial(jax.jit, static_argnums=0)
def prefill(
    program: Program, params: Params, request: Request, ids: jax.Array, start: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Return the state after the prompts, and the first new ids."""
    with in_force(program.mesh):
        cache = program.first_cache(request, start)
        read = program.read_with(params, request.patches)
        state, new = decoding.prefill(read, program.plan, request, ids, start, cache)
        return state, replicated(new)


def _compile_step(step: Any) -> Any:
    @partial(jax.jit, static_argnums=0, donate_argnames="state")
    def run(program: Program, params: Params, request: Request, state: DecodeState) -> Any:
        with in_force(program.mesh):
            read = program.read_with(params, request.patches)
            state, new = step(read, program.plan, request, state)
            return state, replicated(new)

    return run


# Functions of (program, params, request, state), which donate the state.
extend_step = _compile_step(decoding.extend_step)
window_step = _compile_step(decoding.window_step)
keep_last_window = jax.jit(decoding.keep_last_window, static_argnums=0)
