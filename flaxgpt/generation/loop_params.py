"""Parameters as the decoding loop reads them, made once instead of in each step."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flaxgpt.model.attention import FUSED, PROJECTIONS
from flaxgpt.platform import Platform
from flaxgpt.typing import Params


def loop_params(platform: Platform, dtype: Any, params: Params) -> Params:
    """Return the parameters in the form in which a platform decodes best.

    Args:
        platform: the choices for the devices that hold them.
        dtype: dtype to compute in.
        params: parameters of any configuration.
    """
    if dtype != jnp.float32:
        params = cast_for_products(params, dtype)
    return fuse_projections(params) if platform.fused_qkv else params


def cast_for_products(params: Params, dtype: Any) -> Params:
    """Return the parameters with weights and biases in `dtype`; what has it is not copied.

    int8 weights and their scales stay as they are.
    """
    # Biases would be converted in each step otherwise. Norms are computed in float32.
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    chosen = [
        i
        for i, (path, leaf) in enumerate(paths)
        if leaf.dtype not in (dtype, jnp.int8) and (leaf.ndim > 1 or path[-1].key == "bias")
    ]
    for i, leaf in zip(chosen, _cast([leaves[i] for i in chosen], dtype), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


@partial(jax.jit, static_argnums=1)
def _cast(leaves: list[jax.Array], dtype: Any) -> list[jax.Array]:
    return [leaf.astype(dtype) for leaf in leaves]


def fuse_projections(params: Params) -> Params:
    """Return the parameters with query, key and value of each block as one projection, `W_qkv`."""

    def fuse(block: Params) -> Params:
        apart = [block["att"][name] for name in PROJECTIONS]
        others = {k: v for k, v in block["att"].items() if k not in PROJECTIONS}
        return {**block, "att": {**others, FUSED: _concatenate(apart)}}

    return {name: fuse(part) if "att" in part else part for name, part in params.items()}


@jax.jit
def _concatenate(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
