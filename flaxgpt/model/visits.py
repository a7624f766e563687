"""Reading and replacing intermediate values while the model runs, with or without a cache.

The model contains no hooks: linen's `intercept_methods` wraps the call of each module.
`flaxgpt.model.intermediates` lists the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxgpt.cache import LayerCache
from flaxgpt.config import GPTConfig, block_index
from flaxgpt.model.attend import by_head, mean_of_values, weights_by_head
from flaxgpt.model.attention import scale_query
from flaxgpt.model.intermediates import Intervention
from flaxgpt.model.visibility import Visibility


@dataclasses.dataclass
class Visits:
    """A linen interceptor that patches each intermediate, and keeps those that are wanted.

    For one call of a model: `with nn.intercept_methods(visits): model.apply(...)`, after which
    `visits.found` has the values. The projections of the parameters must not be fused, and the
    platform must not copy rows.

    Most intermediates are the result of a module. The others come from a module's input: attention
    weights and heads from that of `out_proj`, the middle of the stream from that of `norm2`.
    """

    cfg: GPTConfig
    wanted: Collection[str]
    functions: Mapping[str, Intervention]
    found: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    held: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # for later in the block
    attending: tuple[Visibility, LayerCache | None] = (Visibility(), None)  # in this block
    root: Any = None  # scope of the visited model

    def __call__(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module, method = context.module, context.method_name
        self.root = self.root or module.scope.root
        if module.scope.root is not self.root:  # a model that a patch runs inside this one
            return call(*args, **kwargs)
        if method == "logits":
            return self._visit("logits", call(*args))
        if method != "__call__" or not module.path:
            return call(*args, **kwargs)
        x = args[0]
        block, name = module.path[0], "/".join(module.path)
        match module.path[1:]:
            case () | ("att",) if block_index(block) is not None:
                self.held, self.attending = {}, (args[1], args[2])
                x, cache = call(*args, **kwargs)
                if "middle" in self.held:  # at the end of a block
                    x = self.held["middle"] + self.held["ff"]
                return self._visit(name, x), cache
            case ():
                value = call(*args, **kwargs)
                return self._visit("embeddings" if name == "drop_emb" else name, value)
            case ("att", "W_query" | "W_key" | "W_value" as projection):
                role = projection.removeprefix("W_")
                joined = self._join(self._visit(f"{block}/att/{role}", self._split(call(x))))
                # As attention does it, so that XLA finds what is computed twice.
                self.held[role] = self._split(joined)
                return joined
            case ("att", "out_proj"):
                heads = self._split(x)
                if (place := f"{block}/att/weights") in {*self.wanted, *self.functions}:
                    weights, values = self._weights(block_index(block) or 0)
                    if (patched := self._visit(place, weights)) is not weights:
                        heads = mean_of_values(patched, values)
                return call(self._join(self._visit(f"{block}/att/heads", heads)))
            case ("norm2",):
                middle = self._visit(f"{block}/middle", x)
                if middle is not x:
                    self.held["middle"] = middle
                return self._visit(name, call(middle))
            case ("ff", "layers_0"):
                return self._visit(f"{block}/ff/wide", call(x))
            case ("ff", "layers_2"):
                return call(self._visit(f"{block}/ff/active", x))
            case ("norm1",) | ("ff",) as last:
                self.held[last[0]] = self._visit(name, call(x))
                return self.held[last[0]]
        return call(*args, **kwargs)

    def _visit(self, name: str, value: jax.Array) -> jax.Array:
        if name in self.functions:
            value = _replaced(name, self.functions[name](value), value)
        if name in self.wanted:
            self.found[name] = value
        return value

    def _weights(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Return a block's attention weights [B, N, T, S], and the values [B, N, S, H]."""
        visibility, cache = self.attending
        query, keys, values = (self.held[role] for role in ("query", "key", "value"))
        if cache is not None and visibility.offset is not None:  # else there are only the new keys
            cache = cache.append(keys, values)
            keys, values = cache.keys, by_head(query, cache.values)
        return weights_by_head(scale_query(self.cfg, layer, query), keys, visibility), values

    def _split(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, N, T, H]
        return x.reshape(*x.shape[:-1], self.cfg.n_heads, self.cfg.head_dim).swapaxes(1, 2)

    def _join(self, heads: jax.Array) -> jax.Array:  # [B, N, T, H] -> [B, T, D]
        return heads.swapaxes(1, 2).reshape(len(heads), heads.shape[2], self.cfg.emb_dim)


def _replaced(name: str, given: Any, value: jax.Array) -> jax.Array:
    """Return what a patch gave in place of a value, or raise ValueError if it does not fit."""
    try:
        new = jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the patch of {name} returned {type(given).__name__}, not an array"
            + ("; does the function return its result?" if given is None else "")
        ) from error
    if jnp.iscomplexobj(new):
        raise ValueError(f"the patch of {name} returned {new.dtype}; expected real numbers")
    if new.shape != value.shape:
        raise ValueError(
            f"the patch of {name} returned shape {new.shape}; expected {value.shape}, the "
            "shape of the value it replaces"
        )
    return new.astype(value.dtype)
