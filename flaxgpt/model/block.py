"""The transformer block: attention and feed-forward, each with a norm before and a shortcut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig
from flaxgpt.model.attention import MultiHeadAttention
from flaxgpt.model.layers import FeedForward, LayerNorm
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform
from flaxgpt.sharding import constrain


class TransformerBlock(nn.Module):
    """Pre-norm block with two shortcuts (section 4.5)."""

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32
    platform: Platform = Platform()
    layer: int = 0  # number of the block

    def setup(self) -> None:
        cfg, one_pass = self.cfg, self.platform.one_pass_norms
        self.norm1 = LayerNorm(cfg.norm_eps, cfg.bias, self.dtype, one_pass)
        self.att = MultiHeadAttention(cfg, self.dtype, self.platform, self.layer)
        self.norm2 = LayerNorm(cfg.norm_eps, cfg.bias, self.dtype, one_pass)
        self.ff = FeedForward(cfg, self.dtype, self.platform)
        self.drop_shortcut = nn.Dropout(cfg.drop_rates.shortcut)

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        visibility: Visibility,
        cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LayerCache | None]:  # [B, T, D], the cache with T more slots filled
        attended, cache = self.att(self.norm1(x), visibility, cache, deterministic)
        x = constrain(x + self.drop_shortcut(attended, deterministic=deterministic), "BTD")
        x = x + self.drop_shortcut(self.ff(self.norm2(x)), deterministic=deterministic)
        return constrain(x, "BTD"), cache
