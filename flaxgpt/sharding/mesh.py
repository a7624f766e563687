"""The mesh: devices as a grid, whose axes have names.

data      each device computes its own rows of the batch, with whole parameters
fsdp      rows of the batch too, but parameters are split, and gathered block by block
tensor    each device computes its own heads, feed-forward units and logits of every row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding

from flaxgpt._checks import check_size

__all__ = ["AXES", "Mesh", "check_mesh", "make_mesh", "mesh_of", "parse_mesh"]

AXES = ("data", "fsdp", "tensor")
"""The axes, from the one that communicates least to the one that communicates most."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of devices with the axes `data`, `fsdp` and `tensor`.

    >>> import flaxgpt
    >>> dict(flaxgpt.make_mesh().shape)  # with one device
    {'data': 1, 'fsdp': 1, 'tensor': 1}

    Args:
        data: parts of the batch, each of which is computed with whole parameters. -1 means as many
            as there are devices for; one of the three sizes may be -1.
        fsdp: parts of the batch and of every large parameter, which is gathered when it is used
            (fully sharded data parallelism; Rajbhandari et al. 2020, stage 3).
        tensor: parts of attention heads, feed-forward units and vocabulary (Shoeybi et al. 2019).
        devices: the devices to use; all by default. JAX arranges them, so that
            neighbors on the mesh are close to each other.

    Returns:
        A mesh with automatic axes. Devices beyond the product of the sizes are not used.

    Raises:
        ValueError: a size is out of range, the sizes exceed or do not divide the devices, the chips
            cannot be connected this way, or, with several processes, devices would be left out.
    """
    found = list(jax.devices()) if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        if size != -1:
            sizes[name] = check_size(name, size)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"the mesh {asked} has several sizes of -1: give all but one of them")
    known = math.prod(size for size in sizes.values() if size != -1)
    if known > len(found):
        raise ValueError(
            f"the mesh {asked} needs {known} devices, but there are {len(found)}: use a smaller "
            "mesh, or simulate devices on CPU with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={known}"
        )
    if rest:
        if len(found) % known:
            raise ValueError(
                f"the mesh {asked} does not multiply out: {len(found)} devices are not a multiple "
                f"of {known}; give {rest[0]} too, or sizes that divide {len(found)}"
            )
        sizes[rest[0]] = len(found) // known
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count < len(found):
        raise ValueError(
            f"the mesh {asked} has {count} of the {len(found)} devices of {jax.process_count()} "
            "processes: all of them must take part, as with data=-1"
        )
    return Mesh(_arranged(tuple(sizes.values()), found[:count]), AXES)


def _arranged(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Return devices as an array of these sizes, neighbors close to each other."""
    # JAX raises NotImplementedError where an axis is not a number of whole rows of chips, unless it
    # may split them, and AssertionError where the chips do not form a box.
    arrange = partial(mesh_utils.create_device_mesh, sizes, devices)
    try:
        try:
            return arrange()
        except NotImplementedError:
            return arrange(allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"{len(devices)} devices of kind {devices[0].device_kind} cannot be arranged as the "
            f"mesh {asked}: use sizes that divide the number of chips, such as powers of two"
        ) from error


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes in a text such as "data=2,fsdp=4", for `make_mesh`.

    Raises:
        ValueError: the text has another form, or names an unknown axis.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.removeprefix("-").isdecimal() or name in sizes:
            raise ValueError(
                f"the mesh {text!r} must be sizes of {', '.join(AXES)}, as in data=2,fsdp=4"
            )
        sizes[name] = int(size)
    check_axes(sizes)
    return sizes


def axis_names(axes: Any) -> tuple[str, ...]:
    """Return the axes in one dimension of a `PartitionSpec`: a name, several, or none."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check_axes(names: Any) -> None:
    """Raise ValueError for a name that is not in `AXES`."""
    if unknown := [name for name in names if name not in AXES]:
        raise ValueError(
            f"unknown mesh axis {unknown[0]!r}: flaxgpt's axes are {', '.join(AXES)}; to use a "
            "mesh with other names, rename its axes, as in "
            "jax.sharding.Mesh(mesh.devices, ('data', 'tensor'))"
        )


def check_mesh(mesh: Any) -> Mesh:
    """Return a mesh with automatic axes, or raise ValueError unless its axes are flaxgpt's."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, as flaxgpt.make_mesh returns it, got {mesh!r}"
        )
    check_axes(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh of several devices that holds the arrays of a tree, or None."""
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.core.Tracer):
            sharding = getattr(leaf, "sharding", None)
            mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
            if isinstance(mesh, Mesh) and mesh.size > 1:
                return mesh
    return None
