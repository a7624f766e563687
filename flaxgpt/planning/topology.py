"""TPU chips that are not attached, for which libtpu compiles programs that cannot run here."""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from flaxgpt._checks import check_size
from flaxgpt.planning.chips import chip_of
from flaxgpt.sharding import Mesh, make_mesh
from flaxgpt.sharding.mesh import check_axes

# Without them, libtpu asks a metadata server what machine it runs on, and refuses to be loaded by
# two processes. They matter only while it starts.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Where Linux shows TPU chips. With a TPU, libtpu must start as that machine needs it.
_ATTACHED = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")

_OLDEST = [0, 0, 23]  # of libtpu
_INVALID = "INVALID_ARGUMENT: "
# Installs the version of libtpu that this JAX asks for, and leaves JAX alone.
_INSTALL = f"pip install 'jax[tpu]=={jax.__version__}'"


def topology_devices(topology: str) -> tuple[Any, ...]:
    """Return devices that describe the chips of a topology. Nothing can run on them.

    `jax.devices()` stays what it is.

    Args:
        topology: a chip and how many of them are arranged how, such as "v5e:1x1", "v5e:2x4" or
            "v5p:2x2x1".

    Returns:
        The devices, for `flaxgpt.make_mesh(devices=...)`.

    Raises:
        ValueError: the topology is unknown, or libtpu, which has the compiler, is not installed.
    """
    chip = chip_of(topology)
    sizes = re.fullmatch(r"[^:]+:([1-9]\d*(?:x[1-9]\d*)*)", topology)
    lengths = [int(size) for size in sizes[1].split("x")] if sizes else []
    example = "x".join(["2"] * 2 + ["1"] * (chip.dimensions - 2))
    if len(lengths) != chip.dimensions:
        raise ValueError(
            f"the topology {topology!r} must have {chip.dimensions} dimensions, as in "
            f"{chip.name}:{example}"
        )
    return _devices(topology, tuple(lengths), example)


@functools.cache
def _devices(topology: str, lengths: tuple[int, ...], example: str) -> tuple[Any, ...]:
    """Return the devices of a topology, which libtpu describes once."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"libtpu, which has the compiler for TPUs, is not installed: {_INSTALL}, on Linux (it "
            "needs no TPU)"
        )
    attached = any(glob.glob(pattern) for pattern in _ATTACHED)
    if not attached and _too_old(version := importlib.metadata.version("libtpu")):
        raise ValueError(f"libtpu {version} does not start without a TPU: {_INSTALL}")
    from jax.experimental import topologies

    chip = chip_of(topology)
    options: dict[str, Any] = dict(chip.options)
    if set(lengths) == {1}:  # by default, a host has four chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _libtpu_environment({} if attached else _ENVIRONMENT):
            found = topologies.get_topology_desc(topology, "tpu", **options)
    except RuntimeError as error:
        reason = "".join(str(error).splitlines()[:1])
        if isinstance(error, JaxRuntimeError) and reason.startswith(_INVALID):
            reason = reason.removeprefix(_INVALID)
            raise ValueError(
                f"libtpu does not know the topology {topology!r} ({reason}): use one that exists, "
                f"such as {chip.name}:{example}"
            ) from error
        raise ValueError(
            f"libtpu {importlib.metadata.version('libtpu')} cannot be used by JAX "
            f"{jax.__version__} ({reason}): for the version that fits, {_INSTALL}"
        ) from error
    return tuple(found.devices)


def topology_mesh(topology: str, sizes: Mapping[str, int] | None) -> Mesh:
    """Return a mesh of the chips of a topology.

    Args:
        topology: the chips, as for `topology_devices`.
        sizes: sizes of the axes, 1 for those that are left out, -1 for as many chips as there are;
            None means that `data` has all chips.

    Raises:
        ValueError: as for `topology_devices` and `flaxgpt.make_mesh`, or there are too few chips.
    """
    given = _check_sizes(sizes)
    devices = topology_devices(topology)
    if (count := math.prod(size for size in given.values() if size != -1)) > len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in given.items())
        raise ValueError(
            f"the mesh {asked} needs {count} chips, but {topology} has {len(devices)}: use a "
            "smaller mesh or a larger topology"
        )
    return make_mesh(**given, devices=devices)


def _check_sizes(sizes: Any) -> dict[str, int]:
    """Return the sizes of a mesh for `make_mesh`, or raise ValueError."""
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping):
        raise ValueError(
            f"mesh={sizes!r} must be a dict with the sizes of axes, such as {{'fsdp': 4}}"
        )
    check_axes(sizes)
    checked = {name: -1 if size == -1 else check_size(name, size) for name, size in sizes.items()}
    return {"data": 1} | checked if checked else {}


@contextlib.contextmanager
def _libtpu_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those environment variables that are missing."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _too_old(version: str) -> bool:
    """Whether this version of libtpu crashes where there is no TPU."""
    return [int(part) for part in re.findall(r"\d+", version)[:3]] < _OLDEST
