"""The intermediate values of the forward pass, by name.

The names follow the modules, like those of the parameters:

    tok_emb                          [B, T, D]
    pos_emb                          [1, T, D]     [B, T, D] with a cache
    embeddings                       [B, T, D]     their sum, the start of the residual stream
    trf_blocks_0/norm1               [B, T, D]
    trf_blocks_0/att/query           [B, N, T, H]  and key, value
    trf_blocks_0/att/weights         [B, N, T, S]  after the softmax; a row sums to 1
    trf_blocks_0/att/heads           [B, N, T, H]  the weighted values of each head
    trf_blocks_0/att                 [B, T, D]     what attention adds to the stream
    trf_blocks_0/middle              [B, T, D]     the stream between attention and feed-forward
    trf_blocks_0/norm2               [B, T, D]
    trf_blocks_0/ff/wide             [B, T, F]     before GELU
    trf_blocks_0/ff/active           [B, T, F]     after it
    trf_blocks_0/ff                  [B, T, D]     what feed-forward adds to the stream
    trf_blocks_0                     [B, T, D]     the stream after the block; and so on
    final_norm                       [B, T, D]
    logits                           [B, T, V]

Hugging Face's hidden states are aliases: `hidden_0` is `embeddings`, `hidden_1` is `trf_blocks_0`,
and so on up to `hidden_L`, which is `final_norm`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from flaxgpt._checks import unknown_name
from flaxgpt.config import GPTConfig, check_config

Intervention = Callable[[jax.Array], ArrayLike]
"""A function from an intermediate value to its replacement of the same shape."""

_ATTENTION = ("att/query", "att/key", "att/value", "att/weights", "att/heads", "att")
_OF_A_BLOCK = ("norm1", *_ATTENTION, "middle", "norm2", "ff/wide", "ff/active", "ff")


def activation_names(cfg: GPTConfig) -> tuple[str, ...]:
    """Return the names of all intermediates, in the order in which they are computed.

    Args:
        cfg: the architecture.

    Returns:
        The names, without the aliases `hidden_i`.
    """
    check_config(cfg)
    within = [f"{block}/{name}" for block in cfg.block_names for name in (*_OF_A_BLOCK, "")]
    names = ["tok_emb", "pos_emb", "embeddings", *within, "final_norm", "logits"]
    return tuple(name.removesuffix("/") for name in names)


def all_places(cfg: GPTConfig) -> dict[str, str]:
    """Return the intermediate that each name or alias stands for."""
    places = {name: name for name in activation_names(cfg)}
    hidden = ["embeddings", *cfg.block_names[:-1], "final_norm"]
    return places | {f"hidden_{i}": place for i, place in enumerate(hidden)}


def selected_places(cfg: GPTConfig, option: str, names: Iterable[str]) -> dict[str, str]:
    """Return the intermediates that some names stand for, in the order of computation.

    Args:
        cfg: the architecture.
        option: the option that the names are given for, for errors.
        names: names or aliases, in which `*` matches any characters.

    Raises:
        ValueError: `names` is not a list of names, or one is unknown.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(
            f"{option}={names!r} must be a list of names; for one name, use [{names!r}]"
        )
    places = all_places(cfg)
    wanted: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{option} has {name!r}, which is not the name of an intermediate")
        wanted.update(fnmatch.filter(places, name) or [_known(cfg, places, name)])
    return {name: place for name, place in places.items() if name in wanted}


def check_patches(cfg: GPTConfig, patches: Any) -> dict[str, Intervention]:
    """Return the function that is applied to each intermediate, or raise ValueError."""
    if not isinstance(patches, Mapping):
        raise ValueError(f"patches must be a dict of name: function, got {type(patches).__name__}")
    places = all_places(cfg)
    functions: dict[str, Intervention] = {}
    for name, function in patches.items():
        place = places[_known(cfg, places, name)]
        if not callable(function):
            raise ValueError(
                f"the patch of {name} must be a function of the value there, got "
                f"{type(function).__name__}: to insert a fixed value, use lambda _: value"
            )
        if place in functions:
            raise ValueError(f"{name} is {place}, which already has a patch: combine the two")
        functions[place] = function
    return functions


def _known(cfg: GPTConfig, places: Mapping[str, str], name: str) -> str:
    if name not in places:
        advice = f"flaxgpt.activation_names(cfg) lists those of the {cfg.n_layers} blocks"
        raise unknown_name("intermediate", name, places, advice)
    return name
