"""A `Prefix`: what prompts begin with, read once, and the check that prompts begin with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxgpt.cache import KVCache, layer_shape
from flaxgpt.config import GPTConfig
from flaxgpt.platform import Platform
from flaxgpt.sharding import mesh_of
from flaxgpt.typing import Params


@partial(jax.tree_util.register_dataclass, data_fields=("cache",), meta_fields=("ids",))
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Ids that prompts begin with, and what a model has computed of them: a pytree.

    `flaxgpt.prefill` makes one. Any number of calls and rows can share it, because none changes it.

    Attributes:
        ids: the ids.
        cache: a `flaxgpt.KVCache` of one row that has read them.
    """

    ids: tuple[int, ...]
    cache: KVCache

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(leaf.nbytes for leaf in (*self.cache.keys, *self.cache.values))

    def first(self, length: int) -> KVCache:
        """Return the cache of the first ids, as an argument of a compiled function."""
        known: Any = np.int32(length)
        return dataclasses.replace(self.cache, length=known)

    def shared(self, row: np.ndarray) -> int:
        """Return how many ids at the start of a row, int32 [T], are those of the prefix."""
        size = min(len(self.ids), len(row))
        differing = np.flatnonzero(np.array(self.ids[:size], np.int32) != row[:size])
        return int(differing[0]) if differing.size else size

    def check_model(self, cfg: GPTConfig, params: Params, platform: Platform, dtype: Any) -> None:
        """Raise ValueError unless a model of this kind has made the prefix.

        Parameters of the same shapes on the same devices cannot be told apart.
        """
        cache = self.cache
        remake = "make it with `prefill` and the arguments of this call"
        shape = cache.keys[0].shape
        fitting = layer_shape(cfg, 1, cache.size, cache.layout)
        if (len(cache.keys), shape) != (cfg.n_layers, fitting) or cache.size > cfg.context_length:
            raise ValueError(
                f"the prefix has {len(cache.keys)} layers of shape {shape}, but the model has "
                f"{cfg.n_layers} layers, {cfg.n_heads} heads of {cfg.head_dim} and "
                f"context_length={cfg.context_length}: {remake}"
            )
        if cache.keys[0].dtype != dtype:
            raise ValueError(
                f"the prefix was computed in {cache.keys[0].dtype}, not in dtype={dtype}: {remake}"
            )
        if cache.layout != platform.cache_layout:
            raise ValueError(
                f'the prefix has the cache layout "{cache.layout}", but the devices of these '
                f'params use "{platform.cache_layout}": {remake}'
            )
        leaf = jax.tree.leaves(params)[0]
        if isinstance(leaf, jax.Array) and (
            mesh_of(params) != mesh_of(cache) or leaf.devices() != cache.keys[0].devices()
        ):
            raise ValueError(f"the prefix is on other devices than the params: {remake}")

    def check_prompts(self, cfg: GPTConfig, rows: Sequence[np.ndarray]) -> None:
        """Raise ValueError unless every prompt, int32 [T], fits and begins with the ids."""
        for i, row in enumerate(rows):
            if len(row) > cfg.context_length:
                raise ValueError(
                    f"prompt {i} has {len(row)} ids, more than context_length="
                    f"{cfg.context_length}, so that the model reads only its end: leave the prefix "
                    "out, or shorten the prompt"
                )
            shared = self.shared(row)
            if shared < len(self.ids):
                found = f"has {int(row[shared])}" if shared < len(row) else "ends"
                raise ValueError(
                    f"prompt {i} does not begin with the prefix: at place {shared}, the prefix has "
                    f"{self.ids[shared]}, but the prompt {found}. Prompts must include the ids of "
                    "the prefix. A tokenizer may split a longer text differently at the end of the "
                    "prefix: end the prefix after a whole word"
                )


def check_prefix(prefix: Any) -> Prefix:
    """Return a prefix, or raise ValueError for anything else."""
    if not isinstance(prefix, Prefix):
        raise ValueError(
            f"prefix must be a flaxgpt.Prefix, such as `prefill` returns, got "
            f"{type(prefix).__name__}"
        )
    return prefix
