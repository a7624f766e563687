"""Intermediate values of the forward pass, by name: to read, and to replace.

The names follow the modules, like those of the parameters:

    tok_emb                          [B, T, D]
    pos_emb                          [1, T, D]
    embeddings                       [B, T, D]     their sum, the start of the residual stream
    trf_blocks_0/norm1               [B, T, D]
    trf_blocks_0/att/query           [B, N, T, H]  and key, value
    trf_blocks_0/att/weights         [B, N, T, S]  after the softmax, S = T; a row sums to 1
    trf_blocks_0/att/heads           [B, N, T, H]  the weighted values of each head
    trf_blocks_0/att                 [B, T, D]     what attention adds to the stream
    trf_blocks_0/middle              [B, T, D]     the stream between attention and feed-forward
    trf_blocks_0/norm2               [B, T, D]
    trf_blocks_0/ff/wide             [B, T, F]     before GELU
    trf_blocks_0/ff/active           [B, T, F]     after it
    trf_blocks_0/ff                  [B, T, D]     what feed-forward adds to the stream
    trf_blocks_0                     [B, T, D]     the stream after the block; and so on
    final_norm                       [B, T, D]
    logits                           [B, T, V]

Hugging Face's hidden states are aliases: `hidden_0` is `embeddings`, `hidden_1` is `trf_blocks_0`,
and so on up to `hidden_L`, which is `final_norm`.

The model contains no hooks: linen's `intercept_methods` wraps the call of each module.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, unknown_name
from flaxgpt.config import GPTConfig, block_index, check_config
from flaxgpt.model.attend import attention_weights, mean_of_values
from flaxgpt.model.attention import scale_query
from flaxgpt.model.gpt import check_inputs, make_model
from flaxgpt.model.visibility import Visibility
from flaxgpt.sharding import automatic
from flaxgpt.typing import Params

Intervention = Callable[[jax.Array], ArrayLike]

_ATTENTION = ("att/query", "att/key", "att/value", "att/weights", "att/heads", "att")
_OF_A_BLOCK = ("norm1", *_ATTENTION, "middle", "norm2", "ff/wide", "ff/active", "ff")


def activation_names(cfg: GPTConfig) -> tuple[str, ...]:
    """Return the names of all intermediates, in the order in which they are computed.

    Args:
        cfg: the architecture.

    Returns:
        The names, without the aliases `hidden_i`.
    """
    check_config(cfg)
    within = [f"{block}/{name}" for block in cfg.block_names for name in (*_OF_A_BLOCK, "")]
    names = ["tok_emb", "pos_emb", "embeddings", *within, "final_norm", "logits"]
    return tuple(name.removesuffix("/") for name in names)


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
    places = _places(cfg)
    if select is not None:
        if isinstance(select, str) or not isinstance(select, Iterable):
            raise ValueError(
                f"select={select!r} must be a list of names; for one name, use [{select!r}]"
            )
        wanted: set[str] = set()
        for name in select:
            if not isinstance(name, str):
                raise ValueError(f"select has {name!r}, which is not the name of an intermediate")
            wanted.update(fnmatch.filter(places, name) or [_known(cfg, name)])
        places = {name: place for name, place in places.items() if name in wanted}
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


def _places(cfg: GPTConfig) -> dict[str, str]:
    """Return the intermediate that each name or alias stands for."""
    places = {name: name for name in activation_names(cfg)}
    hidden = ["embeddings", *cfg.block_names[:-1], "final_norm"]
    return places | {f"hidden_{i}": place for i, place in enumerate(hidden)}


def _known(cfg: GPTConfig, name: str) -> str:
    if name not in (places := _places(cfg)):
        advice = f"flaxgpt.activation_names(cfg) lists those of the {cfg.n_layers} blocks"
        raise unknown_name("intermediate", name, places, advice)
    return name


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
    if not isinstance(patches, Mapping):
        raise ValueError(f"patches must be a dict of name: function, got {type(patches).__name__}")
    functions: dict[str, Intervention] = {}
    for name, function in patches.items():
        place = _places(cfg)[_known(cfg, name)]
        if not callable(function):
            raise ValueError(
                f"the patch of {name} must be a function of the value there, got "
                f"{type(function).__name__}: to insert a fixed value, use lambda _: value"
            )
        if place in functions:
            raise ValueError(f"{name} is {place}, which already has a patch: combine the two")
        functions[place] = function
    params = jax.tree.map(jnp.asarray, params)  # linen does not accept NumPy arrays
    with nn.intercept_methods(_Visits(cfg, wanted, functions)):
        model = make_model(cfg, dtype)
        _, sown = model.apply({"params": params}, ids, mutable=["intermediates"])
    leaves = jax.tree_util.tree_flatten_with_path(sown)[0]
    return {path[-2].key: value for path, value in leaves}  # {module: {name: (value,)}}


_compiled = automatic(jax.jit(_run, static_argnums=(0, 3, 4)))


@dataclasses.dataclass
class _Visits:
    """A linen interceptor that patches each intermediate, and sows those that were requested.

    Most intermediates are the result of a module. The others come from a module's input: attention
    weights and heads from that of `out_proj`, the middle of the stream from that of `norm2`.
    """

    cfg: GPTConfig
    wanted: Collection[str]
    functions: Mapping[str, Intervention]
    held: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # for later in the block
    root: Any = None  # scope of the visited model

    def __call__(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        module, method = context.module, context.method_name
        self.root = self.root or module.scope.root
        if module.scope.root is not self.root:  # a model that a patch runs inside this one
            return call(*args, **kwargs)
        visit = partial(self._visit, module)
        if method == "logits":
            return visit("logits", call(*args))
        if method != "__call__" or not module.path:
            return call(*args, **kwargs)
        x = args[0]
        block, name = module.path[0], "/".join(module.path)
        match module.path[1:]:
            case () | ("att",) if block_index(block) is not None:
                self.held = {}
                x, cache = call(*args, **kwargs)
                if "middle" in self.held:  # at the end of a block
                    x = self.held["middle"] + self.held["ff"]
                return visit(name, x), cache
            case ():
                return visit("embeddings" if name == "drop_emb" else name, call(*args, **kwargs))
            case ("att", "W_query" | "W_key" | "W_value" as projection):
                role = projection.removeprefix("W_")
                self.held[role] = visit(f"{block}/att/{role}", self._split(call(x)))
                return self._join(self.held[role])
            case ("att", "out_proj"):
                heads = self._split(x)
                if f"{block}/att/weights" in {*self.wanted, *self.functions}:
                    query, keys, values = (self.held[role] for role in ("query", "key", "value"))
                    query = scale_query(self.cfg, block_index(block) or 0, query)
                    every = range(query.shape[-2])
                    weights = attention_weights(query, keys, Visibility().mask(every, every))
                    if (patched := visit(f"{block}/att/weights", weights)) is not weights:
                        heads = mean_of_values(patched, values)
                return call(self._join(visit(f"{block}/att/heads", heads)))
            case ("norm2",):
                middle = visit(f"{block}/middle", x)
                if middle is not x:
                    self.held["middle"] = middle
                return visit(name, call(middle))
            case ("ff", "layers_0"):
                return visit(f"{block}/ff/wide", call(x))
            case ("ff", "layers_2"):
                return call(visit(f"{block}/ff/active", x))
            case ("norm1",) | ("ff",) as last:
                self.held[last[0]] = visit(name, call(x))
                return self.held[last[0]]
        return call(*args, **kwargs)

    def _visit(self, module: nn.Module, name: str, value: jax.Array) -> jax.Array:
        if name in self.functions:
            given = self.functions[name](value)
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
            value = new.astype(value.dtype)
        if name in self.wanted:
            module.sow("intermediates", name, value)
        return value

    def _split(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, N, T, H]
        return x.reshape(*x.shape[:-1], self.cfg.n_heads, self.cfg.head_dim).swapaxes(1, 2)

    def _join(self, heads: jax.Array) -> jax.Array:  # [B, N, T, H] -> [B, T, D]
        return heads.swapaxes(1, 2).reshape(len(heads), heads.shape[2], self.cfg.emb_dim)
