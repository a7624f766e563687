"""Parameters on several devices. The cases are in tests/devices, which need 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import flaxgpt
from command import QUICK
from flaxgpt.sharding import activation_sharding, automatic, to_automatic

FOLDER = Path(__file__).parent / "devices"


SLOW = [
    pytest.param(path, "slow", marks=pytest.mark.slow, id=path.name)
    for path in sorted(FOLDER.glob("test_*.py"))
]


@pytest.mark.parametrize(("path", "selection"), [pytest.param(FOLDER, "not slow", id="all"), *SLOW])
def test_cases_pass_on_eight_simulated_devices(path, selection):
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "FLAXGPT_DEVICES": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", selection]
    command = [sys.executable, "-m", "pytest", *options, path]
    done = subprocess.run(
        command, env={**os.environ, **QUICK, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        ("BTV", (8, 5, 48), (("data", "fsdp"), None, ("tensor",))),
        ("BTV", (8, 5, 49), (("data", "fsdp", "tensor"), None, None)),
        ("BTV", (4, 5, 49), (("data", "fsdp"), None, None)),
        ("BNTH", (8, 3, 5, 2), (("data", "fsdp"), None, None, None)),
        ("V", (49,), (None,)),
    ],
)
def test_logits_are_split_by_rows_if_not_by_vocabulary(letters, shape, expected):
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    assert activation_sharding(letters, shape, mesh).spec == PartitionSpec(*expected)


def test_arrays_on_one_device_are_passed_on_as_they_are():
    params = flaxgpt.init(flaxgpt.GPTConfig(8, 4, 4, 1, 1), jax.random.key(0))
    same = to_automatic(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, params)), strict=True))


def test_other_arguments_are_passed_on_as_they_are():
    seen = []
    automatic(lambda *args, **kwargs: seen.append((args, kwargs)))("a", (1, None), x=np.float32(2))
    assert seen == [(("a", (1, None)), {"x": np.float32(2)})]
