"""Functions that take arrays on any mesh, with automatic or explicit axes.

JAX's compiler propagates shardings along automatic axes. Along explicit ones, the default of
`jax.make_mesh` in newer versions, each operation must say how its result is sharded. The model says
nothing of meshes, so its functions run with automatic axes whatever those of their arguments are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxgpt.sharding.constrain import in_force
from flaxgpt.sharding.mesh import mesh_of

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def automatic(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function of arrays run on the mesh that holds them, with automatic axes.

    The mesh is in force meanwhile, so that `constrain` splits activations over it. Results are on
    automatic axes too, or under a caller's `jit` with explicit axes, replicated.
    """

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        leaves, tree = jax.tree.flatten((args, kwargs))
        mesh = next(filter(None, map(_explicit_mesh_of_tracer, leaves)), None)
        if mesh is None:
            args, kwargs = jax.tree.unflatten(tree, map(_to_automatic, leaves))
            with in_force(mesh_of((args, kwargs))):
                return function(*args, **kwargs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def of_arrays(*arrays: jax.Array) -> Result:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            return function(*args, **kwargs)

        with jax.sharding.use_abstract_mesh(mesh):
            run = jax.sharding.auto_axes(of_arrays, out_sharding=PartitionSpec())
            return run(*(leaves[place] for place in places))

    return wrapped


def to_automatic(tree: Any) -> Any:
    """Return a tree whose arrays are on automatic axes. No data is copied."""
    return jax.tree.map(_to_automatic, tree)


def _to_automatic(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return leaf
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return leaf
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # automatic by default
    placed = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return jax.device_put(leaf, placed)


def _explicit_mesh_of_tracer(leaf: Any) -> Any:
    if not isinstance(leaf, jax.core.Tracer):
        return None
    mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None
