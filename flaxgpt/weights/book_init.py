"""The initial weights of the book's `GPTModel` for a PyTorch seed, reproduced in NumPy.

The book prints the output of its untrained 124M model after `torch.manual_seed(123)`.
PyTorch on CPU draws them from MT19937 with legacy seeding, one 32-bit word at a time
(ATen/native/cpu/DistributionTemplates.h and ATen/core/TransformationHelper.h, PyTorch 2.13). NumPy
reproduces uniform draws to within 4e-9, most of them exactly, and normal draws to within 1e-6.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.model import param_shapes
from flaxgpt.typing import Params, Progress

_CHUNK = 1 << 22  # values drawn at once: fast, and small next to the weights


def book_params(cfg: GPTConfig, seed: int = 123, *, progress: Progress | None = None) -> Params:
    """Return the parameters of the book's model after `torch.manual_seed(seed); GPTModel(cfg)`.

    Args:
        cfg: an untied configuration; all of the book's are.
        seed: seed of `torch.manual_seed`, 0 to 2**32 - 1.
        progress: called with (parameters drawn, parameters to draw).

    Returns:
        A nested dict of float32 arrays.

    Raises:
        ValueError: a tied configuration, a seed out of range, or an embedding below 16 values.
    """
    check_config(cfg)
    if cfg.tie_embeddings:
        raise ValueError(
            "tie_embeddings=True: the book's model has a separate output head; use a book preset "
            "or tie_embeddings=False"
        )
    shapes = flatten_dict(param_shapes(cfg))
    drawn = sum(shapes[path].size for path in shapes if path[-1] in ("weight", "bias"))
    draws = _TorchDraws(seed, drawn, progress)
    width, wide = cfg.emb_dim, cfg.ff_dim

    def norm() -> Params:
        return {"scale": jnp.ones(width, jnp.float32), "shift": jnp.zeros(width, jnp.float32)}

    # The draws follow the order of construction in the book's GPTModel.
    params: Params = {
        "tok_emb": {"weight": draws.normal(cfg.vocab_size, width)},
        "pos_emb": {"weight": draws.normal(cfg.context_length, width)},
    }
    for name in cfg.block_names:
        projections = ("W_query", "W_key", "W_value")
        att = {key: draws.linear(width, width, bias=cfg.qkv_bias) for key in projections}
        params[name] = {
            "att": att | {"out_proj": draws.linear(width, width)},
            "ff": {"layers_0": draws.linear(wide, width), "layers_2": draws.linear(width, wide)},
            "norm1": norm(),
            "norm2": norm(),
        }
    params["final_norm"] = norm()
    params["out_head"] = draws.linear(cfg.vocab_size, width, bias=False)
    return params


class _TorchDraws:
    """PyTorch's CPU generator: a stream of 32-bit words."""

    def __init__(self, seed: int, total: int, progress: Progress | None) -> None:
        try:
            self._words = np.random.RandomState(operator.index(seed))
        except (TypeError, ValueError) as error:
            raise ValueError(f"seed={seed!r} must be a whole number, 0 to 2**32 - 1") from error
        self._progress = progress
        self._done, self._total = 0, total

    def linear(self, rows: int, columns: int, bias: bool = True) -> Params:
        """Draw `nn.Linear(columns, rows)`: weight and bias uniform in +-1/sqrt(columns)."""
        bound = 1 / math.sqrt(columns)
        # PyTorch fuses multiply and add; rounding once from float64 gives the same bits.
        low, high = np.float64(np.float32(-bound)), np.float64(np.float32(bound))

        def draw(*shape: int) -> jax.Array:
            values = np.empty(shape, np.float32)
            self._fill(values.reshape(-1), lambda uniform: uniform * (high - low) + low)
            return jnp.asarray(values)

        return {"weight": draw(rows, columns)} | ({"bias": draw(rows)} if bias else {})

    def normal(self, rows: int, columns: int) -> jax.Array:
        """Draw `nn.Embedding(rows, columns)`: Box-Muller on blocks of 16 uniforms."""
        values = np.empty(rows * columns, np.float32)
        if values.size < 16:
            raise ValueError(
                f"an embedding of {rows} x {columns} values cannot be reproduced: PyTorch draws "
                "fewer than 16 values differently; use a larger vocabulary, context or emb_dim"
            )
        rest = values.size % 16
        self._fill(values[: values.size - rest], _box_muller)
        if rest:
            # PyTorch draws uniforms for the remainder but then draws the last 16 values again.
            self._uniform(rest)
            self._done -= 16 - rest
            self._fill(values[-16:], _box_muller)
        return jnp.asarray(values.reshape(rows, columns))

    def _fill(self, values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> None:
        for first in range(0, values.size, _CHUNK):
            chunk = values[first : first + _CHUNK]
            chunk[:] = convert(self._uniform(chunk.size))
            self._done += chunk.size
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _uniform(self, size: int) -> np.ndarray:
        words = self._words.randint(0, 1 << 32, size, np.uint32)
        return (words & 0xFFFFFF) * 2.0**-24  # float64 [size], exact


def _box_muller(uniform: np.ndarray) -> np.ndarray:  # [n], n a multiple of 16 -> float32 [n]
    blocks = uniform.astype(np.float32).reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log1p(-blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
