"""Gradient norms per block, with and without shortcut connections (section 4.4)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxgpt._quantized import refuse_quantized
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.inspection.intermediates import Intervention, patch
from flaxgpt.model.gpt import check_inputs
from flaxgpt.model.log_probs import token_log_probs
from flaxgpt.sharding import automatic
from flaxgpt.typing import Params


def gradient_norms(
    cfg: GPTConfig, params: Params, ids: ArrayLike, *, shortcuts: bool = True
) -> jax.Array:
    """Return the norm of the gradient of the loss for the parameters of each block, float32 [L].

    Args:
        cfg: the architecture.
        params: its parameters.
        ids: int [B, T], T at least 2: each id except the first is a target.
        shortcuts: whether to keep the shortcut connections.

    Raises:
        ValueError: as for `patch`, or too few ids.
    """
    refuse_quantized(params, "a gradient")
    checked = check_inputs(cfg, params, ids)
    if checked.shape[1] < 2:
        raise ValueError(
            f"ids of shape {checked.shape} leave nothing to predict: pass 2 or more per row"
        )
    return _norms(cfg, params, checked, shortcuts)


@automatic
@partial(jax.jit, static_argnums=(0, 3))
def _norms(cfg: GPTConfig, params: Params, ids: jax.Array, shortcuts: bool) -> jax.Array:
    def loss(params: Params) -> jax.Array:
        logits = patch(cfg, params, ids, {} if shortcuts else without_shortcuts(cfg))
        return -token_log_probs(logits[:, :-1], ids[:, 1:]).mean()

    gradient = jax.grad(loss)(params)
    squares = jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)).sum(), gradient)
    return jnp.sqrt(jnp.stack([sum(jax.tree.leaves(squares[name])) for name in cfg.block_names]))


def without_shortcuts(cfg: GPTConfig) -> dict[str, Intervention]:
    """Return patches that remove the shortcut connections, for a single call of `patch`."""
    check_config(cfg)
    added: list[jax.Array] = []

    def hold(x: jax.Array) -> jax.Array:
        added.append(x)
        return x

    def release(_: jax.Array) -> jax.Array:
        return added.pop()

    patches = {"/att": hold, "/middle": release, "/ff": hold, "": release}
    return {block + place: patches[place] for block in cfg.block_names for place in patches}
