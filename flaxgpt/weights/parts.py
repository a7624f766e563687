"""Reading tensors onto a mesh, each device's part on its own."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flaxgpt.weights.table import Entry
from flaxgpt.weights.tensors import Part, Tensor, read_part

Targets = dict[str, jax.ShapeDtypeStruct]
"""The shape, dtype and sharding of each parameter, by its path."""


def put_on_mesh(tensor: Tensor, entries: Sequence[Entry], targets: Targets) -> dict[str, jax.Array]:
    """Return the parameters in a tensor by their paths, split over the mesh of their targets.

    Only the parts of this process's devices are read, and the host holds one of them at a time.
    """
    return {entry.ours: _put(tensor, entry, targets[entry.ours]) for entry in entries}


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Return whether two float32 arrays with the same sharding have the same bits.

    The answer is the same in every process.
    """
    assert isinstance(a.sharding, NamedSharding)
    whole = NamedSharding(a.sharding.mesh, PartitionSpec())
    return bool(jax.jit(_same_bits, out_shardings=whole)(a, b))


def _same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = (lax.bitcast_convert_type(x, jnp.uint32) for x in (a, b))  # NaN equals NaN
    return jnp.array_equal(a, b)


def _put(tensor: Tensor, entry: Entry, target: jax.ShapeDtypeStruct) -> jax.Array:
    arrays: list[jax.Array] = []
    for part, devices in _devices_by_part(target).items():
        arrays += _put_part(tensor, entry, part, devices)
    return jax.make_array_from_single_device_arrays(
        target.shape, target.sharding, arrays, dtype=target.dtype
    )


def _devices_by_part(target: jax.ShapeDtypeStruct) -> dict[Part, list[jax.Device]]:
    found: dict[Part, list[jax.Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        pairs = zip(index, target.shape, strict=True)
        part = tuple(range(*indices.indices(size)) for indices, size in pairs)
        found.setdefault(part, []).append(device)
    return found


def _put_part(
    tensor: Tensor, entry: Entry, part: Part, devices: Sequence[jax.Device]
) -> list[jax.Array]:
    # In its own function, so that the copy on the host is freed before the next part is read.
    values = read_part(tensor, _stored_part(tensor.shape, entry, part))
    values = np.ascontiguousarray(values.T if entry.transposed else values)
    return [jax.device_put(values, device).block_until_ready() for device in devices]


def _stored_part(shape: tuple[int, ...], entry: Entry, part: Part) -> Part:
    """Return the part of a stored tensor of this shape that holds a part of a parameter."""
    stored = list(reversed(part) if entry.transposed else part)
    if entry.third is not None:
        axis = entry.output_axis
        start, indices = entry.third * shape[axis] // 3, stored[axis]
        stored[axis] = range(start + indices.start, start + indices.stop)
    return tuple(stored)
