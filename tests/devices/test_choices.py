"""The choices for TPU on a mesh. tests/test_sharding.py runs this file on 8 devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flaxgpt
from flaxgpt.model.rows import add_copies, drop_copies
from flaxgpt.platform import PLATFORMS, Platform
from flaxgpt.sharding import gather_weight, in_force
from flaxgpt.training import TrainConfig, init_state, train_step

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

CFG = flaxgpt.GPTConfig(61, 128, 32, 2, 2, 0.0, True, True)
IDS = np.random.default_rng(0).integers(0, 61, (8, 129))
SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.fixture(autouse=True)
def tpu_choices(monkeypatch):
    """Make the choices for TPU on CPU, with kernels interpreted and small pieces of the loss."""
    choices = dataclasses.replace(
        PLATFORMS["tpu"], attention=(("float32", "splash"),), interpreted=True, loss_positions=32
    )
    monkeypatch.setitem(PLATFORMS, "cpu", choices)


def two_losses(mesh):
    state = init_state(CFG, TrainConfig(batch_size=8), mesh=mesh)
    state, _ = train_step(state, IDS)
    return train_step(state, IDS)[1]["loss"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_are_those_of_one_device(shape):
    # Sums are made in another order.
    np.testing.assert_allclose(two_losses(flaxgpt.make_mesh(*shape)), two_losses(None), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ids_are_those_of_one_device(shape):
    params = flaxgpt.init(CFG, jax.random.key(0))
    prompts = [IDS[i, : 4 + i].tolist() for i in range(3)]
    expected = flaxgpt.generate(CFG, params, prompts, 12)
    split = flaxgpt.shard(params, flaxgpt.make_mesh(*shape), flaxgpt.shard_rules(CFG))
    assert flaxgpt.generate(CFG, split, prompts, 12) == expected


@pytest.mark.parametrize(
    ("mesh", "letters", "positions", "expected"),
    [
        ((1, 8, 1), "FD", 64, PartitionSpec()),
        ((1, 4, 2), "FD", 64, PartitionSpec("tensor")),
        ((1, 4, 2), "DN", 64, PartitionSpec(None, "tensor")),
        ((1, 8, 1), "FD", 63, PartitionSpec(None, "fsdp")),  # fewer positions than outputs
        ((1, 2, 4), "ND", 64, PartitionSpec(None, "fsdp")),  # 6 heads on 4 devices
    ],
    ids=str,
)
def test_a_weight_is_gathered_for_many_positions(mesh, letters, positions, expected):
    mesh = flaxgpt.make_mesh(*mesh)
    weight = jax.device_put(
        np.zeros((64, 48), np.float32), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    with in_force(mesh):
        found = jax.jit(gather_weight, static_argnums=(1, 2, 3))(weight, letters, positions, 6)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, expected), 2)


def test_each_device_copies_its_own_rows():
    x = np.arange(8, dtype=np.float32).reshape(8, 1, 1)  # two rows on each of four devices
    with in_force(flaxgpt.make_mesh(2, 2, 2)):
        wide = jax.jit(add_copies, static_argnums=1)(x, Platform(least_rows=(("float32", 3),)))
        rows = jax.jit(drop_copies, static_argnums=1)(wide, 8)
    assert wide.ravel().tolist() == [0, 1, 0, 2, 3, 2, 4, 5, 4, 6, 7, 6]
    np.testing.assert_array_equal(rows, x)
