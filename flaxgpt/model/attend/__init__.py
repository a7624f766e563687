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

__all__ = [
    "IMPLEMENTATIONS",
    "Dropout",
    "attend",
    "attention_weights",
    "mean_of_values",
    "query_blocks",
    "resolve_attention",
]

Dropout = Callable[[tuple[int, ...]], jax.Array]
"""Draws the factor of each attention weight, 0 or 1 / (1 - rate), for a shape."""

IMPLEMENTATIONS = {"plain": plain_attend, "dot_product": dot_product_attend}


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visibility: Visibility,
    *,
    dropout: Dropout | None = None,
    implementation: str = "plain",
) -> jax.Array:
    """Return the mean of the values, weighted by how well keys match each query (section 3.4).

    Scores and softmax are float32 whatever the dtype of the arguments.

    Args:
        query: [B, N, T, H].
        keys: [B, N, S, H].
        values: [B, N, S, H].
        visibility: which keys each query sees. A query that sees none, such as padding, gets
            finite values of no meaning.
        dropout: draws the factors of the attention weights; None for no dropout.
        implementation: a name in `IMPLEMENTATIONS`, already resolved by `resolve_attention`.

    Returns:
        [B, N, T, H].
    """
    return IMPLEMENTATIONS[implementation](query, keys, values, visibility, dropout)


def resolve_attention(name: str, platform: Platform) -> str:
    """Return the implementation that `name` selects on a platform; call it outside `jit`.

    Raises:
        ValueError: there is no such implementation.
    """
    if name == "auto":
        return platform.attention
    if name not in IMPLEMENTATIONS:
        raise unknown_name("attention implementation", name, (*IMPLEMENTATIONS, "auto"))
    return name
