"""The GPT model (section 4.6) and its three pure functions: `init`, `forward`, `extend`."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, check_ids, check_params
from flaxgpt.cache import KVCache, visible
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.model.block import TransformerBlock
from flaxgpt.model.layers import Embedding, LayerNorm, Linear
from flaxgpt.typing import Params


class GPT(nn.Module):
    """Embeddings, L blocks, a last norm, and logits over the vocabulary.

    `GPT(cfg).apply({"params": params}, ids)` is all it takes; `forward` and `extend` wrap it with
    checks. A tied model has no `out_head`: the token embedding is its output head.

    Attributes:
        cfg: the architecture.
        dtype: what is computed in; parameters stay as they are stored, logits are float32.
        remat: whether a gradient computes each block's activations again instead of keeping them.
    """

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        cfg = self.cfg
        self.tok_emb = Embedding(cfg.vocab_size, cfg.emb_dim, self.dtype)
        self.pos_emb = Embedding(cfg.context_length, cfg.emb_dim, self.dtype)
        self.drop_emb = nn.Dropout(cfg.drop_rates.emb)
        block: Any = TransformerBlock
        if self.remat:
            block = nn.remat(block, static_argnums=4)  # `deterministic`, counting `self`
        self.trf_blocks = [block(cfg, self.dtype) for _ in range(cfg.n_layers)]
        self.final_norm = LayerNorm(dtype=self.dtype)
        if not cfg.tie_embeddings:
            self.out_head = Linear(
                cfg.vocab_size, use_bias=False, dtype=self.dtype, out_dtype=jnp.float32
            )

    def __call__(self, ids: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns the logits float32 [B, T, V] that follow each of the ids, int [B, T]."""
        positions = jnp.arange(ids.shape[1])[None]  # [1, T]
        causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))[None, None]
        x = self._embed(ids, positions, deterministic)
        for block in self.trf_blocks:
            x, _ = block(x, causal, None, deterministic)
        return self.head(self.final_norm(x))

    def trunk(self, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Returns what the head needs, [B, T, D], and the cache with T more slots filled."""
        queries = ids.shape[1]
        positions = cache.length + jnp.arange(queries) - cache.start[:, None]  # [B, T]
        positions = jnp.maximum(positions, 0)  # padding, which nothing looks at
        # A write past the end would be moved back over older slots: answer with NaN instead.
        overflow = cache.length + queries > cache.size
        positions = jnp.where(overflow, self.cfg.context_length, positions)
        mask = visible(cache, queries)
        x = self._embed(ids, positions, deterministic=True)
        layers = []
        for block, layer in zip(self.trf_blocks, cache.layers(), strict=True):
            x, filled = block(x, mask, layer)
            assert filled is not None  # as it was given a layer
            layers.append(filled)
        return self.final_norm(x), cache.advanced(layers, queries)

    def head(self, x: jax.Array) -> jax.Array:
        """Returns logits, float32 [..., V], of final states [..., D].

        Logits of -100 in bfloat16 would be half a unit apart, and many of them equal.
        """
        return self.tok_emb.attend(x) if self.cfg.tie_embeddings else self.out_head(x)

    def _embed(self, ids: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        x = self.tok_emb(ids) + self.pos_emb(positions)  # [B, T, D]
        return self.drop_emb(x, deterministic=deterministic)


def init(cfg: GPTConfig, key: jax.Array) -> Params:
    """Returns fresh parameters as GPT-2 starts them: a nested dict of float32 arrays.

    Weights are normal with deviation 0.02, those added to the residual stream scaled by
    1/sqrt(2 L), biases zero, norms the identity (Radford et al. 2019, section 2.3).

    Args:
        cfg: the configuration.
        key: a JAX random key.

    Raises:
        ValueError: `cfg` is no GPTConfig.
    """
    check_config(cfg)
    return _init(cfg, key)


@partial(jax.jit, static_argnums=0)
def _init(cfg: GPTConfig, key: jax.Array) -> Params:
    return GPT(cfg, parent=None).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def param_shapes(cfg: GPTConfig) -> Params:
    """Returns the parameters' shapes and dtypes without allocating any (do not modify it)."""
    check_config(cfg)
    return _param_shapes(cfg)


@lru_cache(maxsize=64)
def _param_shapes(cfg: GPTConfig) -> Params:
    # Blocks are alike, and tracing each takes longer than all else about loading a small model.
    one = dataclasses.replace(cfg, n_layers=1)
    shapes = jax.eval_shape(partial(_init, one), jax.eval_shape(lambda: jax.random.key(0)))
    block = shapes.pop("trf_blocks_0")
    return dict(
        sorted({**shapes, **{f"trf_blocks_{i}": block for i in range(cfg.n_layers)}}.items())
    )


def check_inputs(cfg: GPTConfig, params: Params, ids: ArrayLike) -> Any:
    """Returns ids as an array [B, T], or raises ValueError unless a model can compute them."""
    check_params(param_shapes(cfg), params)
    checked = check_ids(cfg.vocab_size, ids)
    if checked.shape[1] > cfg.context_length:
        raise ValueError(
            f"{checked.shape[1]} ids a row exceed context_length={cfg.context_length}: give at "
            f"most the last {cfg.context_length}, as ids[:, -{cfg.context_length}:]"
        )
    return checked


def forward(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    *,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Returns the logits that follow each id, given the ids before it.

    Pure, and transparent to `jit`, `grad`, `vmap`, `eval_shape` and `jax.export`; it compiles
    itself when called outside of them.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], T at most `cfg.context_length`.
        dropout_key: a key turns dropout on, None leaves it off.
        dtype: what is computed in: float32, bfloat16 or float16.
        remat: whether a gradient computes each block's activations again instead of keeping them:
            about a third slower, and memory for one block instead of L.

    Returns:
        float32 [B, T, V]. Under `jit`, where ids cannot be looked at, one outside the vocabulary
        makes its row NaN.

    Raises:
        ValueError: ids that are empty, not integers, too long or outside the vocabulary; params
            that do not fit the configuration.
    """
    checked = check_inputs(cfg, params, ids)
    return _forward(cfg, check_dtype(dtype), remat, params, checked, dropout_key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    cfg: GPTConfig,
    dtype: Any,
    remat: bool,
    params: Params,
    ids: jax.Array,
    dropout_key: jax.Array | None,
) -> jax.Array:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    model: Any = GPT(cfg, dtype, remat, parent=None)
    return model.apply({"params": params}, ids, deterministic=dropout_key is None, rngs=rngs)


def extend(
    cfg: GPTConfig, params: Params, ids: ArrayLike, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Returns the logits that follow each of the new ids, and the cache that includes them.

    Prefill and decoding are this one function, with many ids or one. The cache given is not
    changed; to let its memory be reused, jit it away:
    `step = jax.jit(partial(extend, cfg), donate_argnums=2)`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], the ids after those in the cache.
        cache: from `init_cache` or an earlier call; its dtype is what is computed in.

    Returns:
        float32 [B, T, V] and the cache with `length` T further. Under `jit`, where `length` cannot
        be looked at, ids beyond the cache's end or outside the vocabulary make their rows NaN.

    Raises:
        ValueError: bad ids, params that do not fit, or no room left in the cache.
    """
    check_params(param_shapes(cfg), params)
    checked = check_ids(cfg.vocab_size, ids)
    batch, queries = checked.shape
    if batch != cache.start.shape[0]:
        raise ValueError(f"ids have {batch} rows, the cache has {cache.start.shape[0]}")
    layer = cache.keys[0].shape
    if (
        len(cache.keys) != cfg.n_layers
        or layer[-1] != cfg.head_dim
        or (math.prod(layer[:-2]) != batch * cfg.n_heads)
    ):
        raise ValueError(
            f"the cache has {len(cache.keys)} layers of shape {layer}, which is not this model's: "
            f"make it with init_cache of the same configuration ({cfg.n_layers} layers, "
            f"{cfg.n_heads} heads of {cfg.head_dim})"
        )
    filled = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if filled + queries > cache.size:
        raise ValueError(
            f"{queries} more ids do not fit: the cache has {cache.size} slots, {filled} of them "
            f"taken. Make a longer one with init_cache (up to context_length="
            f"{cfg.context_length}), or let `generate` slide the window"
        )
    return _extend(cfg, params, checked, cache)


@partial(jax.jit, static_argnums=0)
def _extend(
    cfg: GPTConfig, params: Params, ids: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    model: Any = GPT(cfg, cache.keys[0].dtype, parent=None)
    x, cache = model.apply({"params": params}, ids, cache, method=GPT.trunk)
    return model.apply({"params": params}, x, method=GPT.head), cache
