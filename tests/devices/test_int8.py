"""int8 weights on a mesh. tests/test_sharding.py runs this file on 8 devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import flaxgpt

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

CFG = flaxgpt.GPTConfig(64, 16, 32, 8, 2, 0.0, True, True)
IDS = np.random.default_rng(0).integers(0, 64, (8, 12))
shapes = pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def assert_close(found, expected):
    # Where sums are made in another order, activations may be rounded to other numbers.
    assert np.abs(np.asarray(found) - expected).max() < 0.02 * np.abs(expected).max()


@shapes
def test_logits_are_those_of_one_device(shape, params):
    expected = np.asarray(flaxgpt.forward(CFG, flaxgpt.quantize(params), IDS))
    mesh, rules = flaxgpt.make_mesh(*shape), flaxgpt.shard_rules(CFG)
    assert_close(
        flaxgpt.forward(CFG, flaxgpt.shard(flaxgpt.quantize(params), mesh, rules), IDS), expected
    )
    assert_close(
        flaxgpt.forward(CFG, flaxgpt.quantize(flaxgpt.shard(params, mesh, rules)), IDS), expected
    )


@shapes
def test_ids_are_generated_on_a_mesh(shape, params):
    quantized = flaxgpt.quantize(params)
    split = flaxgpt.shard(quantized, flaxgpt.make_mesh(*shape), flaxgpt.shard_rules(CFG))
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(IDS[:3])]
    for prompt, new in zip(prompts, flaxgpt.generate(CFG, split, prompts, 5), strict=True):
        logits = flaxgpt.forward(CFG, quantized, [prompt + new])[0]
        for place, token in enumerate(new, len(prompt) - 1):
            assert logits[place].max() - logits[place, token] < 0.02 * np.abs(logits).max()


def test_scales_are_split_as_the_rows_of_their_weights(params):
    mesh = flaxgpt.make_mesh(2, 2, 2)
    split = flaxgpt.shard(flaxgpt.quantize(params), mesh, flaxgpt.shard_rules(CFG))
    wide, narrow = (split["trf_blocks_0"]["ff"][name] for name in ("layers_0", "layers_2"))
    assert wide["weight"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert wide["weight_scale"].sharding.spec == PartitionSpec("tensor")
    assert narrow["weight_scale"].sharding.spec == PartitionSpec()  # 32 numbers


def test_a_saved_model_is_loaded_onto_a_mesh(params, tmp_path):
    mesh, rules = flaxgpt.make_mesh(2, 2, 2), flaxgpt.shard_rules(CFG)
    expected = flaxgpt.shard(flaxgpt.quantize(params), mesh, rules)
    flaxgpt.save(tmp_path / "model", CFG, expected)
    _, found, _ = flaxgpt.load(tmp_path / "model", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
