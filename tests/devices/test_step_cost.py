"""Plans of programs for several devices. tests/test_sharding.py runs this file on 8 devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import flaxgpt
from flaxgpt.planning import Collective, Unsplit, collectives, step_cost
from flaxgpt.training import TrainConfig, abstract_state, init_state

CFG = flaxgpt.GPTConfig(
    vocab_size=48, context_length=16, emb_dim=32, n_heads=4, n_layers=2, tie_embeddings=True
)
ADAMW = TrainConfig(steps=4, batch_size=8)
MUON = TrainConfig(steps=4, batch_size=8, optimizer="muon")


def bytes_on_one_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("train_cfg", [ADAMW, MUON])
def test_a_state_can_be_described_without_its_arrays(train_cfg):
    mesh = flaxgpt.make_mesh(2, 2, 2)
    state, plan = (f(CFG, train_cfg, mesh=mesh) for f in (init_state, abstract_state))
    assert jax.tree.structure(state) == jax.tree.structure(plan)
    for array, described in zip(*map(jax.tree.leaves, (state, plan)), strict=True):
        assert isinstance(described, jax.ShapeDtypeStruct)
        assert (array.shape, array.dtype) == (described.shape, described.dtype)
        assert array.sharding == described.sharding


@pytest.mark.slow
@pytest.mark.parametrize("train_cfg", [ADAMW, MUON])
def test_weights_and_optimizer_state_have_the_size_of_real_ones(train_cfg):
    mesh = flaxgpt.make_mesh(2, 2, 2)
    cost, state = step_cost(CFG, train_cfg, mesh, 8), init_state(CFG, train_cfg, mesh=mesh)
    assert cost.weights == cost.gradients == bytes_on_one_device(state.params)
    assert cost.optimizer == bytes_on_one_device(state.opt_state)
    assert cost.arguments >= cost.weights + cost.optimizer
    assert cost.peak == cost.arguments + cost.temporaries
    assert cost.unsplit == ()
    assert {axis for found in cost.collectives for axis in found.axes} == set(mesh.axis_names)


@pytest.mark.slow
def test_data_parallelism_sums_the_gradients():
    cost = step_cost(CFG, ADAMW, flaxgpt.make_mesh(8))
    (found,) = cost.collectives
    assert (found.kind, found.axes) == ("all-reduce", ("data",))
    # The two uses of the tied embedding have a gradient each; the loss is a few scalars.
    twice = 4 * CFG.vocab_size * CFG.emb_dim
    assert 0 <= found.bytes - cost.gradients <= twice + 64
    assert cost.received == found.received == found.bytes * 2 * 7 // 8


@pytest.mark.slow
def test_pieces_of_a_batch_communicate_once_each():
    def gathered(accumulate):
        settings = TrainConfig(steps=4, batch_size=16, accumulate=accumulate)
        cost = step_cost(CFG, settings, flaxgpt.make_mesh(1, 2, 1))
        return {found.kind: found for found in cost.collectives if found.axes == ("fsdp",)}

    once, four = gathered(1), gathered(4)
    assert four["all-reduce"].bytes > 3 * once["all-reduce"].bytes


@pytest.mark.slow
def test_parameters_that_stay_whole_are_explained():
    cfg = flaxgpt.GPTConfig(49, 16, 30, 5, 1, tie_embeddings=True)
    found = step_cost(cfg, ADAMW, flaxgpt.make_mesh(1, 4, 2), 8).unsplit
    key = "trf_blocks_0/att/W_key/weight"
    assert found[:4] == (
        Unsplit("pos_emb/weight", (16, 30), "fsdp", "30 is not a multiple of 4"),
        Unsplit("tok_emb/weight", (49, 30), "tensor", "49 is not a multiple of 2"),
        Unsplit("tok_emb/weight", (49, 30), "fsdp", "30 is not a multiple of 4"),
        Unsplit(key, (30, 30), "tensor", "5 heads are not a multiple of 2"),
    )


def test_the_collectives_of_a_program_are_found():
    mesh = flaxgpt.make_mesh(2, 2, 2)

    def local(x):  # float32 [4, 4] on each device
        x, _ = lax.scan(lambda x, _: (lax.psum(x, "tensor") / 2, None), x, None, length=5)
        y = lax.all_gather(x, ("data", "fsdp"))  # [4, 4, 4]
        z = lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)  # [2, 4]
        x = lax.all_to_all(x, "data", 0, 0, tiled=True)
        x = lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        return x + y.sum(0) + jnp.concatenate([z, z])

    spec = PartitionSpec(("data", "fsdp"), "tensor")
    function = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = {item.kind: item for item in collectives(function.lower(x).compile().as_text(), mesh)}
    assert found == {
        "all-reduce": Collective("all-reduce", ("tensor",), 5, 5, 5 * 64, 5 * 64),
        "all-gather": Collective("all-gather", ("data", "fsdp"), 1, 1, 256, 192),
        "reduce-scatter": Collective("reduce-scatter", ("fsdp",), 1, 1, 32, 32),
        "all-to-all": Collective("all-to-all", ("data",), 1, found["all-to-all"].arrays, 64, 32),
        "collective-permute": Collective("collective-permute", ("tensor",), 1, 1, 64, 64),
    }
