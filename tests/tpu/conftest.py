"""Settings of the tests that compile for TPU, and the recorded figures."""

import importlib.metadata
import json
from pathlib import Path

import jax
import pytest

from tpu.programs import BLOCKS, IS_RECORDING

FIGURES = Path(__file__).with_name("figures.json")
SETTINGS = {
    "jax_default_matmul_precision": None,  # products of float32 in bfloat16, as for users
    "jax_persistent_cache_min_compile_time_secs": float("inf"),  # no cache: it cannot be read
}


@pytest.fixture(scope="module", autouse=True)
def _default_precision():
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def figures():
    """The figures by program, for these versions and blocks; None if there are none.

    Written when recording.
    """
    every = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    versions, blocks = ", ".join(found), f"{BLOCKS} blocks"
    if not IS_RECORDING:
        yield every.get(versions, {}).get(blocks)
    else:
        mine = every.setdefault(versions, {}).setdefault(blocks, {})
        yield mine
        FIGURES.write_text(json.dumps(every, indent=2, sort_keys=True) + "\n")
