"""Which mesh axes split each parameter: a table from path pattern to `PartitionSpec`.

Every matrix is split along both of its dimensions: the one that heads, feed-forward units or
vocabulary make up along "tensor", the other along "fsdp". So a product needs to gather the parts
along "fsdp" only, and two products in a row, such as the two of the feed-forward layer, exchange
data along "tensor" once, after the second.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxgpt.config import GPTConfig, check_config
from flaxgpt.sharding.constrain import fitting
from flaxgpt.sharding.mesh import axis_names, check_axes, check_mesh
from flaxgpt.typing import Params

P = PartitionSpec
_ATTENTION = "/att/"

TABLE: Mapping[str, PartitionSpec] = {  # weights are [out, in]
    "*tok_emb/weight": P("tensor", "fsdp"),  # [V, D]
    "*tok_emb/weight_scale": P("tensor"),  # [V], of int8 weights
    "*pos_emb/weight": P(None, "fsdp"),  # [context_length, D]
    "*/att/W_*/weight": P("tensor", "fsdp"),  # [N H, D]
    "*/att/W_*/weight_scale": P("tensor"),  # [N H]
    "*/att/W_*/bias": P("tensor"),  # [N H]
    "*/att/out_proj/weight": P("fsdp", "tensor"),  # [D, N H]
    "*/ff/layers_0/weight": P("tensor", "fsdp"),  # [F, D]
    "*/ff/layers_0/weight_scale": P("tensor"),  # [F]
    "*/ff/layers_0/bias": P("tensor"),  # [F]
    "*/ff/layers_2/weight": P("fsdp", "tensor"),  # [D, F]
    "*out_head/weight": P("tensor", "fsdp"),  # [V, D]
    "*out_head/weight_scale": P("tensor"),  # [V]
    "*": P(),  # biases, norms and scales [D], which are small: whole on every device
}
"""The default rules. The first pattern that matches a path decides; `*` matches anything."""


@dataclasses.dataclass(frozen=True)
class ShardRules:
    """Which mesh axes split each parameter. Hashable, so it can be a static argument.

    A mesh axis splits a dimension only if it divides it: GPT-2's vocabulary of 50257 is whole along
    `tensor=2`. Attention is split by whole heads: with 25 heads, as in GPT-2 XL, all of attention
    is whole along `tensor=2`. Axes that a mesh lacks split nothing.

    Attributes:
        table: pairs of a path pattern, in which `*` matches anything, and a `PartitionSpec`; the
            first that matches a path decides.
        n_heads: attention heads, which stay whole.
    """

    table: tuple[tuple[str, PartitionSpec], ...]
    n_heads: int

    def replace(self, changes: Mapping[str, PartitionSpec]) -> ShardRules:
        """Return rules in which those in `changes` come first."""
        return dataclasses.replace(self, table=(*changes.items(), *self.table))

    def rule(self, path: str) -> PartitionSpec:
        """Return the first rule whose pattern matches a path; ValueError if none does."""
        found = (spec for pattern, spec in self.table if fnmatch.fnmatchcase(path, pattern))
        if (spec := next(found, None)) is None:
            raise ValueError(f"no rule matches {path}: add one, such as '*': PartitionSpec()")
        return spec

    def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """Return how a mesh splits one parameter.

        Args:
            path: path of the parameter, such as "trf_blocks_0/ff/layers_0/weight".
            shape: its shape.
            mesh: the mesh.

        Raises:
            ValueError: no pattern matches, or the specification has an unknown axis or too many
                dimensions.
        """
        if not shape:  # a count, or a random key
            return P()
        spec = self.rule(path)
        if len(spec) > len(shape):
            raise ValueError(f"the rule {spec} for {path} has more dimensions than {shape}")
        named = [name for axes in spec for name in axis_names(axes)]
        check_axes([name for name in named if name not in mesh.axis_names])
        sizes = dict(mesh.shape)
        if _ATTENTION in path and self.n_heads % sizes.get("tensor", 1):
            del sizes["tensor"]
        split = [fitting(axes, size, sizes) for axes, size in zip(spec, shape, strict=False)]
        # As users write it, and as JAX compares it: 'tensor' for one axis, nothing at the end.
        axes = [names[0] if names and len(names) == 1 else names for names in split]
        while axes and axes[-1] is None:
            axes.pop()
        return P(*axes)

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """Return the `NamedSharding` of each array of a tree of parameters or optimizer state.

        The moments of an optimizer are split like their parameters, whose paths end theirs.
        """

        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            return NamedSharding(mesh, self.spec(path_of(path), leaf.shape, mesh))

        return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_rules(cfg: GPTConfig) -> ShardRules:
    """Return the rules for a model: which axes of `make_mesh` split each parameter.

    >>> import flaxgpt
    >>> rules = flaxgpt.shard_rules(flaxgpt.GPTConfig())
    >>> tuple(dict(rules.table)["*/ff/layers_2/weight"])  # [D, F]
    ('fsdp', 'tensor')

    Args:
        cfg: the configuration.

    Returns:
        The default table, for attention heads of this number.

    Raises:
        ValueError: `cfg` is not a GPTConfig.
    """
    check_config(cfg)
    return ShardRules(tuple(TABLE.items()), cfg.n_heads)


def check_rules(rules: Any, cfg: GPTConfig, mesh: Mesh | None) -> ShardRules | None:
    """Return the rules to use, the default ones for None, or None without a mesh.

    Raises ValueError for other kinds of rules, and for rules without a mesh.
    """
    if rules is not None:
        _check_kind(rules)
    if mesh is None and rules is not None:
        raise ValueError("rules have no effect without a mesh: pass mesh=flaxgpt.make_mesh()")
    return shard_rules(cfg) if mesh is not None and rules is None else rules


def _check_kind(rules: Any) -> None:
    if not isinstance(rules, ShardRules):
        raise ValueError(
            f"rules must be ShardRules, as flaxgpt.shard_rules(cfg) returns them, got {rules!r}"
        )


def shard(params: Params, mesh: Mesh, rules: ShardRules) -> Params:
    """Split parameters over a mesh.

    Args:
        params: parameters of any placement, as JAX or NumPy arrays.
        mesh: from `make_mesh`, or any mesh whose axes have these names.
        rules: from `shard_rules`, for the configuration of the parameters.

    Returns:
        The parameters, on the mesh. Arrays that are already split this way are not copied.

    Raises:
        ValueError: the mesh has an unknown axis, or a rule does not fit a parameter.
    """
    mesh = check_mesh(mesh)
    _check_kind(rules)
    return jax.tree.map(place, params, rules.shardings(params, mesh))


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Return an array on a mesh, which may have devices of other processes.

    An array of this process must have the same values in all of them.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        whole = NamedSharding(sharding.mesh, P())
        data = place(jax.random.key_data(array), whole)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def rules_of(params: Params) -> ShardRules:
    """Return the rules by which parameters on a mesh are split: one for each of them.

    They stay as they are even if heads are split, as any number of heads divides 0.
    """
    leaves = jax.tree.leaves_with_path(params)
    pairs = ((f"*{path_of(p)}", getattr(leaf.sharding, "spec", P())) for p, leaf in leaves)
    return ShardRules((*pairs, ("*", P())), n_heads=0)


def constrain_tree(tree: Any, mesh: Mesh | None, rules: ShardRules | None) -> Any:
    """Return a tree of parameters or optimizer state, split by the rules; for use inside `jit`."""
    if mesh is None or rules is None:
        return tree
    return lax.with_sharding_constraint(tree, rules.shardings(tree, mesh))


def path_of(path: tuple[Any, ...]) -> str:
    """Return the names along a path of a tree, joined by slashes."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
