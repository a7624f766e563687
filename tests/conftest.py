"""Settings of every test: full matmul precision, strict promotion, no network."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Most of the time goes into compilation, often of the same functions in several processes, so
    # the processes of one run share a compilation cache. Each run starts with an empty one.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flaxgpt-tests-")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # with a limit, JAX locks the files
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

# These need 8 devices; test_sharding.py runs them in a process that simulates them.
collect_ignore = [] if "FLAXGPT_DEVICES" in os.environ else ["devices"]
# These need the TPU compiler; scripts/test_tpu runs them.
collect_ignore += [] if "FLAXGPT_TPU" in os.environ else ["tpu"]

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples every time and no deadlines, so a failure is caused by a change.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


def compiles_quickly(item):
    return "quick_compilation" in item.fixturenames


# They start other processes and take minutes, in which the other tests can run.
LONGEST = ("test_sharding.py", "test_notebook.py")


def pytest_collection_modifyitems(items):
    """Run the longest files first, and those that compile quickly one after another.

    The latter share compiled code.
    """
    items.sort(key=lambda item: (item.path.name not in LONGEST, not compiles_quickly(item)))


_compiled = []
_unchecked = []  # compilations since memory maps were counted


def _on_event(event, _duration, **_):
    if event.endswith("backend_compile_duration"):
        _compiled.append(event)
        _unchecked.append(event)


# Registered once, because jax 0.7 has no public function that removes a listener.
jax.monitoring.register_event_duration_secs_listener(_on_event)


@pytest.fixture(autouse=True)
def _few_memory_maps():
    """Free compiled code in time: each program takes some memory maps, and Linux allows 65,530.

    A process that has no more of them crashes in the next compilation.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if len(_unchecked) >= 100 and maps.exists():
        del _unchecked[:]
        if maps.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()


@pytest.fixture
def compilations():
    """A list that grows by one with every XLA compilation."""
    del _compiled[:]
    jax.jit(lambda x: x + 1)(0)
    assert _compiled, "this version of JAX does not report compilations"
    return _compiled


@pytest.fixture(scope="module", autouse=True)
def _optimization(request):
    """Compile as users do, or faster in the modules that use `quick_compilation`."""
    quick = compiles_quickly(request)
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # code of one kind must not serve modules of the other


@pytest.fixture(scope="module")
def quick_compilation(_optimization):
    """Compile faster by turning off most XLA optimizations, in this and started processes.

    For tests of behavior. Tests that compare numbers to the last digits compile as users do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
