"""`generate`: prompts in, new ids out, a whole batch per call."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.generation.programs import compiled_decode
from flaxgpt.generation.prompts import check_number, prepare
from flaxgpt.generation.sampling import NOT_A_NUMBER, Sampling
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
    allowed: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[list[int]]:
    """Continue every prompt and return the new ids only.

    In float32, a row gets the same ids in a batch as alone, unless two ids are equally likely up to
    rounding. (For random sampling this holds with JAX's default keys, threefry; `rbg` keys draw
    differently in a batch.) In bfloat16 and float16 the ids can differ, because the matrix products
    of a batch are blocked differently, so they round differently. Where prompt and new ids
    outgrow `cfg.context_length`, the model reads the last `context_length` of them with positions
    counted from 0, as the book's `generate_text_simple` does (section 4.7).

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
        stop_ids: ids that end a row; the row includes the stop id.
        allowed: bool [V], ids that may be chosen; None for all. Top-k and top-p count only these.
        dtype: dtype to compute in: float32, bfloat16 or float16.

    Returns:
        B lists of at most `max_new_tokens` ids.

    Raises:
        ValueError: an argument is out of range, params do not fit, or the logits become NaN.
    """
    sampling = Sampling(temperature, top_k, top_p, key, stop_ids, allowed)
    program, params, request, ids, start = prepare(
        cfg, params, prompts, max_new_tokens, sampling, dtype
    )
    places = len(ids) * program.plan.width
    if places > 2**28:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} for {len(ids)} rows needs "
            f"{places * 4 / 2**30:.1f} GiB for the ids alone: ask for fewer, or use "
            "`stream`, which keeps only the context"
        )
    decode = compiled_decode(program.platform.decode_options)
    out = np.asarray(decode(program, params, request, ids, start))
    new = out[:, request.prompt_length : request.final_length]
    ends = {NOT_A_NUMBER, *sampling.stop_ids}
    rows = []
    for i, row in enumerate(new[: request.rows].tolist()):
        length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
        check_number(row[length - 1], i, length - 1)
        rows.append(row[:length])
    return rows
