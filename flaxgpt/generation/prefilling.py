"""`prefill`: the ids that prompts begin with, read once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, check_params, check_vocabulary
from flaxgpt.cache import KVCache, init_cache
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.loop_params import loop_params
from flaxgpt.generation.prefix import Prefix
from flaxgpt.generation.prompts import bucket, unread_columns
from flaxgpt.model import param_shapes
from flaxgpt.model.gpt import apply_states
from flaxgpt.platform import Platform, platform_of
from flaxgpt.sharding import Mesh, in_force, mesh_of, to_automatic
from flaxgpt.typing import Params


def prefill(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike | Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Prefix:
    """Read the ids that prompts begin with, so that `generate` reads only what follows.

    `generate(cfg, params, prompts, ..., prefix=prefix)` returns what it returns without the prefix,
    up to rounding. Prompts include the ids of the prefix. A prefix serves any number of calls, of
    any batch size, with the same `cfg`, `params` and `dtype`. Whether the parameters still have the
    values that the prefix was computed with is not checked. Compiled once per size class of the
    length, as `generate`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [T], or a list of ids: 1 or more, at most `cfg.context_length`.
        dtype: dtype to compute in, that of the calls that use the prefix.

    Returns:
        A `flaxgpt.Prefix`, with keys and values for `T` ids, rounded up to a size class.

    Raises:
        ValueError: `ids` are not a flat list of ids that the model can read at once, or `params` do
            not fit the configuration.
    """
    check_config(cfg)
    check_params(param_shapes(cfg), params)
    return read_prefix(cfg, params, check_prefix_ids(cfg, ids), check_dtype(dtype))


def check_prefix_ids(cfg: GPTConfig, ids: Any) -> np.ndarray:
    """Return the ids of a prefix as int32 [T], or raise ValueError."""
    if isinstance(ids, jax.core.Tracer):
        raise ValueError("ids must be concrete: prefill runs on the host, not inside jit")
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"prefill takes a flat list of ids, got {ids!r}")
    try:
        row = np.asarray(ids if isinstance(ids, (np.ndarray, jax.Array)) else list(ids))
    except ValueError as error:
        raise ValueError("ids must be a flat list of integers, not of rows") from error
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(
            f"ids of shape {row.shape} and dtype {row.dtype} must be a flat list of one or more "
            "integers"
        )
    if row.size > cfg.context_length:
        raise ValueError(
            f"{row.size} ids exceed context_length={cfg.context_length}: a prefix must fit the "
            "context"
        )
    check_vocabulary(cfg.vocab_size, row)
    return row.astype(np.int32)


def read_prefix(
    cfg: GPTConfig, params: Params, ids: np.ndarray, dtype: Any, known: Prefix | None = None
) -> Prefix:
    """Return the prefix for ids, int32 [T], reading only those that `known` does not begin with."""
    params = to_automatic(params)
    platform = platform_of(params)
    size = min(bucket(len(ids)), cfg.context_length)
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(ids)] = ids
    columns, cache = slice(0, size), None
    if known is not None and (shared := known.shared(ids)):
        columns = unread_columns(shared, len(ids), size)
        cache = known.first(columns.start)
    cache = _read(
        cfg,
        (platform, dtype, mesh_of(params), size),
        loop_params(platform, dtype, params),
        cache,
        padded[:, columns],
        np.int32(len(ids)),
    )
    return Prefix(tuple(ids.tolist()), cache)


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    cfg: GPTConfig,
    static: tuple[Platform, Any, Mesh | None, int],
    params: Params,
    known: KVCache | None,
    unread: jax.Array,  # int32 [1, T], which follow what is known
    length: jax.Array,  # int32 [], ids in all
) -> KVCache:
    platform, dtype, mesh, size = static
    with in_force(mesh):
        if known is None:
            cache = init_cache(cfg, 1, size, dtype, layout=platform.cache_layout).rewind(0)
        else:
            cache = known.place(jnp.zeros(1, jnp.int32), size)
        _, cache = apply_states(cfg, platform, params, unread, cache)
        return cache.rewind(length)
