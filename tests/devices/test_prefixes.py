"""Prefixes and samples on a mesh. tests/test_sharding.py runs this file on 8 devices."""

import functools

import jax
import numpy as np
import pytest

import flaxgpt

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(64, 48, 32, 8, 2, 0.0, True, True)
IDS = np.random.default_rng(0).integers(0, 64, (3, 48)).tolist()
SHARED = IDS[0][:17]
RAGGED = [SHARED + IDS[1][:5], SHARED, SHARED + IDS[2][:20]]
SHAPES = [(8, 1, 1), (1, 1, 8), (2, 2, 2)]
SAMPLED = {"temperature": 0.9, "key": jax.random.key(3)}


@functools.cache
def parameters():
    return flaxgpt.init(CFG, jax.random.key(0))


def split(shape):
    return flaxgpt.shard(parameters(), flaxgpt.make_mesh(*shape), flaxgpt.shard_rules(CFG))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ids_after_a_prefix_are_those_of_one_device(shape):
    params = split(shape)
    prefix = flaxgpt.PrefixStore(CFG, params).prefill(SHARED)
    found = flaxgpt.generate(CFG, params, RAGGED, 50, prefix=prefix, **SAMPLED)
    assert found == flaxgpt.generate(CFG, parameters(), RAGGED, 50, **SAMPLED)
    beams = flaxgpt.generate(CFG, params, RAGGED, 8, beams=3, prefix=prefix)
    assert beams == flaxgpt.generate(CFG, parameters(), RAGGED, 8, beams=3)
    ids = list(flaxgpt.stream(CFG, params, RAGGED[0], 8, prefix=prefix))
    assert ids == flaxgpt.generate(CFG, parameters(), RAGGED[:1], 8)[0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_are_those_of_one_device(shape):
    options = SAMPLED | {"samples": 2}
    keys = jax.random.split(jax.random.key(5), 6)
    for each in (options, options | {"key": keys}):
        found = flaxgpt.generate(CFG, split(shape), RAGGED, 8, **each)
        assert found == flaxgpt.generate(CFG, parameters(), RAGGED, 8, **each)


@pytest.mark.slow
def test_a_prefix_of_other_devices_is_refused():
    prefix = flaxgpt.prefill(CFG, parameters(), SHARED)
    for params in (split((2, 2, 2)), jax.device_put(parameters(), jax.devices()[1])):
        with pytest.raises(ValueError, match="prefix"):
            flaxgpt.generate(CFG, params, RAGGED, 8, prefix=prefix)
