"""Attention over keys and values: one function, one file per implementation behind it.

    plain         products and a softmax in `jax.numpy`; leaves out blocks of invisible keys
    dot_product   `jax.nn.dot_product_attention`, on NVIDIA GPUs by cuDNN
    splash        JAX's flash attention for TPU, a kernel

`plain` can do everything. The others leave to it dropout on attention weights and queries that
follow keys in a cache, and `dot_product` also padding, so every implementation follows the same
rule. `flaxgpt.platform` names the one that is the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from flaxgpt._checks import unknown_name
from flaxgpt.model.attend.dot_product import dot_product_attend
from flaxgpt.model.attend.joined import by_head
from flaxgpt.model.attend.plain import (
    attention_weights,
    mean_of_values,
    plain_attend,
    query_blocks,
    weights_by_head,
)
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform

__all__ = [
    "attend",
    "attention_weights",
    "by_head",
    "mean_of_values",
    "query_blocks",
    "resolve_attention",
    "weights_by_head",
]

IMPLEMENTATIONS = ("plain", "dot_product", "splash")
_FEWEST_FOR_SPLASH = 128  # queries, below which the weights are small anyway


def attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H], or from a cache also [B*N, S, H] or [B, S, N*H]
    values: jax.Array,  # as keys
    visibility: Visibility,
    platform: Platform,
    *,
    dropout: Callable[[tuple[int, ...]], jax.Array] | None = None,
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query (section 3.4).

    Scores and softmax are float32 whatever the dtype of the arguments. `dropout` draws the factor
    of each attention weight, 0 or 1 / (1 - rate), for a shape. A query that sees no key,
    such as padding, gets finite values of no meaning.
    """
    implementation = platform.attention_in(query.dtype)
    if dropout is not None or visibility.offset is not None:
        implementation = "plain"
    if implementation == "dot_product" and visibility.start is None:
        return dot_product_attend(query, keys, values, visibility, cudnn=platform.cudnn)
    if implementation == "splash" and query.shape[2] >= _FEWEST_FOR_SPLASH:
        # Imported where it is used: it takes a quarter of a second, which other platforms save.
        from flaxgpt.model.attend.splash import splash_attend

        return splash_attend(query, keys, values, visibility, interpret=platform.interpreted)
    least = platform.rows_in(query.dtype)
    return plain_attend(query, keys, values, visibility, dropout, least)


def resolve_attention(name: str, platform: Platform, dtype: DTypeLike) -> Platform:
    """Return a platform's choices with attention by `name`; call it outside `jit`."""
    if name == "auto":
        return platform
    if name not in IMPLEMENTATIONS:
        raise unknown_name("attention implementation", name, (*IMPLEMENTATIONS, "auto"))
    return dataclasses.replace(platform, attention=((jax.numpy.dtype(dtype).name, name),))
