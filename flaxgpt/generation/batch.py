"""`generate`: prompts in, new ids out, a whole batch per call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.beam_options import (
    Beam,
    BeamOptions,
    EarlyStopping,
    refuse_with_beams,
)
from flaxgpt.generation.drafting import Draft, Drafting
from flaxgpt.generation.grammar import Grammar
from flaxgpt.generation.hooks import LogitsFn
from flaxgpt.generation.log_probs import ScoredIds, check_alternatives, scored_rows
from flaxgpt.generation.observed import ObservedIds, check_watch
from flaxgpt.generation.prefix import Prefix
from flaxgpt.generation.programs import compiled_decode, compiled_search
from flaxgpt.generation.prompts import Prepared, check_number, check_places, prepare
from flaxgpt.generation.sampling import NOT_A_NUMBER, Sampling
from flaxgpt.model.intermediates import Intervention
from flaxgpt.typing import Params


@overload
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
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    allowed: ArrayLike | None = None,
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: Grammar | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    return_beams: None = None,
    return_logprobs: Literal[False] = False,
    top_logprobs: int = 0,
    capture: None = None,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]: ...


@overload
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
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    allowed: ArrayLike | None = None,
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: Grammar | None = None,
    return_logprobs: Literal[True],
    top_logprobs: int = 0,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[ScoredIds]: ...


@overload
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
    allowed: ArrayLike | None = None,
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: Grammar | None = None,
    capture: Iterable[str],
    patches: Mapping[str, Intervention] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[ObservedIds]: ...


@overload
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
    allowed: ArrayLike | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    return_beams: int,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[list[Beam]]: ...


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
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    allowed: ArrayLike | None = None,
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: Grammar | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    return_beams: int | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    capture: Iterable[str] | None = None,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]] | list[list[Beam]] | list[ScoredIds] | list[ObservedIds]:
    """Continue every prompt and return the new ids only.

    In float32, a row gets the same ids in a batch as alone, unless two ids are equally likely up to
    rounding. (For random sampling this holds with JAX's default keys, threefry; `rbg` keys draw
    differently in a batch.) In bfloat16 and float16 the ids can differ, because the matrix products
    of a batch are blocked differently, so they round differently. The same holds for int8 weights
    (`flaxgpt.quantize`), whose products round activations. Where prompt and new ids outgrow
    `cfg.context_length`, the model reads the last `context_length` of them with positions counted
    from 0, as the book's `generate_text_simple` does (section 4.7).

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        prompts: int [B, T], or B lists of ids of any lengths, 1 or more.
        max_new_tokens: new ids per row, 1 or more; a row that meets a stop id has fewer.
        temperature: 0 chooses the most likely id; otherwise logits are divided by it before
            sampling.
        top_k: sample from the k most likely ids only; None for all.
        top_p: sample from the most likely ids that together reach this probability; None for all.
        key: a JAX random key, from which row i uses `fold_in(key, i)`, or an array of B keys, one
            per row. Each id folds in the number of ids chosen before it. Required if
            temperature > 0.
        samples: continuations of each prompt, which is read once for all of them. The result and
            the keys are those of a list of prompts in which each is repeated that many times in a
            row. 2 or more require temperature > 0.
        stop_ids: ids that end a row; the row includes the stop id.
        allowed: bool [V], ids that may be chosen; None for all. Top-k and top-p count only these.
        logits_fn: a pure function `logits_fn(ids, length, logits) -> logits` of the text so far,
            traced into the loop, which is compiled once per function object;
            `flaxgpt.generation.hooks` describes it and has a number of them.
        min_new_tokens: new ids before which no stop id is chosen.
        match: a grammar from `flaxgpt.generation.compile_grammar`. The new ids of each row are a
            whole match, then one of the grammar's stop ids if `max_new_tokens` leaves room. An id
            after which no match would fit is excluded. Does not work with `allowed` and
            `min_new_tokens`.
        beams: 2 or more select beam search, which extends that many continuations of each row in
            parallel and returns the one with the highest score; 1 is greedy decoding or sampling.
            Beam search requires temperature 0, without top-k and top-p.
        length_penalty: the score of a continuation is the sum of its ids' log-probabilities over
            its length to this power: above 0 favors longer ones, 0 and below shorter ones. This is
            Hugging Face's form of the length normalization of Wu et al. 2016 (section 7), without
            its constant 5. Probabilities are those of all ids, also with `allowed`.
        early_stopping: when beam search is done with a row, at the earliest when `beams` of its
            continuations have met a stop id. True: at once. False: when the best running one scores
            no better than the worst of these at its present length. "never": when it cannot score
            better at any length up to `max_new_tokens`.
        return_beams: how many of the best continuations to return, with scores; at most `beams`.
            None returns the ids of the best.
        return_logprobs: whether to return the log-probability of each new id, which is the model's:
            from its logits as they are, before `logits_fn`, temperature and filters.
        top_logprobs: how many of the most likely ids to return with it, at most `cfg.vocab_size`.
        capture: names of intermediate values to return with the ids, as for `select` of
            `flaxgpt.activations`. They are recorded in the loop, from the same computations that
            choose the ids. Prompt and new ids must fit the context.
        patches: interventions, as for `flaxgpt.patch`: by name, a function from a value to its
            replacement, which is applied to every position once, when it is read. For functions
            that treat all positions alike, the ids follow from the logits of `patch` for the whole
            text. A function sees the positions read together: first [B, T, ...] of all prompts,
            padded on both sides, then [B * samples, 1, ...] of new ids; attention weights have an
            axis S of the prompts' columns, then of the cache's slots. It is compiled once per
            function object; `jax.tree_util.Partial(function, array)` binds arrays that may change.
        lookup: how many ids to draft per step from what followed the latest ids of the row earlier
            in its text; None for none. One step verifies them all, which is faster for text that
            repeats itself. In float32 it changes no id, unless two are equally likely up to
            rounding; in other dtypes and with int8 weights, ids can differ as in a batch.
        draft: a small model that drafts ids instead, `(cfg, params)` of the same vocabulary, with
            the same effect on the ids.
        draft_length: how many ids it drafts per step.
        window_step: past the end of the context, how many ids are chosen with each reading of the
            last ids. 1 reads the last `context_length` ids for each new one. With n, the last
            `context_length - n + 1` are read, and n - 1 more steps extend the cache: much faster,
            with up to n - 1 fewer ids in view.
        prefix: what all prompts begin with, from `flaxgpt.prefill` with the same `cfg`, `params`
            and `dtype`, so that only the ids that follow are read. The result is the same, up to
            rounding. Prompts include the ids of the prefix and must fit the context.
        dtype: dtype to compute in: float32, bfloat16 or float16.

    Returns:
        B * samples lists of at most `max_new_tokens` ids. With `return_beams`, B lists of that many
        `flaxgpt.generation.Beam`, best first; with `return_logprobs`, B * samples
        `flaxgpt.generation.ScoredIds`; with `capture`, B `flaxgpt.generation.ObservedIds`.

    Raises:
        ValueError: an argument is out of range, params do not fit, or the logits become NaN.
    """
    drafting = Drafting(lookup, draft, draft_length)
    options = BeamOptions(beams, length_penalty, early_stopping, return_beams)
    options.check_sampling(temperature, top_k, top_p)
    if options.is_search:
        refuse_with_beams(
            logits_fn=logits_fn,
            min_new_tokens=min_new_tokens,
            match=match,
            return_logprobs=return_logprobs,
            capture=capture is not None,
            patches=patches is not None,
            lookup=lookup,
            draft=draft,
            window_step=None if window_step == 1 else window_step,
            samples=None if samples == 1 else samples,
        )
    sampling = Sampling(
        temperature, top_k, top_p, key, stop_ids, allowed, logits_fn, min_new_tokens, match
    )
    check_config(cfg)
    alternatives = check_alternatives(cfg.vocab_size, return_logprobs, top_logprobs)
    watch = check_watch(
        cfg, capture, patches, return_logprobs=return_logprobs, window_step=window_step
    )
    prepared = prepare(
        cfg,
        params,
        prompts,
        max_new_tokens,
        sampling,
        dtype,
        alternatives=alternatives,
        window_step=window_step,
        watch=watch,
        samples=samples,
        prefix=prefix,
    )
    program, params, request, ids, start = prepared
    rows_in_loop = len(ids) * program.plan.samples
    # Beam search keeps running and finished continuations.
    places = rows_in_loop * program.plan.width * (2 * options.beams if options.is_search else 1)
    places *= 1 if alternatives is None else 2 + 2 * alternatives
    other = "fewer beams" if options.is_search else "`stream`, which keeps only the context"
    check_places(places, rows_in_loop, max_new_tokens, f"use {other}")
    if options.is_search:
        options.check_sizes(sampling, cfg.vocab_size, max_new_tokens)
        return _search(prepared, options)
    watch.check_size(cfg, len(ids), min(program.plan.width, cfg.context_length), program.dtype)
    if drafting.is_on:
        out, _ = drafting.add_to(prepared).decode()
    else:
        decode = compiled_decode(program.platform.decode_options)
        out = decode(program, params, request, ids, start)
    out, recorded = out if isinstance(out, tuple) else (out, {})
    out = np.asarray(out)
    new = out[:, request.prompt_length : request.final_length]
    ends = {NOT_A_NUMBER, *sampling.stop_ids}
    rows = []
    for i, row in enumerate(new[: request.rows].tolist()):
        length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
        check_number(row[length - 1], i, length - 1)
        rows.append(row[:length])
    first = int(request.prompt_length)
    if watch.names is not None:
        return watch.rows(rows, recorded, start.tolist(), first)
    return rows if alternatives is None else scored_rows(rows, recorded, first)


def _search(prepared: Prepared, options: BeamOptions) -> list[list[int]] | list[list[Beam]]:
    program, params, request, ids, start = prepared
    search = compiled_search(program.platform.decode_options)
    finished = search(program, options.beams, params, request, options.rules(), ids, start)
    found = options.found(finished, request)
    return [row[0].ids for row in found] if options.return_beams is None else found
