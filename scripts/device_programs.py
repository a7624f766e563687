"""The programs that scripts/device_table.py measures, each as a function that returns one row.

A time is the median of five calls, each of which waits for the device; min and max are beside it.
Programs are compiled first, which is timed apart, and called once before the clock starts. A row
has the bytes that XLA allocates for the program, arguments included.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import Figures, seconds_of, spread

import flaxgpt
from flaxgpt.generation import programs
from flaxgpt.generation.prompts import Prepared, prepare
from flaxgpt.generation.sampling import Sampling
from flaxgpt.model.attend import attend, resolve_attention
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import platform_of
from flaxgpt.training import TrainConfig, init_state, train_step
from flaxgpt.typing import Params

REPEATS = 5


def matmul(rows: int, size: int, dtype: str, times: int) -> Figures:
    """Measure products of [rows, size] and [size, size], `times` of them per call, an even number.

    With few rows, as in decoding, they take as long as reading the matrix.
    """

    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Two per turn, or else the result would be copied to where the loop expects it.
        return lax.fori_loop(0, times // 2, lambda _, x: (x @ weight) @ weight, x)

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, size)).astype(dtype)
    weight = (jax.random.normal(keys[1], (size, size)) * size**-0.5).astype(dtype)
    compiled, figures = _compile(run, x, weight)
    seconds = _seconds(lambda: compiled(x, weight), times)
    figures |= {"ms": _ms(seconds), "flops_per_s": 2 * rows * size**2 / seconds["median"]}
    if rows < size:
        figures["bytes_per_s"] = _bytes(weight) / seconds["median"]
    return figures


def memory_traffic(kind: str, size: int, times: int) -> Figures:
    """Measure passes over an array of `size` bytes that "read" it, or "update" it in place."""

    def read(x: jax.Array) -> jax.Array:
        # Each pass depends on the one before, so that none is left out.
        return lax.fori_loop(0, times, lambda _, total: jnp.abs(x - total).max(), jnp.float32(0))

    def update(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda _, x: x * 0.5 + 1, x)

    x = jnp.ones(size // 4, jnp.float32)
    if kind == "read":
        compiled, figures = _compile(read, x)
        seconds = _seconds(lambda: compiled(x), times)
    else:
        compiled, figures = _compile(update, x, donate_argnums=0)

        def call() -> jax.Array:
            nonlocal x
            x = compiled(x)
            return x

        seconds = _seconds(call, times)
    moved = size * (1 if kind == "read" else 2)
    return figures | {"ms": _ms(seconds), "bytes_per_s": moved / seconds["median"]}


def decode(cfg: flaxgpt.GPTConfig, batch: int, dtype: str, prompt: int, new: int) -> Figures:
    """Measure a step of the decoding loop: the time of `new` steps minus that of the prefill."""
    full = _prepared(cfg, batch, dtype, prompt, new)
    only_prompt = dataclasses.replace(full.request, final_length=full.request.prompt_length + 1)
    options = dict(full.program.platform.decode_options) or None
    run = partial(programs.decode, full.program)
    arguments = (full.params, full.request, full.ids, full.start)
    compiled, figures = _compile(run, *arguments, compiler_options=options)
    both = seconds_of(lambda: _wait(compiled(*arguments)), REPEATS)[1:]
    short = (full.params, only_prompt, full.ids, full.start)
    alone = seconds_of(lambda: _wait(compiled(*short)), REPEATS)[1:]
    start = spread(alone)["median"]
    # Of a tiny model, the difference may be less than the noise.
    seconds = spread([max(whole - start, 1e-9) / (new - 1) for whole in both])
    cache = jax.eval_shape(lambda: full.program.empty_cache(batch))
    # A step reads every weight and the whole cache, but one row of the position table.
    moved = _bytes(full.params) - _bytes(full.params["pos_emb"])
    moved -= 0 if cfg.tie_embeddings else _bytes(full.params["tok_emb"])
    moved += _bytes((cache.keys, cache.values))
    return figures | {
        "ms": _ms(seconds),
        "tokens_per_s": batch / seconds["median"],
        "bytes_per_step": moved,
        "bytes_per_s": moved / seconds["median"],
        "cache_slots": cache.size,
    }


def prefill(cfg: flaxgpt.GPTConfig, batch: int, length: int, dtype: str) -> Figures:
    """Measure the time from prompts to their first new ids."""
    ready = _prepared(cfg, batch, dtype, length, 1)
    arguments = (ready.params, ready.request, ready.ids, ready.start)
    compiled, figures = _compile(
        lambda *arguments: programs.prefill(ready.program, *arguments)[1], *arguments
    )
    seconds = _seconds(lambda: compiled(*arguments))
    count = flaxgpt.flops(cfg, batch, length)
    operations = count.forward - count.head * (length - 1) // length  # logits of the last id only
    return figures | {
        "ms": _ms(seconds),
        "tokens_per_s": batch * length / seconds["median"],
        "flops_per_s": operations / seconds["median"],
    }


def train(
    cfg: flaxgpt.GPTConfig, batch: int, length: int, dtype: Any, remat: bool, steps: int = 4
) -> Figures:
    """Measure optimizer steps, `steps` of them per call."""
    settings = TrainConfig(batch_size=batch, dtype=dtype, remat=remat, optimizer="adamw")
    state = init_state(cfg, settings)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length + 1), np.int32)
    start = time.perf_counter()
    compiled = train_step.lower(state, ids).compile()
    figures = _figures(compiled, time.perf_counter() - start)

    def call() -> jax.Array:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, ids)
        return metrics["loss"]

    seconds = _seconds(call, steps)
    tokens = batch * length / seconds["median"]
    operations = flaxgpt.flops(cfg, batch, length).training
    return figures | {
        "ms": _ms(seconds),
        "tokens_per_s": tokens,
        "flops_per_s": operations / seconds["median"],
    }


def attention(name: str, shape: tuple[int, ...], dtype: str) -> Figures:
    """Measure causal attention of queries [B, N, T, H], forward alone and with its gradient."""
    arrays = jax.random.normal(jax.random.key(0), (3, *shape)).astype(dtype)

    def run(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return attend(
            query, keys, values, Visibility(), resolve_attention(name, platform_of(), query.dtype)
        )

    def total(*arrays: jax.Array) -> jax.Array:
        return run(*arrays).astype(jnp.float32).sum()

    forward, figures = _compile(run, *arrays)
    gradient, of_gradient = _compile(jax.grad(total, argnums=(0, 1, 2)), *arrays)
    return {
        "ms": _ms(_seconds(lambda: forward(*arrays))),
        "ms_with_gradient": _ms(_seconds(lambda: gradient(*arrays))),
        "compile_s": figures["compile_s"] + of_gradient["compile_s"],
        "allocated_bytes": of_gradient["allocated_bytes"],
    }


@functools.lru_cache(maxsize=1)
def _parameters(cfg: flaxgpt.GPTConfig) -> Params:
    return flaxgpt.init(cfg, jax.random.key(0))


def _prepared(cfg: flaxgpt.GPTConfig, batch: int, dtype: str, prompt: int, new: int) -> Prepared:
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, prompt))
    return prepare(cfg, _parameters(cfg), prompts, new, Sampling(), dtype)


def _compile(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Figures]:
    start = time.perf_counter()
    compiled = jax.jit(run, **options).lower(*arguments).compile()
    return compiled, _figures(compiled, time.perf_counter() - start)


def _figures(compiled: Any, seconds: float) -> Figures:
    used = compiled.memory_analysis()
    allocated = None
    if used is not None:
        allocated = used.argument_size_in_bytes + used.temp_size_in_bytes
        allocated += used.output_size_in_bytes - used.alias_size_in_bytes
    return {"compile_s": seconds, "allocated_bytes": allocated}


def _seconds(call: Callable[[], Any], times: int = 1) -> Figures:
    """Return the spread of the seconds that a call takes, divided by what it does `times` times."""
    return spread([s / times for s in seconds_of(lambda: _wait(call()), REPEATS)[1:]])


def _wait(value: Any) -> None:
    jax.block_until_ready(value)


def _ms(seconds: Figures) -> Figures:
    return {name: 1000 * value for name, value in seconds.items()}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
