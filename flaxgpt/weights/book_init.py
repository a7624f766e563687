"""The untrained weights that PyTorch gives the book's `GPTModel` for a seed, rebuilt in NumPy.

The book prints what its 124M model says after `torch.manual_seed(123)`, before any training.
PyTorch draws those weights on CPU from MT19937, seeded the legacy way and read as 32-bit words in
order (ATen/native/cpu/DistributionTemplates.h and ATen/core/TransformationHelper.h, PyTorch 2.13),
which NumPy can reproduce: uniform draws to the last bit or 4e-9, normal draws to 1e-6.
"""

from __future__ import annotations

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.typing import Params, Progress

_CHUNK = 1 << 22  # values drawn at once: enough to be fast, little beside the weights


def book_params(cfg: GPTConfig, seed: int = 123, *, progress: Progress | None = None) -> Params:
    """Returns the parameters that `torch.manual_seed(seed); GPTModel(cfg)` has in the book.

    Args:
        cfg: an untied configuration, as all of the book's are.
        seed: what `torch.manual_seed` is given, 0 to 2**32 - 1.
        progress: called with (parameters drawn, parameters in all) as they come.

    Returns:
        Nested dict of float32 arrays.

    Raises:
        ValueError: a tied configuration, a seed out of range, or an embedding of under 16 values.
    """
    check_config(cfg)
    if cfg.tie_embeddings:
        raise ValueError(
            "tie_embeddings=True: the book's model has an output head of its own; use a book "
            "preset or tie_embeddings=False"
        )
    draws = _TorchDraws(seed, progress)
    width, wide = cfg.emb_dim, 4 * cfg.emb_dim
    drawn_per_block = 4 * width * width + 2 * width * wide + 2 * width + wide
    drawn_per_block += 3 * width if cfg.qkv_bias else 0
    draws.total = (2 * cfg.vocab_size + cfg.context_length) * width
    draws.total += cfg.n_layers * drawn_per_block

    def norm() -> Params:
        return {"scale": jnp.ones(width, jnp.float32), "shift": jnp.zeros(width, jnp.float32)}

    # The order of construction in the book's GPTModel is the order of the draws.
    params: Params = {
        "tok_emb": {"weight": draws.normal(cfg.vocab_size, width)},
        "pos_emb": {"weight": draws.normal(cfg.context_length, width)},
    }
    for layer in range(cfg.n_layers):
        params[f"trf_blocks_{layer}"] = {
            "att": {
                "W_query": draws.linear(width, width, bias=cfg.qkv_bias),
                "W_key": draws.linear(width, width, bias=cfg.qkv_bias),
                "W_value": draws.linear(width, width, bias=cfg.qkv_bias),
                "out_proj": draws.linear(width, width),
            },
            "ff": {"layers_0": draws.linear(wide, width), "layers_2": draws.linear(width, wide)},
            "norm1": norm(),
            "norm2": norm(),
        }
    params["final_norm"] = norm()
    params["out_head"] = draws.linear(cfg.vocab_size, width, bias=False)
    return params


class _TorchDraws:
    """PyTorch's CPU generator: a stream of 32-bit words that every draw moves along."""

    def __init__(self, seed: int, progress: Progress | None) -> None:
        try:
            self._words = np.random.RandomState(operator.index(seed))
        except (TypeError, ValueError) as error:
            raise ValueError(f"seed={seed!r} must be a whole number, 0 to 2**32 - 1") from error
        self._progress = progress
        self._done = 0
        self.total = 0

    def linear(self, rows: int, columns: int, bias: bool = True) -> Params:
        """`nn.Linear(columns, rows)`: weight and bias uniform in +-1/sqrt(columns)."""
        bound = 1 / math.sqrt(columns)
        layer = {"weight": self._filled(rows * columns, bound).reshape(rows, columns)}
        if bias:
            layer["bias"] = self._filled(rows, bound)
        return {name: jnp.asarray(values) for name, values in layer.items()}

    def normal(self, rows: int, columns: int) -> jax.Array:
        """`nn.Embedding(rows, columns)`: Box-Muller on blocks of 16 uniforms."""
        size = rows * columns
        values = np.empty(size, np.float32)
        if size < 16:
            raise ValueError(
                f"an embedding of {rows} x {columns} values cannot be rebuilt: PyTorch draws fewer "
                "than 16 values in another way; use a larger vocabulary, context or emb_dim"
            )
        whole = size - size % 16
        for first in range(0, whole, _CHUNK):
            count = min(_CHUNK, whole - first)
            values[first : first + count] = _box_muller(self._uniform(count))
            self._report(count)
        if size % 16:
            # The odd end has drawn its own uniforms, unused: the last 16 places are drawn again.
            self._uniform(size % 16)
            values[-16:] = _box_muller(self._uniform(16))
            self._report(size % 16)
        return jnp.asarray(values.reshape(rows, columns))

    def _filled(self, size: int, bound: float) -> np.ndarray:
        values = np.empty(size, np.float32)
        for first in range(0, size, _CHUNK):
            count = min(_CHUNK, size - first)
            # PyTorch fuses the multiply-add; float64 rounded once gives the same bits.
            low, high = np.float64(np.float32(-bound)), np.float64(np.float32(bound))
            values[first : first + count] = self._uniform(count) * (high - low) + low
            self._report(count)
        return values

    def _uniform(self, size: int) -> np.ndarray:
        words = self._words.randint(0, 1 << 32, size, np.uint32)
        return (words & 0xFFFFFF) * 2.0**-24  # float64 [size], exact

    def _report(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self.total)


def _box_muller(uniform: np.ndarray) -> np.ndarray:  # [n], n a multiple of 16 -> float32 [n]
    blocks = uniform.astype(np.float32).reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log1p(-blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
