"""From prompts and options to the arrays of the decoding loop, checked on the host.

Sizes are rounded up to a few values (`bucket`) with the true lengths traced, so that calls of
similar length share one compilation.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from flaxgpt._checks import check_dtype, check_params, check_prompts, check_size
from flaxgpt.config import GPTConfig
from flaxgpt.generation.decoding import Plan, Request
from flaxgpt.generation.hooks import least_length, within
from flaxgpt.generation.loop_params import loop_params
from flaxgpt.generation.observed import Watch
from flaxgpt.generation.prefix import Prefix, check_prefix
from flaxgpt.generation.programs import Program
from flaxgpt.generation.sampling import NOT_A_NUMBER, Sampling
from flaxgpt.model import param_shapes
from flaxgpt.platform import platform_of
from flaxgpt.sharding import batch_parts, mesh_of, to_automatic
from flaxgpt.typing import Params


class Prepared(NamedTuple):
    """The arguments of a program in `flaxgpt.generation.programs`."""

    program: Program
    params: Params
    request: Request
    ids: Any  # int32 [B, prompt_width], padded on the left
    start: Any  # int32 [B]


def prepare(
    cfg: GPTConfig,
    params: Params,
    prompts: Any,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: DTypeLike,
    *,
    alternatives: int | None = None,
    window_step: int = 1,
    watch: Watch | None = None,
    samples: int = 1,
    prefix: Prefix | None = None,
) -> Prepared:
    """Return the arguments of the decoding loop, or raise ValueError; see `generate`."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "generate and stream return Python lists and cannot run inside jit, grad or vmap: jit "
            "around `flaxgpt.extend` or `flaxgpt.generation.programs.decode`, which are pure"
        )
    check_params(param_shapes(cfg), params)
    rows = check_prompts(cfg.vocab_size, prompts)
    max_new_tokens = check_size("max_new_tokens", max_new_tokens)
    if max_new_tokens >= 2**30:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be below 2**30, to fit int32")
    sampling.check_vocabulary(cfg.vocab_size)
    window_step = check_size("window_step", window_step)
    if window_step > cfg.context_length:
        raise ValueError(
            f"window_step={window_step} exceeds context_length={cfg.context_length}: about a "
            "quarter of it keeps most of the text in view"
        )
    if sampling.min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={max_new_tokens}"
        )
    samples = check_samples(samples, sampling.temperature)
    count = samples * len(rows)
    key = jax.random.key(0) if sampling.key is None else sampling.key  # any, if nothing is random
    if key.shape not in ((), (count,)):
        raise ValueError(f"keys of shape {key.shape} must be one key, or one per row: {count}")
    dtype = check_dtype(dtype)
    watch = Watch() if watch is None else watch
    watch.check_length(max(map(len, rows)), max_new_tokens, cfg.context_length)
    if prefix is not None:
        check_prefix(prefix).check_prompts(cfg, rows)
        if watch.names is not None or watch.patches:
            name = "patches" if watch.patches else "capture"
            raise ValueError(
                f"prefix does not work with {name}, which needs all ids to be read: leave it out"
            )
    if samples > 1 and watch.names is not None:
        raise ValueError("samples does not work with capture: repeat the prompts in the list")

    rows = [row[-cfg.context_length :] for row in rows]  # the model reads no further back
    params = to_automatic(params)
    mesh = mesh_of(params)
    if copies := -len(rows) % batch_parts(mesh):  # every device gets as many rows
        rows += copies * rows[-1:]
        key = key[np.minimum(np.arange(samples * len(rows)), count - 1)] if key.ndim else key
    longest = max(map(len, rows))
    plan = dataclasses.replace(
        loop_sizes(cfg, longest, max_new_tokens),
        alternatives=alternatives,
        window_step=window_step,
        samples=samples,
    )
    if watch.places:  # the buckets may exceed the context, the ids do not
        plan = dataclasses.replace(plan, exceeds_context=False)
    ids = np.zeros((len(rows), plan.prompt_width), np.int32)
    start = np.array([longest - len(row) for row in rows], np.int32)
    for i, row in enumerate(rows):
        ids[i, start[i] : longest] = row
    stops = np.full(max(8, 1 << (len(sampling.stop_ids) - 1).bit_length()), NOT_A_NUMBER, np.int32)
    stops[: len(sampling.stop_ids)] = sampling.stop_ids
    request = Request(
        key=key,
        # float32's largest number makes all ids equally likely, as any larger one would.
        temperature=np.float32(min(sampling.temperature, float(np.finfo(np.float32).max))),
        top_k=np.int32(cfg.vocab_size if sampling.top_k is None else sampling.top_k),
        top_p=np.float32(1.0 if sampling.top_p is None else sampling.top_p),
        stop_ids=stops,
        prompt_length=np.int32(longest),
        final_length=np.int32(longest + max_new_tokens),
        allowed=sampling.allowed,
        rows=np.int32(count) if copies else None,
        logits_fn=_hook(sampling, np.repeat(longest - start, samples), max_new_tokens),
        patches=dict(watch.patches) or None,
    )
    platform = watch.platform(platform_of(params))
    if prefix is not None:
        prefix.check_model(cfg, params, platform, dtype)
        columns = unread_columns(len(prefix.ids), longest, plan.prompt_width)
        known, unread = prefix.first(columns.start), ids[:, columns]
        request = dataclasses.replace(request, prefix=known, unread=unread)
    params = loop_params(platform, dtype, params)
    program = Program(cfg, plan, platform, dtype, mesh, watch.places)
    return Prepared(program, params, request, ids, start)


def _hook(sampling: Sampling, lengths: np.ndarray, max_new_tokens: int) -> Any:
    """Return the hook for prompts of these lengths, or None."""
    if sampling.match is not None:
        limit = sampling.match.hook(lengths, max_new_tokens)
    elif sampling.min_new_tokens and sampling.stop_ids:
        limit = least_length(lengths + sampling.min_new_tokens, sampling.stop_ids)
    else:
        return sampling.logits_fn
    return limit if sampling.logits_fn is None else within(limit, sampling.logits_fn)


def loop_sizes(cfg: GPTConfig, longest: int, max_new_tokens: int) -> Plan:
    """Return the sizes of the loop for prompts of at most `longest` ids."""
    prompt_width = min(bucket(longest), cfg.context_length)
    # From the bucket, not the length, so that all lengths in it share one plan.
    most = prompt_width + max_new_tokens
    return Plan(
        prompt_width=prompt_width,
        width=bucket(most),
        context_length=cfg.context_length,
        exceeds_context=most > cfg.context_length + 1,  # the last id is never read
    )


def check_samples(samples: int, temperature: float) -> int:
    """Return the number of rows that continue each prompt, or raise ValueError."""
    samples = check_size("samples", samples)
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"samples={samples} at temperature 0 would be the same ids {samples} times: set a "
            "temperature such as 0.8, or use beams and return_beams"
        )
    return samples


def unread_columns(known: int, length: int, width: int) -> slice:
    """Return the columns to read where the first `known` of `length` ids are in a cache.

    They include the last id, whose logits are needed, and are as many as a bucket, but end within
    `width` columns. Ids that are read again get the keys that they had.
    """
    size = min(bucket(length - min(known, length - 1)), width)
    first = min(known, length - 1, width - size)
    return slice(first, first + size)


def bucket(length: int) -> int:
    """Return the size that arrays of this length get: 16, 24, 32, 48, 64, 96, 128, 192, ..."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def check_places(places: int, rows: int, max_new_tokens: int, advice: str) -> None:
    """Raise ValueError if the ids of all rows need more than 1 GiB."""
    if places > 2**28:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} for {rows} rows needs {places * 4 / 2**30:.1f} GiB "
            f"for the ids alone: ask for fewer, or {advice}"
        )


def check_number(token: int, row: int, place: int) -> None:
    """Raise ValueError if a new id says that its logits were NaN."""
    if token == NOT_A_NUMBER:
        raise ValueError(
            f"the logits of row {row} became NaN at new id {place}: the parameters hold NaN or "
            "infinity, or overflow in this dtype (dtype=float32 may help), or logits_fn returned "
            "NaN or excluded every id"
        )
