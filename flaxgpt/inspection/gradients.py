"""Gradient norms per block, with and without shortcut connections (section 4.4)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.inspection.intermediates import Intervention, patch
from flaxgpt.model.gpt import check_inputs
from flaxgpt.model.log_probs import token_log_probs
from flaxgpt.typing import Params


def gradient_norms(
    cfg: GPTConfig, params: Params, ids: ArrayLike, *, shortcuts: bool = True
) -> jax.Array:
    """Return the norm of the gradient of the loss with respect to each block's parameters.

    Args:
        cfg: the architecture.
        params: its parameters.
        ids: int [B, T], T at least 2: each id except the first is a target.
        shortcuts: whether to keep the shortcut connections.

    Returns:
        float32 [L].

    Raises:
        ValueError: as for `patch`, or too few ids.
    """
    checked = check_inputs(cfg, params, ids)
    if checked.shape[1] < 2:
        raise ValueError(
            f"ids of shape {checked.shape} leave nothing to predict: pass 2 or more per row"
        )
    return _norms(cfg, params, checked, shortcuts)


@partial(jax.jit, static_argnums=(0, 3))
def _norms(cfg: GPTConfig, params: Params, ids: jax.Array, shortcuts: bool) -> jax.Array:
    def loss(params: Params) -> jax.Array:
        patches = {} if shortcuts else without_shortcuts(cfg)
        logits = patch(cfg, params, ids, patches)
        return -token_log_probs(logits[:, :-1], ids[:, 1:]).mean()

    def norm(tree: Params) -> jax.Array:
        squares = (jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree))
        return jnp.sqrt(sum(squares))

    gradient = jax.grad(loss)(params)
    return jnp.stack([norm(gradient[block]) for block in cfg.block_names])


def without_shortcuts(cfg: GPTConfig) -> dict[str, Intervention]:
    """Return patches that remove the shortcut connections, for a single call of `patch`."""
    check_config(cfg)
    added: list[jax.Array] = []

    def hold(x: jax.Array) -> jax.Array:
        added.append(x)
        return x

    patches: dict[str, Intervention] = {}
    for block in cfg.block_names:
        patches |= {
            f"{block}/att": hold,
            f"{block}/middle": lambda _: added.pop(),
            f"{block}/ff": hold,
            block: lambda _: added.pop(),
        }
    return patches
