"""Which mesh axes split each activation: a table of dimension letters, applied by `constrain`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxgpt.sharding.mesh import axis_names

ACTIVATIONS = {
    "B": ("data", "fsdp"),  # rows
    "N": ("tensor",),  # heads
    "F": ("tensor",),  # units of the feed-forward layer
    "V": ("tensor",),  # logits
}
"""The axes that split each dimension; see `flaxgpt.model` for the letters. Others are not split."""


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Return `x`, split over the mesh in force as the table says.

    Without a mesh in force, or with one of other axes, this does nothing, and adds nothing to the
    compiled program. An axis that does not divide a dimension does not split it. Logits are too
    large for that: where no axis divides the vocabulary, as GPT-2's 50257, its axes split the rows.

    Args:
        x: an array.
        letters: one letter per dimension, such as "BTD".
    """
    mesh = mesh_in_force(x)
    names = {name for axes in ACTIVATIONS.values() for name in axes}
    if mesh is None or names.isdisjoint(mesh.axis_names):
        return x
    return lax.with_sharding_constraint(x, activation_sharding(letters, x.shape, mesh))


def gather_weight(weight: jax.Array, letters: str, positions: int, heads: int = 1) -> jax.Array:
    """Return a weight for a product with many positions: gathered along "fsdp" before it.

    Left to itself, XLA for TPU multiplies the parts one after another while they move on, in
    products that are too small for the matrix unit: a training step of GPT-2 XL on 8 chips is
    estimated to compute for two thirds longer. Where there are fewer positions than outputs of the
    product, as in decoding, the other factor is smaller than the weight, and XLA decides what to
    move. So it does where "tensor" does not divide the vocabulary or the heads.

    Args:
        weight: [out, in], in the dtype to compute in.
        letters: its dimensions, such as "FD".
        positions: rows of the other factor on all devices.
        heads: in a dimension "N", which is split by whole heads.
    """
    mesh = mesh_in_force(weight)
    if mesh is None or positions < weight.shape[0]:
        return weight
    units = tuple(
        heads if letter == "N" else size for letter, size in zip(letters, weight.shape, strict=True)
    )
    split = activation_sharding(letters, units, mesh)
    wanted = [set(ACTIVATIONS.get(letter, ())) & set(mesh.axis_names) for letter in letters]
    if any(axes and entry is None for axes, entry in zip(wanted, split.spec, strict=True)):
        return weight
    return lax.with_sharding_constraint(weight, split)


def mesh_in_force(x: jax.Array) -> Any:
    """Return the mesh in force while `x` is traced, or None: a concrete array stays as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    is_used = isinstance(x, jax.core.Tracer) and not mesh.empty
    return mesh if is_used and set(mesh.axis_types) == {AxisType.Auto} else None


def activation_sharding(letters: str, shape: tuple[int, ...], mesh: Any) -> NamedSharding:
    """Return how a mesh splits an activation; see `constrain`."""
    sizes = dict(mesh.shape)
    entries = [
        fitting(ACTIVATIONS.get(letter, ()), size, sizes)
        for letter, size in zip(letters, shape, strict=True)
    ]
    if letters[0] == "B" and letters[-1] == "V" and entries[-1] is None:
        entries[0] = fitting((*ACTIVATIONS["B"], *ACTIVATIONS["V"]), shape[0], sizes)
    return NamedSharding(mesh, PartitionSpec(*entries))


def replicated(x: jax.Array) -> jax.Array:
    """Return `x`, whole on every device of the mesh in force, so that each process can read it."""
    mesh = mesh_in_force(x)
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def fitting(axes: Any, size: int, sizes: dict[str, int]) -> tuple[str, ...] | None:
    """Return those axes that together split a dimension evenly, or None for no axis.

    They are taken in order, and left out if they do not divide what is left of the dimension.
    """
    kept: list[str] = []
    for name in axis_names(axes):
        parts = math.prod(sizes[other] for other in (*kept, name) if other in sizes)
        if name in sizes and size % parts == 0:
            kept.append(name)
    return tuple(kept) or None


def batch_parts(mesh: Any) -> int:
    """Return into how many parts a mesh splits the rows of a batch; 1 for None."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in ACTIVATIONS["B"])


def share_of_rows(mesh: Any, rows: int) -> tuple[int, int]:
    """Return which part of the rows of a batch the devices of this process need: (index, count).

    Process `index` of `count` has the rows from `index * rows / count` on. Processes whose devices
    need the same rows, or rows that do not lie together, have larger parts, up to all rows.
    """
    if mesh is None:
        return 0, 1
    sharding = activation_sharding("B", (rows,), mesh)
    parts: Any = sharding.addressable_devices_indices_map((rows,)).values()
    slices = [index[0] for index in parts]
    start = min(part.start or 0 for part in slices)
    stop = max(rows if part.stop is None else part.stop for part in slices)
    size = stop - start
    covered = {row for part in slices for row in range(rows)[part]}
    if rows % size or start % size or len(covered) < size:
        return 0, 1
    return start // size, rows // size


def place_rows(rows: Any, total: int, axis: int, mesh: Any) -> Any:
    """Return an array that is split along the rows of a batch, or, without a mesh, the given one.

    Args:
        rows: NumPy array with this process's share of the rows; see `share_of_rows`.
        total: rows of all processes.
        axis: the axis of the rows.
        mesh: the mesh, or None.
    """
    if mesh is None:
        return rows
    shape = (*rows.shape[:axis], total, *rows.shape[axis + 1 :])
    letters = "".join("B" if i == axis else "T" for i in range(rows.ndim))
    sharding = activation_sharding(letters, shape, mesh)
    return jax.make_array_from_process_local_data(sharding, rows, shape)


@contextlib.contextmanager
def in_force(mesh: Any) -> Iterator[None]:
    """Let `constrain` use a mesh during a `with` block, also inside `jit`; None changes nothing."""
    if mesh is None:
        yield
    else:
        with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
            yield
