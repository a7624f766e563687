"""The logit lens: the logits if the model ended after each block (nostalgebraist 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flaxgpt.config import GPTConfig
from flaxgpt.inspection.intermediates import Intervention, activations
from flaxgpt.model.gpt import make_model
from flaxgpt.sharding import automatic
from flaxgpt.typing import Params


def logit_lens(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    *,
    patches: Mapping[str, Intervention] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Return the logits of the residual stream at its start and after each block.

    The final norm and the output head are applied to each state; the last is as from `forward`.

    Args:
        cfg: the architecture, static.
        params: its parameters.
        ids: int [B, T], T at most `cfg.context_length`.
        patches: interventions to apply, as for `patch`, none of them after the last block.
        dtype: dtype to compute in.

    Returns:
        float32 [L + 1, B, T, V]; with GPT-2's vocabulary, 0.2 MB per layer and id.

    Raises:
        ValueError: as for `activations`.
    """
    streams = ["embeddings", *cfg.block_names]
    for name in ("final_norm", f"hidden_{cfg.n_layers}", "logits"):
        if name in (patches or {}):
            raise ValueError(
                f"{name} cannot be patched: the lens applies the final norm and the head itself. "
                "Change its result instead"
            )
    found = activations(cfg, params, ids, select=streams, patches=patches, dtype=dtype)
    return _read(cfg, params, jnp.stack(list(found.values())), jnp.dtype(dtype))


@automatic
@partial(jax.jit, static_argnums=(0, 3))
def _read(cfg: GPTConfig, params: Params, streams: jax.Array, dtype: DTypeLike) -> jax.Array:
    model = make_model(cfg, dtype).bind({"params": params})
    return model.logits(model.final_norm(streams))
