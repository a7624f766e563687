"""Every test runs with exact products and strict types, and without a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def compilations():
    """A list that grows by one name whenever XLA compiles something."""
    events = []

    def listen(name, duration, **metadata):
        if name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
