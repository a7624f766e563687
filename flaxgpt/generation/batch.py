"""Prompts in, new ids out: `generate` for whole batches, `stream` for one row as it comes.

This is the host's side: it checks what the user gives, rounds array sizes up to a few sizes
(`bucket`) with the true lengths traced, so that calls of similar length share one compilation, and
turns arrays back into lists. The loop itself is `flaxgpt.generation.decoding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import (
    check_dtype,
    check_params,
    check_prompts,
    check_sampling,
    check_size,
    check_stop_ids,
)
from flaxgpt.config import GPTConfig
from flaxgpt.generation.decoding import (
    Plan,
    Request,
    cached_jitted,
    decode_jitted,
    decode_on_cpu,
    moved_back,
    prefill_jitted,
    slid_jitted,
)
from flaxgpt.generation.sampling import NOT_A_NUMBER
from flaxgpt.model.gpt import param_shapes
from flaxgpt.typing import Params


def generate(
    cfg: GPTConfig,
    params: Params,
    prompts: ArrayLike | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """Continues every prompt and returns the new ids alone.

    A row's result does not depend on the rows beside it (random draws: with keys of JAX's default
    kind, threefry; `rbg` keys draw differently in company). Where prompt and new ids outgrow
    `cfg.context_length`, the model looks at the last `context_length` of them, positions counted
    from 0, as the book's `generate_text_simple` does (section 4.7).

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        prompts: ids, int [B, T], or B lists of any lengths of 1 or more.
        max_new_tokens: new ids a row, 1 or more; a row that meets a stop id has fewer.
        temperature: 0 takes the likeliest id; else logits are divided by it before drawing.
        top_k: draw from the k likeliest ids only; None from all.
        top_p: draw from the likeliest ids that reach this probability together; None from all.
        key: a JAX random key, of which row i uses `fold_in(key, i)`, or an array of B keys, one a
            row; each id folds in the number of ids drawn before it. Needed if temperature > 0.
        stop_ids: ids that end a row; the row ends with the id itself.
        dtype: what is computed in: float32, bfloat16 or float16.

    Returns:
        B lists of at most `max_new_tokens` ids.

    Raises:
        ValueError: an argument out of its range, params that do not fit, or logits that are NaN.
    """
    plan, request, (ids, start) = _prepare(
        cfg, params, prompts, max_new_tokens, temperature, top_k, top_p, key, stop_ids, dtype
    )
    places = len(ids) * plan.width
    if places > 2**28:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} for {len(ids)} rows needs "
            f"{places * 4 / 2**30:.1f} GiB for the ids alone: ask for fewer, or use "
            "`stream`, which keeps only the context"
        )
    decode = decode_on_cpu if plan.merged else decode_jitted
    out: np.ndarray = np.asarray(
        decode(cfg, plan, _compute_params(params, plan.dtype), request, ids, start)
    )
    new = out[:, request.prompt_length : request.final_length]
    ends = {NOT_A_NUMBER, *request.stop_ids.tolist()}
    rows = []
    for i, row in enumerate(new.tolist()):
        length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
        _check_number(row[length - 1], i, length - 1)
        rows.append(row[:length])
    return rows


def stream(
    cfg: GPTConfig,
    params: Params,
    prompt: ArrayLike | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
) -> Iterator[int]:
    """Continues one prompt and yields each new id as it comes.

    The ids are those of `generate(cfg, params, [prompt], ...)` with the same arguments, which see.
    Arguments are checked at the call, before the first id is asked for.

    Args:
        prompt: ids, int [T] or a list of 1 or more.
        key: a JAX random key, used as row 0 of `generate` uses it, or an array of one key.

    Yields:
        At most `max_new_tokens` ids; memory stays that of the context, however many are asked for.

    Raises:
        ValueError: an argument out of its range, params that do not fit, or, later, NaN logits.
    """
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        raise ValueError(f"stream takes the ids of one prompt, a flat list of ints, got {prompt!r}")
    plan, request, (ids, start) = _prepare(
        cfg, params, [prompt], max_new_tokens, temperature, top_k, top_p, key, stop_ids, dtype
    )
    plan = dataclasses.replace(plan, width=min(plan.width, bucket(cfg.context_length + 1)))
    return _stream(cfg, plan, params, request, ids, start)


def _stream(
    cfg: GPTConfig,
    plan: Plan,
    params: Params,
    request: Request,
    ids: np.ndarray,
    start: np.ndarray,
) -> Iterator[int]:
    params = _compute_params(params, plan.dtype)
    state, new = prefill_jitted(cfg, plan, params, request, ids, start)
    prompt_length, final_length = int(request.prompt_length), int(request.final_length)
    filled = prompt_length + 1  # places of `state.ids`
    for drawn in range(final_length - prompt_length):
        if drawn:
            if filled == plan.width:
                state, request = moved_back(cfg, state, request)
                filled = cfg.context_length
            fits = prompt_length + drawn <= cfg.context_length
            step = cached_jitted if fits else slid_jitted
            state, new = step(cfg, plan, params, request, state)
            filled += 1
        token = int(new[0])
        _check_number(token, 0, drawn)
        yield token
        if token in request.stop_ids:
            return


def bucket(length: int) -> int:
    """Returns the size that arrays of this length get: 16, 24, 32, 48, 64, 96, 128, 192, ..."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def _prepare(
    cfg: GPTConfig,
    params: Params,
    prompts: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
    stop_ids: Sequence[int],
    dtype: DTypeLike,
) -> tuple[Plan, Request, tuple[np.ndarray, np.ndarray]]:
    check_params(param_shapes(cfg), params)
    rows = check_prompts(cfg.vocab_size, prompts)
    max_new_tokens = check_size("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_k, top_p, cfg.vocab_size)
    stops = check_stop_ids(cfg.vocab_size, stop_ids)

    rows = [row[-cfg.context_length :] for row in rows]  # the model looks no further back
    longest = max(map(len, rows))
    if max_new_tokens >= 2**30:
        raise ValueError(f"max_new_tokens={max_new_tokens} is more than int32 can count with ease")
    prompt_width = min(bucket(longest), cfg.context_length)
    # From the bucket and not the length, so that all lengths in it share one plan.
    most = prompt_width + max_new_tokens
    plan = Plan(
        prompt_width=prompt_width,
        width=bucket(most),
        slides=most > cfg.context_length + 1,  # the last id is not looked at
        merged=_platform(params) == "cpu",
        dtype=check_dtype(dtype),
    )
    ids = np.zeros((len(rows), plan.prompt_width), np.int32)
    start = np.array([longest - len(row) for row in rows], np.int32)
    for i, row in enumerate(rows):
        ids[i, start[i] : longest] = row
    padded = np.full(max(8, 1 << (len(stops) - 1).bit_length()), NOT_A_NUMBER, np.int32)
    padded[: len(stops)] = stops
    request = Request(
        key=_keys(key, len(rows), temperature),
        temperature=np.float32(temperature),
        top_k=np.int32(cfg.vocab_size if top_k is None else top_k),
        top_p=np.float32(1.0 if top_p is None else top_p),
        stop_ids=padded,
        prompt_length=np.int32(longest),
        final_length=np.int32(longest + max_new_tokens),
    )
    return plan, request, (ids, start)


def _keys(key: jax.Array | None, batch: int, temperature: float) -> jax.Array:
    if key is None:
        if temperature > 0:
            raise ValueError(
                f"temperature={temperature} draws at random and needs a key, such as "
                "key=jax.random.key(0); temperature=0 needs none"
            )
        return jax.random.key(0)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))  # from jax.random.PRNGKey
        except TypeError as error:
            raise ValueError(
                f"key={key!r} must be a JAX random key, such as jax.random.key(0)"
            ) from error
    if key.shape not in ((), (batch,)):
        raise ValueError(f"keys of shape {key.shape} must be one key or {batch}, one a row")
    return key


def _platform(params: Params) -> str:
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(
            "generate and stream return Python lists and cannot run inside jit, grad or vmap: jit "
            "around `flaxgpt.extend` or `flaxgpt.generation.decoding.decode`, which are pure"
        )
    if isinstance(leaf, jax.Array):
        return next(iter(leaf.devices())).platform
    return jax.default_backend()


def _compute_params(params: Params, dtype: Any) -> Params:
    """Returns params with matrices in `dtype`: converted once here, not once a step."""
    return params if dtype == jnp.float32 else _cast(params, dtype)


@partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)


def _check_number(token: int, row: int, place: int) -> None:
    if token == NOT_A_NUMBER:
        raise ValueError(
            f"the logits of row {row} became NaN at new id {place}: the parameters hold NaN or "
            "infinity, or overflow in this dtype; float32 may help"
        )
