"""Every test runs with exact products and strict types, and without a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples each time, however busy the machine: a failure is the change's doing.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

_compiled = []
# Once and for good: jax 0.7 has no public way to take a listener out again.
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _duration, **_: (
        event.endswith("backend_compile_duration") and _compiled.append(event)
    )
)


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles something."""
    del _compiled[:]
    jax.jit(lambda x: x + 1)(0)
    assert _compiled, "this jax does not tell when it compiles"
    return _compiled
