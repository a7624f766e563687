"""`stream`: one prompt in, new ids out one at a time, as they are generated; also for a batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation import programs
from flaxgpt.generation.drafting import Draft, Drafting, Speculative
from flaxgpt.generation.grammar import Grammar
from flaxgpt.generation.hooks import LogitsFn
from flaxgpt.generation.observed import Watch, check_watch
from flaxgpt.generation.prefix import Prefix
from flaxgpt.generation.prompts import Prepared, bucket, check_number, check_places, prepare
from flaxgpt.generation.sampling import Sampling
from flaxgpt.model.intermediates import Intervention
from flaxgpt.typing import Params


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
    allowed: ArrayLike | None = None,
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: Grammar | None = None,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[int]:
    """Continue one prompt and yield each new id as it is generated.

    The ids are those of `generate(cfg, params, [prompt], ...)` with the same arguments, unless two
    ids are equally likely up to rounding; see there for the arguments not listed here. Arguments
    are checked at the call, before the first id is requested. Memory stays that of one context,
    however many ids are requested, and with `logits_fn`, `match` or `min_new_tokens` also the ids.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        prompt: int [T], or a list of 1 or more ids.
        max_new_tokens: new ids to yield at most, 1 or more.
        key: a JAX random key, used as `generate` uses it for row 0, or an array of one key.
        lookup: as in `generate`, like `draft`: a step then yields several ids where drafts are
            right.

    Yields:
        At most `max_new_tokens` ids.

    Raises:
        ValueError: an argument is invalid, or, while iterating, the logits become NaN.
    """
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        raise ValueError(f"stream takes the ids of one prompt, a flat list of ints, got {prompt!r}")
    sampling = Sampling(
        temperature, top_k, top_p, key, stop_ids, allowed, logits_fn, min_new_tokens, match
    )
    check_config(cfg)
    watch = check_watch(cfg, None, patches)
    (row,) = stream_rows(
        cfg,
        params,
        [prompt],
        max_new_tokens,
        sampling,
        dtype,
        window_step=window_step,
        watch=watch,
        prefix=prefix,
        drafting=Drafting(lookup, draft, draft_length),
    )
    return row


def stream_rows(
    cfg: GPTConfig,
    params: Params,
    prompts: Sequence[ArrayLike | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    dtype: DTypeLike,
    *,
    window_step: int = 1,
    watch: Watch | None = None,
    samples: int = 1,
    prefix: Prefix | None = None,
    drafting: Drafting | None = None,
) -> list[Iterator[int]]:
    """Continue a batch of prompts and return an iterator over the new ids of each.

    The whole batch takes a step when any of the iterators needs an id that does not exist yet, and
    keeps the ids of the others for them. They can be read one after another: generation ends where
    the last one stops being read.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        prompts: B lists of ids of any lengths, 1 or more.
        max_new_tokens: new ids per row at most, 1 or more.
        sampling: how ids are chosen, and the ids that end a row.
        window_step: ids per reading of the last ids past the context; see `generate`.
        dtype: dtype to compute in.
        watch: the intermediate values to replace.
        samples: rows that continue each prompt; see `generate`.
        prefix: what all prompts begin with; see `generate`.
        drafting: whether ids are drafted.

    Raises:
        ValueError: an argument is invalid, or, while iterating, the logits of that row become NaN.
    """
    prepared = prepare(
        cfg,
        params,
        prompts,
        max_new_tokens,
        sampling,
        dtype,
        window_step=window_step,
        watch=watch,
        samples=samples,
        prefix=prefix,
    )
    plan = prepared.program.plan
    if prepared.request.logits_fn is None:
        plan = dataclasses.replace(plan, width=min(plan.width, bucket(cfg.context_length + 1)))
    else:  # a hook reads the whole text
        rows, advice = samples * len(prepared.ids), "leave out logits_fn, min_new_tokens and match"
        check_places(rows * plan.width, rows, max_new_tokens, advice)
    prepared = prepared._replace(program=dataclasses.replace(prepared.program, plan=plan))
    speculative = drafting.add_to(prepared) if drafting is not None and drafting.is_on else None
    copies = itertools.tee(_steps(prepared, speculative), samples * len(prompts))
    stop_ids = frozenset(sampling.stop_ids)
    return [_row(steps, row, stop_ids) for row, steps in enumerate(copies)]


def _row(steps: Iterator[list[list[int]]], row: int, stop_ids: frozenset[int]) -> Iterator[int]:
    for count, token in enumerate(itertools.chain.from_iterable(new[row] for new in steps)):
        check_number(token, row, count)
        yield token
        if token in stop_ids:
            return


def _steps(prepared: Prepared, speculative: Speculative | None) -> Iterator[list[list[int]]]:
    """Yield the new ids of each row, one step at a time."""
    program, params, request, ids, start = prepared
    context_length = program.plan.context_length
    prompt_length, final_length = int(request.prompt_length), int(request.final_length)
    if speculative is None:
        state, new = programs.prefill(program, params, request, ids, start)
        yield np.asarray(new)[:, None].tolist()
        filled = prompt_length + 1  # columns of `state.ids`
    else:
        state = yield from speculative.steps()
        filled = min(final_length, context_length + 1)
    request = dataclasses.replace(request, prefix=None, unread=None)  # read by now
    read = filled - 1  # slots of the cache
    for _ in range(final_length - filled):
        if filled == program.plan.width:
            state, request = programs.keep_last_window(program.plan, request, state)
            filled = context_length
        step, read = programs.extend_step, read + 1
        if read > context_length:
            step, read = programs.window_step, program.plan.window
        state, new = step(program, params, request, state)
        filled += 1
        yield np.asarray(new)[:, None].tolist()
