"""Intermediate values of the forward pass, by name: to read, and to replace.

`flaxgpt.model.intermediates` lists the names and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype
from flaxgpt.config import GPTConfig
from flaxgpt.model.gpt import check_inputs, make_model
from flaxgpt.model.intermediates import (
    Intervention,
    activation_names,
    all_places,
    check_patches,
    selected_places,
)
from flaxgpt.model.visits import Visits
from flaxgpt.sharding import automatic
from flaxgpt.typing import Params

__all__ = ["Intervention", "activation_names", "activations", "patch"]


def activations(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    *,
    select: Iterable[str] | None = None,
    patches: Mapping[str, Intervention] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
    """Return intermediate values of the forward pass, by name.

    Pure, and compatible with `jit`, `grad` and `vmap`. Without patches, compiled on its own.

    Args:
        cfg: the architecture, static.
        params: its parameters.
        ids: int [B, T], T at most `cfg.context_length`.
        select: names to return, by default all and the `hidden_i`. `*` matches any characters, as
            in `trf_blocks_*/att/weights`. Values that are not selected take no memory.
        patches: interventions to apply, as for `patch`.
        dtype: dtype to compute in.

    Returns:
        Arrays by name, in the order in which they are computed.

    Raises:
        ValueError: bad ids, params or names.
    """
    checked, dtype = check_inputs(cfg, params, ids), check_dtype(dtype)
    places = all_places(cfg) if select is None else selected_places(cfg, "select", select)
    arguments = cfg, params, checked, frozenset(places.values()), dtype
    found = _compiled(*arguments, {}) if patches is None else _run(*arguments, patches)
    return {name: found[place] for name, place in places.items()}


def patch(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    patches: Mapping[str, Intervention],
    *,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Return the logits of the model with some intermediates replaced.

    Pure and differentiable. It is not compiled, because the functions may differ in every call;
    wrap it in `jit` if you call it often.

    >>> import flaxgpt, jax
    >>> cfg = flaxgpt.GPTConfig(emb_dim=8, n_heads=2, n_layers=1)
    >>> params = flaxgpt.init(cfg, jax.random.key(0))
    >>> ids = jax.numpy.array([[1, 2, 3]])
    >>> without_head_0 = {"trf_blocks_0/att/heads": lambda heads: heads.at[:, 0].set(0)}
    >>> flaxgpt.patch(cfg, params, ids, without_head_0).shape
    (1, 3, 50257)

    Args:
        cfg: the architecture, static.
        params: its parameters.
        ids: int [B, T], T at most `cfg.context_length`.
        patches: by name, a function from the computed value to its replacement of the same shape.
            `{name: lambda _: other[name]}` inserts `other = activations(...)` of another prompt.
        dtype: dtype to compute in.

    Returns:
        float32 [B, T, V].

    Raises:
        ValueError: bad ids or params, an unknown name, or a patch that is not a function or
            returns another shape.
    """
    checked, dtype = check_inputs(cfg, params, ids), check_dtype(dtype)
    return _run(cfg, params, checked, ["logits"], dtype, patches)["logits"]


@automatic
def _run(
    cfg: GPTConfig,
    params: Params,
    ids: jax.Array,
    wanted: Collection[str],
    dtype: Any,
    patches: Mapping[str, Intervention],
) -> dict[str, jax.Array]:
    """Run the model with interventions and return the requested intermediates."""
    visits = Visits(cfg, wanted, check_patches(cfg, patches))
    params = jax.tree.map(jnp.asarray, params)  # linen does not accept NumPy arrays
    with nn.intercept_methods(visits):
        make_model(cfg, dtype).apply({"params": params}, ids)
    return visits.found


_compiled = automatic(jax.jit(_run, static_argnums=(0, 3, 4)))
