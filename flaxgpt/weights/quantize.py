"""int8 weights with a scale per row, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxgpt._quantized import SCALE, is_quantized
from flaxgpt.model.int8 import quantize_rows, restore_rows
from flaxgpt.sharding import automatic
from flaxgpt.typing import Params


def quantize(params: Params) -> Params:
    """Return parameters with int8 weights, a quarter of the size, for everything but training.

    Each row of a weight matrix, which belongs to one output or token, is divided by its largest
    absolute value over 127 and rounded: "vector-wise quantization" (Dettmers et al. 2022,
    "LLM.int8()", section 2), without the decomposition for outliers. The activations that are
    multiplied by them are rounded in the same way, a row at a time, as they are computed. Biases
    and norms stay as they are.

    Pure, and compatible with `jit` and `eval_shape`.

    >>> import flaxgpt, jax
    >>> cfg = flaxgpt.GPTConfig(emb_dim=8, n_heads=2, n_layers=1)
    >>> params = flaxgpt.quantize(flaxgpt.init(cfg, jax.random.key(0)))
    >>> {name: leaf.dtype.name for name, leaf in params["tok_emb"].items()}
    {'weight': 'int8', 'weight_scale': 'float32'}

    Args:
        params: parameters of any configuration, in float32, bfloat16 or float16.

    Returns:
        The same tree, in which each "weight" is int8, with a float32 "weight_scale" [rows] beside
        it. `forward`, `generate`, `score`, `save` and the other functions accept it as it is.

    Raises:
        ValueError: there are no weights, or some are int8 already.
    """
    if is_quantized(params):
        raise ValueError("params have int8 weights already: flaxgpt.dequantize restores floats")
    changed = _change(params, "weight", _quantized)
    if not is_quantized(changed):
        raise ValueError(
            "params have no weights to quantize: pass a nested dict as flaxgpt.init returns it"
        )
    return changed


def dequantize(params: Params) -> Params:
    """Return parameters with float32 weights instead of int8 ones.

    They differ from the original ones by up to half a scale; see `quantize`. Where no weight is
    int8, the parameters are returned unchanged. Pure, and compatible with `jit`.

    Args:
        params: parameters, as `quantize` returns them.

    Returns:
        The same tree without scales.
    """
    return _change(params, SCALE, _dequantized)


def _change(tree: Any, name: str, convert: Callable[..., Params]) -> Any:
    """Return a tree in which every dict that has a name is converted."""
    if not isinstance(tree, dict):
        return tree
    if name in tree and not isinstance(tree[name], dict):
        return convert(**tree)
    return {key: _change(part, name, convert) for key, part in tree.items()}


def _quantized(weight: jax.Array, **others: Any) -> Params:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"a weight has dtype {weight.dtype}: only floating-point ones are rounded")
    rows, scales = _quantize_rows(weight)
    return {**others, "weight": rows, SCALE: scales}


def _dequantized(weight: jax.Array, weight_scale: jax.Array, **others: Any) -> Params:
    return {**others, "weight": _restore_rows(weight, weight_scale)}


_quantize_rows = automatic(jax.jit(quantize_rows))
_restore_rows = automatic(jax.jit(restore_rows))
