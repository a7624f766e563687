"""int8 weights in a tree of parameters, which `flaxgpt.quantize` makes: names and checks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALE = "weight_scale"
"""The name of the scales of an int8 weight, beside "weight" in the same dict of parameters."""

Leaves = dict[tuple[Any, ...], Any]
"""The arrays of a tree by their paths."""

_SCALE_KEY, _WEIGHT_KEY = jax.tree_util.DictKey(SCALE), jax.tree_util.DictKey("weight")


def is_quantized(params: Any) -> bool:
    """Return whether some weights of a tree of parameters are int8."""
    if not isinstance(params, dict):
        return False
    return SCALE in params or any(map(is_quantized, params.values()))


def refuse_quantized(params: Any, purpose: str) -> None:
    """Raise ValueError for int8 weights, where only floating-point ones will do."""
    if is_quantized(params):
        raise ValueError(
            f"{purpose} needs floating-point weights, but params were quantized to int8 with "
            "flaxgpt.quantize: use the original ones, or flaxgpt.dequantize(params)"
        )


def take_scales(leaves: Leaves) -> Leaves:
    """Remove the scales from the arrays of a tree, and return them by the paths of the weights."""
    paths = [path for path in leaves if path[-1] == _SCALE_KEY]
    return {(*path[:-1], _WEIGHT_KEY): leaves.pop(path) for path in paths}


def dtype_faults(leaves: Leaves, scales: Leaves) -> list[str]:
    """Return what is wrong with the dtypes of parameters and with the scales of int8 weights."""
    faults = []
    for path, leaf in leaves.items():
        dtype, scale = getattr(leaf, "dtype", None), scales.get(path)
        if scale is None:
            if dtype is not None and not _is_float(dtype):
                faults.append(_not_float(path, dtype))
        elif dtype != np.int8:
            faults.append(f"{_name(path)}_scale belongs to an int8 weight, not {dtype}")
        elif (getattr(scale, "dtype", None), scale.shape) != (np.float32, leaf.shape[:1]):
            faults.append(
                f"{_name(path)}_scale is {scale.dtype}{list(scale.shape)} instead of "
                f"float32{list(leaf.shape[:1])}"
            )
    return faults + [f"unexpected {_name(path)}_scale" for path in scales if path not in leaves]


def _not_float(path: tuple[Any, ...], dtype: Any) -> str:
    if path[-1] == _WEIGHT_KEY and dtype == np.int8:
        name = _name(path)
        return f"{name} is int8 without {name}_scale: flaxgpt.quantize(params) returns both"
    return f"{_name(path)} is {dtype} instead of floating point"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
