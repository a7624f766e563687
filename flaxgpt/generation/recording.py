"""A reading function for the decoding loop that replaces and records intermediate values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from flaxgpt.cache import KVCache
from flaxgpt.config import GPTConfig
from flaxgpt.generation.decoding import Read
from flaxgpt.model.gpt import make_model
from flaxgpt.model.intermediates import Intervention
from flaxgpt.model.visits import Visits
from flaxgpt.platform import Platform
from flaxgpt.typing import Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "length", "start", "seen"),
    meta_fields=("layout",),
)
@dataclasses.dataclass(frozen=True)
class RecordingCache(KVCache):
    """A cache that also keeps intermediate values of the ids it has read.

    `take` and `repeat` leave them as they are.

    Attributes:
        seen: by name, the values at each slot, [B, ..., S, X]: two axes for attention weights,
            [B, N, S, S]. Empty before the first ids are read.
    """

    seen: dict[str, jax.Array]


def recording(cache: KVCache) -> RecordingCache:
    """Return an empty cache as one that records."""
    return RecordingCache(**vars(cache), seen={})


def observed_read(
    cfg: GPTConfig,
    platform: Platform,
    params: Params,
    wanted: Collection[str],
    patches: Mapping[str, Intervention],
) -> Read:
    """Return the model's reading function, with some values replaced and some recorded.

    All prompts are read at once, because a patch may treat rows differently.

    Args:
        cfg: the configuration.
        platform: choices without copies of rows.
        params: parameters whose projections are not fused.
        wanted: intermediates to record; the cache is a `RecordingCache` if there are any.
        patches: the function to apply to each intermediate.
    """
    whole = "logits" in {*wanted, *patches}  # else only the last position's are computed

    def of_model(model: Any, ids: jax.Array, last: Any, cache: KVCache) -> Any:
        states, cache = model.states(ids, cache)
        at_last = partial(lax.dynamic_index_in_dim, index=last, axis=1, keepdims=False)
        return at_last(model.logits(states)) if whole else model.logits(at_last(states)), cache

    def read(ids: jax.Array, last: Any, cache: KVCache) -> tuple[jax.Array, KVCache]:
        visits = Visits(cfg, wanted, patches)
        model = make_model(cfg, cache.keys[0].dtype, platform=platform)
        with nn.intercept_methods(visits):
            logits, after = model.apply({"params": params}, ids, last, cache, method=of_model)
        if isinstance(after, RecordingCache):
            seen = {
                name: _written(name, after.seen.get(name), value, cache)
                for name, value in visits.found.items()
            }
            after = dataclasses.replace(after, seen=seen)
        return logits, after

    return read


def _written(name: str, buffer: jax.Array | None, value: jax.Array, cache: KVCache) -> jax.Array:
    """Return the record of an intermediate with the value at the slots that follow a cache."""
    if buffer is None:
        *outer, _, size = value.shape
        size = cache.size if is_weights(name) else size
        buffer = jnp.zeros((*outer, cache.size, size), value.dtype)
    # The slots are within the cache, so the update is not clamped.
    first = jnp.asarray(cache.length, jnp.int32)
    places = [jnp.int32(0)] * (value.ndim - 2) + [first, jnp.int32(0)]
    return lax.dynamic_update_slice(buffer, value, places)


def is_weights(name: str) -> bool:
    """Whether an intermediate is a block's attention weights, with an axis of keys."""
    return name.endswith("/att/weights")
