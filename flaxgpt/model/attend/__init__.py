"""Attention over keys and values: one function, one file per implementation behind it.

    plain         products and a softmax in `jax.numpy`; leaves out blocks of invisible keys
    dot_product   `jax.nn.dot_product_attention`

To add an implementation, write a function like those two, enter it in `IMPLEMENTATIONS`, and name
it in `flaxgpt.platform` where it should be the default.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from flaxgpt._checks import unknown_name
from flaxgpt.model.attend.dot_product import dot_product_attend
from flaxgpt.model.attend.plain import attention_weights, mean_of_values, plain_attend, query_blocks
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform

__all__ = ["attend", "attention_weights", "mean_of_values", "query_blocks", "resolve_attention"]

IMPLEMENTATIONS = {"plain": plain_attend, "dot_product": dot_product_attend}


def attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, S, H], or [B*N, S, H] from a cache of merged layout
    values: jax.Array,  # as keys
    visibility: Visibility,
    *,
    dropout: Callable[[tuple[int, ...]], jax.Array] | None = None,
    implementation: str = "plain",  # a name in `IMPLEMENTATIONS`, from `resolve_attention`
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query (section 3.4).

    Scores and softmax are float32 whatever the dtype of the arguments. `dropout` draws the factor
    of each attention weight, 0 or 1 / (1 - rate), for a shape. A query that sees no key,
    such as padding, gets finite values of no meaning.
    """
    return IMPLEMENTATIONS[implementation](query, keys, values, visibility, dropout)


def resolve_attention(name: str, platform: Platform) -> str:
    """Return the implementation that `name` selects on a platform; call it outside `jit`."""
    if name == "auto":
        return platform.attention
    if name not in IMPLEMENTATIONS:
        raise unknown_name("attention implementation", name, (*IMPLEMENTATIONS, "auto"))
    return name
