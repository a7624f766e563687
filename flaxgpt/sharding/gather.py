"""Arrays of several processes, brought together in one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_on_first(tree: Any) -> Any:
    """Return the arrays of a tree as NumPy arrays in process 0, and empty ones in the others.

    Call it in all processes. They bring together one array after another. An array that a process
    holds by itself is returned as it is.
    """
    return jax.tree.map(_gather, tree)


def is_shared(tree: Any) -> bool:
    """Return whether some arrays of a tree are spread over several processes."""
    leaves = jax.tree.leaves(tree)
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves)


def _gather(leaf: Any) -> Any:
    if not is_shared(leaf):
        return leaf
    whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return whole if jax.process_index() == 0 else np.empty(0, whole.dtype)


def wait_for_all(name: str) -> None:
    """Wait until all processes have reached this place."""
    multihost_utils.sync_global_devices(name)
