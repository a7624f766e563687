"""The loop of `flaxgpt.generation.speculation` with the GPT put in, compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxgpt.cache import KVCache, zero_cache
from flaxgpt.config import GPTConfig
from flaxgpt.generation import draft_model, lookup, speculation
from flaxgpt.generation.decoding import DecodeState, Read, Request
from flaxgpt.generation.programs import Program
from flaxgpt.generation.speculation import Counts, Propose, Speculation, SpeculativeState
from flaxgpt.model.gpt import apply_logits, apply_states
from flaxgpt.sharding import in_force, replicated
from flaxgpt.typing import Params


@dataclasses.dataclass(frozen=True)
class SpeculativeProgram:
    """Everything that a compilation depends on besides the number of rows."""

    program: Program
    size: int  # ids in a draft (K)
    draft: GPTConfig | None = None  # the small model; None for drafts from the text itself

    def functions(self, params: Params, draft_params: Params, request: Request) -> Speculation:
        """Return the functions of the loop."""
        cfg, platform = self.program.cfg, self.program.platform

        def read_all(ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
            states, cache = apply_states(cfg, platform, params, ids, cache)
            return apply_logits(cfg, platform, params, states), cache

        propose: Propose = partial(_look_up, self.size)
        if self.draft is not None:
            read = self._draft_read(self.draft, draft_params)
            length = self.draft.context_length
            propose = partial(draft_model.propose, read, length, self.size, request)
        return Speculation(self.program.read_with(params), read_all, propose, self.size)

    def first_cache(self, request: Request, start: jax.Array) -> KVCache:
        """Return a cache for the ids of the loop and the drafts after them; see `Program`."""
        cache = self._cache(self.program.cfg, len(start), self.size + 1)
        return cache if request.prefix is None else request.prefix.place(start, cache.size)

    def memory(
        self, draft_params: Params, request: Request, ids: jax.Array, start: jax.Array
    ) -> Any:
        """Return what `propose` remembers of the prompts, which are read whole."""
        if self.draft is None:
            return ()
        spare = 1 + max(self.size, draft_model.CATCH_UP)
        cache = self._cache(self.draft, len(ids), spare)
        read = self._draft_read(self.draft, draft_params)
        context_length, length = self.draft.context_length, request.prompt_length
        cache = draft_model.read_prompts(read, context_length, ids, start, length, cache)
        samples = self.program.plan.samples
        return cache if samples == 1 else cache.repeat(samples)

    def _cache(self, cfg: GPTConfig, batch: int, spare: int) -> KVCache:
        length = speculation.columns(self.program.plan) + spare
        layout = self.program.platform.cache_layout
        return zero_cache(cfg, batch, length, self.program.dtype, layout).rewind(0)

    def _draft_read(self, cfg: GPTConfig, draft_params: Params) -> Read:
        return dataclasses.replace(self.program, cfg=cfg).read_with(draft_params)


def _look_up(size: int, text: DecodeState, memory: Any, wanted: jax.Array) -> tuple[jax.Array, Any]:
    return lookup.find(text.ids, text.start, text.length, size), memory


class Step(NamedTuple):
    """What the host needs of a step, to yield its ids and choose the next one."""

    new: jax.Array  # int32 [B, K + 1], ids of each row
    gained: jax.Array  # int32 [B], how many they are
    has_draft: jax.Array  # bool [], whether the next step has drafts to verify
    is_unfinished: jax.Array  # bool [], whether there is one


def decode(
    program: SpeculativeProgram,
    params: Params,
    draft_params: Params,  # of the small model, or None
    request: Request,
    ids: jax.Array,
    start: jax.Array,
) -> tuple[Any, Counts]:
    """Run `flaxgpt.generation.speculation.decode` with a GPT. Pure, not compiled."""
    with in_force(program.program.mesh):
        functions = program.functions(params, draft_params, request)
        cache = program.first_cache(request, start)
        memory = program.memory(draft_params, request, ids, start)
        found = speculation.decode(
            functions, program.program.plan, request, ids, start, cache, memory
        )
        return jax.tree.map(replicated, found)


@functools.cache
def compiled_decode(options: tuple[tuple[str, str], ...]) -> Any:
    """Return `decode` under `jit`, its program static, with a platform's compiler options."""
    return jax.jit(decode, static_argnums=0, compiler_options=dict(options) or None)


@partial(jax.jit, static_argnums=0)
def prefill(
    program: SpeculativeProgram,
    params: Params,
    draft_params: Params,
    request: Request,
    ids: jax.Array,
    start: jax.Array,
) -> tuple[SpeculativeState, Step]:
    """Return the state after the prompts, and the first new ids."""
    with in_force(program.program.mesh):
        functions = program.functions(params, draft_params, request)
        cache = program.first_cache(request, start)
        memory = program.memory(draft_params, request, ids, start)
        state, _ = speculation.prefill(
            functions, program.program.plan, request, ids, start, cache, memory
        )
        before = jnp.full_like(state.text.start, request.prompt_length)
        return state, _step(program, request, before, state)


def _compile_step(step: Callable[..., SpeculativeState]) -> Any:
    @partial(jax.jit, static_argnums=0, donate_argnames="state")
    def run(
        program: SpeculativeProgram,
        params: Params,
        draft_params: Params,
        request: Request,
        state: SpeculativeState,
    ) -> tuple[SpeculativeState, Step]:
        with in_force(program.program.mesh):
            before = state.text.length
            functions = program.functions(params, draft_params, request)
            state = step(functions, program.program.plan, request, state)
            return state, _step(program, request, before, state)

    return run


def _step(
    program: SpeculativeProgram, request: Request, before: jax.Array, state: SpeculativeState
) -> Step:
    text, plan = state.text, program.program.plan
    numbers = before[:, None] + jnp.arange(program.size + 1, dtype=jnp.int32)[None]
    new = jnp.take_along_axis(text.ids, jnp.minimum(numbers, text.ids.shape[1] - 1), axis=1)
    is_unfinished = speculation.is_unfinished(plan, request, text)
    step = Step(new, text.length - before, state.has_draft, is_unfinished)
    return jax.tree.map(replicated, step)


# Functions of (program, params, draft_params, request, state), which donate the state.
plain_step = _compile_step(speculation.plain_step)
verifying_step = _compile_step(speculation.verifying_step)


@partial(jax.jit, static_argnums=0)
def without_drafts(
    program: SpeculativeProgram, request: Request, state: SpeculativeState
) -> DecodeState:
    """Return the state from which the plain steps continue, past the context."""
    return speculation.without_drafts(program.program.plan, request, state)
