"""Functions that each device runs on its own part of the arrays, such as kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flaxgpt.sharding.constrain import activation_sharding, mesh_in_force


def per_device(
    function: Callable[..., jax.Array], arguments: tuple[str, ...], result: str
) -> Callable[..., jax.Array]:
    """Return a function that runs `function` on each device's part of the arguments.

    XLA does not know how to split a kernel over a mesh. Without a mesh in force, `function` runs as
    it is.

    Args:
        function: a function of arrays, in which rows and heads do not depend on each other.
        arguments: the dimension letters of each argument, such as "BNTH"; see `constrain`.
        result: the dimension letters of the result, which is shaped like the first argument.
    """

    def run(*arrays: jax.Array) -> jax.Array:
        mesh = mesh_in_force(arrays[0])
        if mesh is None:
            return function(*arrays)
        specs = tuple(
            activation_sharding(letters, array.shape, mesh).spec
            for letters, array in zip(arguments, arrays, strict=True)
        )
        out = activation_sharding(result, arrays[0].shape, mesh).spec
        split: Any = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
        )
        return split(*arrays)

    return run
