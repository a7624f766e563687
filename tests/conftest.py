"""Every test runs with exact products and strict types, and without a network."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Most of the time goes into compiling, often the same functions in several processes: what one
    # of this run's has compiled, the others read. A run starts with nothing.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flaxgpt-tests-")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # with a limit, JAX locks its files
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples each time, however busy the machine: a failure is the change's doing.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


def pytest_collection_modifyitems(items):
    """Puts the longest file first: last, it would leave the other workers with nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


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


@pytest.fixture(scope="module")
def quick_compilation():
    """Has XLA optimise little, in this process and those it starts, and so compile in less time.

    For tests of what happens; those that compare digits compile as users do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # what was compiled so is for no other module
