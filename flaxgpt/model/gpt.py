"""The GPT model (section 4.6) and its pure functions.

init      fresh parameters
states    ids -> final states, before the output head
logits    final states -> logits
forward   ids -> logits
extend    ids and a cache -> logits and the updated cache
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, check_ids, check_params
from flaxgpt.cache import KVCache, LayerCache, as_column, layer_shape
from flaxgpt.config import GPTConfig, block_name, check_config
from flaxgpt.model.attend import resolve_attention
from flaxgpt.model.block import TransformerBlock
from flaxgpt.model.layers import Embedding, LayerNorm, Linear
from flaxgpt.model.rows import add_copies, drop_copies
from flaxgpt.model.visibility import Visibility
from flaxgpt.platform import Platform, platform_of
from flaxgpt.sharding import Mesh, ShardRules, automatic, check_mesh, check_rules, constrain
from flaxgpt.typing import Params


class GPT(nn.Module):
    """Embeddings, L transformer blocks, a final norm, and logits over the vocabulary.

    `GPT(cfg).apply({"params": params}, ids)` is all it takes; `forward` and `extend` wrap it with
    checks. A tied model has no `out_head`: its token embedding is the output head.

    Attributes:
        cfg: the architecture.
        dtype: dtype to compute in; parameters keep their own, and logits are float32.
        remat: whether the backward pass recomputes each block's activations instead of storing
            them.
        platform: how the devices compute it best; the default suits all of them.
    """

    cfg: GPTConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    platform: Platform = Platform()

    def setup(self) -> None:
        cfg, platform = self.cfg, self.platform
        table = partial(Embedding, features=cfg.emb_dim, dtype=self.dtype, platform=platform)
        self.tok_emb = table(cfg.vocab_size)
        self.pos_emb = table(cfg.context_length, letters="SD")
        self.drop_emb = nn.Dropout(cfg.drop_rates.emb)
        block: Any = TransformerBlock
        if self.remat:
            block = nn.remat(block, static_argnums=4)  # `deterministic`, counting `self`
        self.trf_blocks = [block(cfg, self.dtype, platform, i) for i in range(cfg.n_layers)]
        self.final_norm = LayerNorm(cfg.norm_eps, cfg.bias, self.dtype, platform.one_pass_norms)
        if not cfg.tie_embeddings:
            head = partial(Linear, use_bias=False, dtype=self.dtype, out_dtype=jnp.float32)
            self.out_head = head(cfg.vocab_size, platform=platform)

    def __call__(self, ids: jax.Array, deterministic: bool = True) -> jax.Array:
        """Return the logits float32 [B, T, V] that follow each of the ids, int [B, T]."""
        states, _ = self.states(ids, None, deterministic)
        return self.logits(states)

    def states(
        self, ids: jax.Array, cache: KVCache | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the final states [B, T, D], and the cache with T more slots filled."""
        batch, queries = ids.shape
        positions = jnp.arange(queries)[None]  # [1, T]
        visibility = Visibility()
        layers: list[LayerCache | None] = [None] * self.cfg.n_layers
        if cache is not None:
            filled = as_column(cache.length)
            positions = filled + positions - cache.start[:, None]  # [B, T]
            positions = jnp.maximum(positions, 0)  # padding, which no query sees
            if cache.length.ndim:  # drafts may lie past the context, and are dropped there
                positions = jnp.minimum(positions, self.cfg.context_length - 1)
            # A write past the end would overwrite earlier slots; return NaN instead.
            overflow = filled + queries > cache.size
            positions = jnp.where(overflow, self.cfg.context_length, positions)
            offset = None if cache.is_empty else cache.length
            visibility, layers = Visibility(cache.start, offset), [*cache.layers()]
        x = constrain(self.tok_emb(ids) + self.pos_emb(positions), "BTD")
        x = add_copies(self.drop_emb(x, deterministic=deterministic), self.platform)
        updated: list[LayerCache] = []
        for block, layer in zip(self.trf_blocks, layers, strict=True):
            x, layer = block(x, visibility, layer, deterministic)
            updated.append(layer)
        final = drop_copies(self.final_norm(x), batch)
        return final, None if cache is None else cache.advance(updated, queries)

    def logits(self, states: jax.Array) -> jax.Array:
        """Return the logits, float32 [..., V], for final states [..., D].

        They are float32 whatever `dtype` is: in bfloat16, logits near -100 would be half a unit
        apart, and many of them equal.
        """
        head = self.tok_emb.project if self.cfg.tie_embeddings else self.out_head
        letters = ("B" + "T" * (states.ndim - 2))[: states.ndim - 1] + "V"
        if states.ndim > 1:
            product = head(add_copies(states, self.platform))
            return constrain(drop_copies(product, states.shape[0]), letters)
        return head(states)


def make_model(cfg: GPTConfig, dtype: DTypeLike = jnp.float32, **options: Any) -> Any:
    """Return the linen module that belongs to no other, even if called inside another module."""
    return GPT(cfg, dtype, **options, parent=None)


def init(
    cfg: GPTConfig,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
    rules: ShardRules | None = None,
) -> Params:
    """Return freshly initialized parameters, as GPT-2 starts training: nested float32 arrays.

    Weights are normal with standard deviation 0.02, scaled by 1/sqrt(2 L) where they are added to
    the residual stream; biases are zero and norms the identity (Radford et al. 2019, section 2.3).

    Args:
        cfg: the configuration.
        key: a JAX random key.
        mesh: the mesh to create the parameters on, such as `flaxgpt.make_mesh()`; None for one
            device. The values are the same, and no device holds more than its part.
        rules: how to split them, if not by `flaxgpt.shard_rules(cfg)`.

    Returns:
        A nested dict of float32 arrays.

    Raises:
        ValueError: `cfg` is not a GPTConfig, or the mesh has an unknown axis.
    """
    check_config(cfg)
    rules = check_rules(rules, cfg, mesh)
    if mesh is None or rules is None:
        return _init(cfg, key)
    shardings = rules.shardings(param_shapes(cfg), check_mesh(mesh))
    return jax.jit(_draw, static_argnums=0, out_shardings=shardings)(cfg, key)


def _draw(cfg: GPTConfig, key: jax.Array) -> Params:
    return make_model(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


_init = jax.jit(_draw, static_argnums=0)


def param_shapes(cfg: GPTConfig) -> Params:
    """Return the shapes and dtypes of the parameters without allocating them (do not modify)."""
    check_config(cfg)
    return _param_shapes(cfg)


@lru_cache(maxsize=64)
def _param_shapes(cfg: GPTConfig) -> Params:
    # All blocks have the same shapes, and tracing them all would dominate loading a small model.
    one = dataclasses.replace(cfg, n_layers=1)
    shapes = jax.eval_shape(partial(_init, one), jax.eval_shape(lambda: jax.random.key(0)))
    block = shapes.pop(block_name(0))
    return dict(sorted({**shapes, **dict.fromkeys(cfg.block_names, block)}.items()))


def check_inputs(cfg: GPTConfig, params: Params, ids: ArrayLike) -> Any:
    """Return ids as an array [B, T], or raise ValueError unless the model can process them."""
    check_params(param_shapes(cfg), params)
    checked = check_ids(cfg.vocab_size, ids)
    if checked.shape[1] > cfg.context_length:
        raise ValueError(
            f"{checked.shape[1]} ids per row exceed context_length={cfg.context_length}: pass at "
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
    attention: str = "auto",
) -> jax.Array:
    """Return the logits that follow each id, given the ids before it.

    Pure, and compatible with `jit`, `grad`, `vmap`, `eval_shape` and `jax.export`. Compiled on its
    own when called outside of them.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], T at most `cfg.context_length`.
        dropout_key: a random key enables dropout; None disables it.
        dtype: dtype to compute in: float32, bfloat16 or float16.
        remat: whether the backward pass recomputes each block's activations instead of storing
            them: about a third slower, with memory for one block instead of L.
        attention: the attention implementation, "plain", "dot_product" or "splash" (see
            `flaxgpt.model.attend`); "auto" selects the best one for the platform and dtype.

    Returns:
        float32 [B, T, V]. Under `jit`, where ids cannot be checked, an id outside the vocabulary
        makes its row NaN.

    Raises:
        ValueError: `ids` are empty, not integers, too long or outside the vocabulary, or `params`
            do not fit the configuration.
    """
    final = states(
        cfg, params, ids, dropout_key=dropout_key, dtype=dtype, remat=remat, attention=attention
    )
    return logits(cfg, params, final)


def states(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    *,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    attention: str = "auto",
) -> jax.Array:
    """Return the final states of each position, before the output head.

    `logits(cfg, params, states(cfg, params, ids))` is `forward(cfg, params, ids)`. Compute them
    apart where the logits of all positions would be too large, or only some are needed.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], T at most `cfg.context_length`.
        dropout_key: as in `forward`, like the other arguments.

    Returns:
        [B, T, D] in `dtype`, after the final norm.

    Raises:
        ValueError: as for `forward`.
    """
    checked = check_inputs(cfg, params, ids)
    dtype = check_dtype(dtype)
    platform = resolve_attention(attention, platform_of(params), dtype)
    return _states(cfg, dtype, remat, platform, params, checked, dropout_key)


@automatic
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _states(
    cfg: GPTConfig,
    dtype: Any,
    remat: bool,
    platform: Platform,
    params: Params,
    ids: jax.Array,
    dropout_key: jax.Array | None,
) -> jax.Array:
    model = make_model(cfg, dtype, remat=remat, platform=platform)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = {"params": params}
    final, _ = model.apply(variables, ids, None, dropout_key is None, rngs=rngs, method="states")
    return final


def logits(cfg: GPTConfig, params: Params, states: jax.Array) -> jax.Array:
    """Return the logits for final states.

    Pure, and compatible with `jit`, `grad` and `vmap`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        states: [..., D], as `states` returns them; their dtype is what is computed in.

    Returns:
        float32 [..., V].

    Raises:
        ValueError: the states do not have `cfg.emb_dim` elements in the last axis, or `params` do
            not fit the configuration.
    """
    check_params(param_shapes(cfg), params)
    check_dtype(states.dtype)
    if states.shape[-1:] != (cfg.emb_dim,):
        raise ValueError(
            f"states of shape {states.shape} must end in emb_dim={cfg.emb_dim}, as the function "
            "`states` returns them"
        )
    return _logits(cfg, platform_of(params), params, states)


def apply_logits(
    cfg: GPTConfig, platform: Platform, params: Params, states: jax.Array
) -> jax.Array:
    """Return the logits for final states, without checks, for use inside `jit`."""
    model = make_model(cfg, states.dtype, platform=platform)
    return model.apply({"params": params}, states, method="logits")


_logits = automatic(jax.jit(apply_logits, static_argnums=(0, 1)))


def head_weight(cfg: GPTConfig, params: Params) -> jax.Array:
    """Return the weight of the output head, [V, D], which a tied model shares."""
    return params["tok_emb" if cfg.tie_embeddings else "out_head"]["weight"]


def extend(
    cfg: GPTConfig, params: Params, ids: ArrayLike, cache: KVCache, *, attention: str = "auto"
) -> tuple[jax.Array, KVCache]:
    """Return the logits that follow each of the new ids, and the cache that includes them.

    Prefill and decoding are this one function, with many ids or one. The cache passed in is not
    changed; to reuse its memory, donate it:
    `step = jax.jit(partial(extend, cfg), donate_argnums=2)`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], the ids that follow those in the cache.
        cache: from `init_cache` or an earlier call; its dtype is what is computed in.
        attention: as in `forward`.

    Returns:
        float32 [B, T, V], and the cache with `length` increased by T. Under `jit`, where `length`
        cannot be checked, ids past the end of the cache or outside the vocabulary make their rows
        NaN.

    Raises:
        ValueError: bad ids, params that do not fit, or no room left in the cache.
    """
    check_params(param_shapes(cfg), params)
    checked = check_ids(cfg.vocab_size, ids)
    batch, queries = checked.shape
    if batch != cache.batch:
        raise ValueError(f"ids have {batch} rows, but the cache has {cache.batch}")
    layer = cache.keys[0].shape
    fitting = layer_shape(cfg, batch, cache.size, cache.layout)
    if (len(cache.keys), layer) != (cfg.n_layers, fitting):
        raise ValueError(
            f"the cache has {len(cache.keys)} layers of shape {layer}, but the model has "
            f"{cfg.n_layers} layers and {cfg.n_heads} heads of {cfg.head_dim}: create it with "
            "init_cache and the same configuration"
        )
    filled = 0 if isinstance(cache.length, jax.core.Tracer) else int(np.max(cache.length))
    if filled + queries > cache.size:
        raise ValueError(
            f"{queries} more ids do not fit: {filled} of the cache's {cache.size} slots are "
            f"filled. Create a longer one with init_cache (up to context_length="
            f"{cfg.context_length}), or use `generate`, which moves the window"
        )
    platform = resolve_attention(attention, platform_of(params), cache.keys[0].dtype)
    return _extend(cfg, platform, params, checked, cache)


def apply_states(
    cfg: GPTConfig, platform: Platform, params: Params, ids: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Return the final states and the updated cache, without checks, for use inside `jit`."""
    model = make_model(cfg, cache.keys[0].dtype, platform=platform)
    return model.apply({"params": params}, ids, cache, method="states")


@automatic
@partial(jax.jit, static_argnums=(0, 1))
def _extend(
    cfg: GPTConfig, platform: Platform, params: Params, ids: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    final, cache = apply_states(cfg, platform, params, ids, cache)
    return apply_logits(cfg, platform, params, final), cache
