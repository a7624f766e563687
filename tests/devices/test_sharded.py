"""Models split over a mesh by the rules. tests/test_sharding.py runs this file on 8 devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flaxgpt
from flaxgpt.evaluation import evaluate_text
from flaxgpt.inspection import gradient_norms
from flaxgpt.training import TrainConfig, init_state, loss, mean_loss, train_step, train_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(64, 16, 32, 8, 2, 0.0, True, True)
DROPPING = flaxgpt.GPTConfig(**CFG.to_dict() | {"drop_rate": 0.1, "tie_embeddings": False})
# 61 is prime, and 6 heads of 8 are 48: neither is divisible by 4 or 8.
UNEVEN = flaxgpt.GPTConfig(61, 15, 48, 6, 2, 0.1, True, True)
STEPS = 20
IDS = np.random.default_rng(0).integers(0, 61, (STEPS, 16, 16))
SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)]
RAGGED = [IDS[0, 0, :5].tolist(), IDS[0, 1, :15].tolist(), IDS[0, 2, :2].tolist()]

shapes = pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=pytest.mark.slow, id="x".join(map(str, s))) for s in SHAPES]
)
slow = pytest.mark.slow


@functools.cache
def parameters(cfg=CFG):
    return flaxgpt.init(cfg, jax.random.key(0))


def split(shape, cfg=CFG):
    return flaxgpt.shard(parameters(cfg), flaxgpt.make_mesh(*shape), flaxgpt.shard_rules(cfg))


def losses(cfg, mesh=None, **settings):
    """Return the final state and the losses of 20 steps."""
    state = init_state(cfg, TrainConfig(steps=STEPS, batch_size=16, **settings), mesh=mesh)
    found = []
    for ids in IDS:
        state, metrics = train_step(state, ids)
        found.append(float(metrics["loss"]))
    return state, np.array(found)


@functools.cache
def losses_of_one_device(name):
    cfg, settings = RECIPES[name]
    return losses(cfg, **settings)[1]


RECIPES = {
    "plain": (CFG, {}),
    "dropout": (DROPPING, {}),
    "accumulating with Muon": (DROPPING, {"accumulate": 2, "optimizer": "muon"}),
    "uneven": (UNEVEN, {"remat": True}),
}


@shapes
@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_one_device(name, shape):
    cfg, settings = RECIPES[name]
    _, found = losses(cfg, flaxgpt.make_mesh(*shape), **settings)
    # Sums are made in another order; 1e-6 is observed.
    np.testing.assert_allclose(found, losses_of_one_device(name), rtol=1e-5)


def test_training_on_a_mesh_of_three_axes_has_the_loss_of_one_device():
    cfg = flaxgpt.GPTConfig(61, 15, 16, 2, 1, 0.1)

    def second_loss(mesh):
        state = init_state(cfg, TrainConfig(batch_size=16), mesh=mesh)
        state, _ = train_step(state, IDS[0])
        return train_step(state, IDS[1])[1]["loss"]

    mesh = flaxgpt.make_mesh(2, 2, 2)
    np.testing.assert_allclose(second_loss(mesh), second_loss(None), rtol=1e-5)


@slow
def test_several_steps_in_one_call_have_the_losses_of_one_device():
    def found(mesh):
        state = init_state(DROPPING, TrainConfig(steps=4, batch_size=16), mesh=mesh)
        return train_steps(state, IDS[:2])[1]["loss"]

    np.testing.assert_allclose(found(flaxgpt.make_mesh(2, 2, 2)), found(None), rtol=1e-5)


@slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cfg", [CFG, UNEVEN], ids=["even", "uneven"])
def test_each_device_holds_what_the_rules_predict_before_and_after_a_step(cfg, shape):
    mesh = flaxgpt.make_mesh(*shape)
    state = init_state(cfg, TrainConfig(steps=2, batch_size=16, optimizer="muon"), mesh=mesh)
    predicted = flaxgpt.shard_rules(cfg).shardings((state.params, state.opt_state), mesh)
    after, _ = train_step(jax.tree.map(jnp.copy, state), IDS[0])
    for held in (state, after):
        bytes_held = dict.fromkeys(mesh.devices.flat, 0)
        for leaf in jax.tree.leaves((held.params, held.opt_state)):
            for part in leaf.addressable_shards:
                bytes_held[part.device] += part.data.nbytes
        expected = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(
                jax.tree.leaves((held.params, held.opt_state)),
                jax.tree.leaves(predicted),
                strict=True,
            )
        )
        assert set(bytes_held.values()) == {expected}


def test_matrices_are_split_eightfold():
    params = flaxgpt.init(CFG, jax.random.key(0), mesh=flaxgpt.make_mesh(2, 2, 2))
    weight = params["trf_blocks_0"]["ff"]["layers_0"]["weight"]
    assert weight.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert {part.data.shape for part in weight.addressable_shards} == {(64, 16)}


@slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_created_on_a_mesh_have_the_values_of_one_device(shape):
    created = flaxgpt.init(CFG, jax.random.key(0), mesh=flaxgpt.make_mesh(*shape))
    jax.tree.map(np.testing.assert_array_equal, created, parameters())


@shapes
@pytest.mark.parametrize("cfg", [CFG, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_ids_are_those_of_one_device_ragged_and_past_the_context(temperature, cfg, shape):
    options = {"temperature": temperature, "key": jax.random.key(3)}
    new = flaxgpt.generate(cfg, split(shape, cfg), RAGGED, 24, **options)
    assert new == flaxgpt.generate(cfg, parameters(cfg), RAGGED, 24, **options)


@slow
def test_rows_may_have_keys_of_their_own_and_stop_early():
    options = {"temperature": 0.9, "key": jax.random.split(jax.random.key(3), 3)}
    expected = flaxgpt.generate(CFG, parameters(), RAGGED, 8, **options)
    options["stop_ids"] = [expected[0][2]]
    expected = flaxgpt.generate(CFG, parameters(), RAGGED, 8, **options)
    assert flaxgpt.generate(CFG, split((4, 1, 2)), RAGGED, 8, **options) == expected


@slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("cfg", [CFG, UNEVEN], ids=["even", "uneven"])
def test_captured_and_patched_values_are_those_of_one_device(cfg, shape):
    patches = {"trf_blocks_0/att/weights": lambda weights: weights.at[:, 1].multiply(0.5)}
    options = {"capture": ["*"], "patches": patches}
    prompts = [row[:6] for row in RAGGED]
    found = flaxgpt.generate(cfg, split(shape, cfg), prompts, 8, **options)
    expected = flaxgpt.generate(cfg, parameters(cfg), prompts, 8, **options)
    assert [row.ids for row in found] == [row.ids for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name, value in other.activations.items():
            np.testing.assert_allclose(row.activations[name], value, atol=1e-5)


@shapes
@pytest.mark.parametrize("cfg", [CFG, UNEVEN], ids=["even", "uneven"])
def test_beams_are_those_of_one_device_ragged_and_past_the_context(cfg, shape):
    options = {"beams": 3, "return_beams": 2, "stop_ids": [5]}
    found = flaxgpt.generate(cfg, split(shape, cfg), RAGGED, 24, **options)
    expected = flaxgpt.generate(cfg, parameters(cfg), RAGGED, 24, **options)
    assert [[b.ids for b in row] for row in found] == [[b.ids for b in row] for row in expected]
    for row, others in zip(found, expected, strict=True):
        np.testing.assert_allclose([b.score for b in row], [b.score for b in others], rtol=1e-5)


@shapes
def test_drafts_change_no_ids_ragged_and_past_the_context(shape):
    options = {"temperature": 0.9, "key": jax.random.key(3), "stop_ids": [5]}
    params = split(shape, UNEVEN)
    plain = flaxgpt.generate(UNEVEN, parameters(UNEVEN), RAGGED, 24, **options)
    assert flaxgpt.generate(UNEVEN, params, RAGGED, 24, lookup=2, **options) == plain
    assert flaxgpt.generate(UNEVEN, params, RAGGED, 24, draft=(UNEVEN, params), **options) == plain


@slow
def test_a_stream_with_drafts_has_the_ids_of_one_device():
    plain = flaxgpt.generate(CFG, parameters(), RAGGED[:1], 24)[0]
    assert list(flaxgpt.stream(CFG, split((2, 2, 2)), RAGGED[0], 24, lookup=3)) == plain


def test_a_draft_model_on_other_devices_is_refused():
    with pytest.raises(ValueError, match="the draft model must be on the devices of the model"):
        flaxgpt.generate(CFG, split((8, 1, 1)), RAGGED, 4, draft=(CFG, parameters()))
    elsewhere = jax.device_put(parameters(), jax.devices()[1])
    with pytest.raises(ValueError, match="the draft model must be on the devices of the model"):
        flaxgpt.generate(CFG, parameters(), RAGGED, 4, draft=(CFG, elsewhere))


@slow
@pytest.mark.parametrize(
    "function",
    [
        flaxgpt.forward,
        flaxgpt.states,
        flaxgpt.score,
        flaxgpt.logit_lens,
        gradient_norms,
        lambda cfg, params, ids: flaxgpt.patch(cfg, params, ids, {"trf_blocks_0/ff": jnp.tanh}),
        lambda cfg, params, ids: flaxgpt.activations(cfg, params, ids),
        lambda cfg, params, ids: mean_loss(cfg, params, ids, batch_size=8),
        lambda cfg, params, ids: evaluate_text(cfg, params, ids.ravel()).loss,
        lambda cfg, params, ids: list(flaxgpt.stream(cfg, params, ids[0], 20)),
    ],
    ids=[
        *("forward", "states", "score", "logit_lens", "gradient_norms", "patch", "activations"),
        *("mean_loss", "evaluate_text", "stream"),
    ],
)
@pytest.mark.parametrize("cfg", [CFG, UNEVEN], ids=["even", "uneven"])
def test_a_function_computes_what_it_does_on_one_device(cfg, function):
    found, expected = (
        function(cfg, p, IDS[0, :8, :15]) for p in (split((2, 2, 2), cfg), parameters(cfg))
    )
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = max(np.abs(np.asarray(other)).max(), 1e-6)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@slow
@settings(max_examples=12)
@given(
    st.tuples(*3 * [st.sampled_from([1, 2, 3, 4, 5, 8])]).filter(lambda s: math.prod(s) <= 8),
    st.sampled_from([CFG, UNEVEN]),
)
def test_logits_do_not_depend_on_the_mesh(shape, cfg):
    expected = flaxgpt.forward(cfg, parameters(cfg), IDS[0, :6, :15])
    logits = flaxgpt.forward(cfg, split(shape, cfg), IDS[0, :6, :15])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_logits_are_those_of_one_device_on_a_mesh_of_three_axes():
    logits = flaxgpt.forward(UNEVEN, split((2, 2, 2), UNEVEN), IDS[0, :, :15])
    expected = flaxgpt.forward(UNEVEN, parameters(UNEVEN), IDS[0, :, :15])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@slow
def test_the_cache_is_split_by_batch_and_head():
    params = split((2, 2, 2))
    cache = flaxgpt.init_cache(CFG, 8, 16, mesh=flaxgpt.make_mesh(2, 2, 2))
    _, cache = flaxgpt.extend(CFG, params, IDS[0, :8, :9], cache)
    for layer in (*cache.keys, *cache.values):
        assert {part.data.shape for part in layer.addressable_shards} == {(2, 4, 16, 4)}
    logits, _ = flaxgpt.extend(CFG, params, IDS[0, :8, 9:12], cache)
    expected = flaxgpt.forward(CFG, parameters(), IDS[0, :8, :12])[:, 9:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@slow
def test_rules_can_be_changed():
    rules = flaxgpt.shard_rules(CFG).replace({"*/ff/*": PartitionSpec()})
    mesh = flaxgpt.make_mesh(2, 2, 2)
    params = flaxgpt.shard(parameters(), mesh, rules)
    state = init_state(CFG, TrainConfig(steps=2, batch_size=16), params)
    state, _ = train_step(state, IDS[0])
    block = state.params["trf_blocks_0"]
    assert block["ff"]["layers_0"]["weight"].sharding.is_fully_replicated
    assert not block["att"]["W_query"]["weight"].sharding.is_fully_replicated


@slow
def test_a_mesh_of_other_axes_is_used_after_renaming_them():
    theirs = jax.make_mesh((4, 2), ("replica", "model"), axis_types=2 * (AxisType.Auto,))
    with pytest.raises(ValueError, match=r"unknown mesh axis 'replica'.*rename"):
        flaxgpt.shard(parameters(), theirs, flaxgpt.shard_rules(CFG))
    mesh = Mesh(theirs.devices, ("data", "tensor"))
    params = flaxgpt.shard(parameters(), mesh, flaxgpt.shard_rules(CFG))
    assert params["tok_emb"]["weight"].sharding.spec == PartitionSpec("tensor")


@slow
def test_a_callers_own_placement_is_kept_in_training():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    place = lambda p: jax.device_put(  # noqa: E731
        p, NamedSharding(mesh, PartitionSpec("rows") if p.shape[0] % 8 == 0 else PartitionSpec())
    )
    params = jax.tree.map(place, parameters())
    state = init_state(CFG, TrainConfig(steps=2, batch_size=16), params)
    state, _ = train_step(state, IDS[0])
    assert state.params["tok_emb"]["weight"].sharding.spec == PartitionSpec("rows")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 16}, "needs 16 devices, but there are 8"),
        ({"data": -1, "tensor": 3}, "does not multiply out: 8 devices are not a multiple of 3"),
        ({"data": -1, "fsdp": -1}, "several sizes of -1"),
        ({"data": 0}, "data=0 must be a whole number"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        flaxgpt.make_mesh(**sizes)


@pytest.mark.parametrize("error", [AssertionError, NotImplementedError])
def test_a_mesh_that_chips_cannot_be_arranged_as_is_refused(error, monkeypatch):
    def refuse(*arguments, **options):
        raise error("as JAX does for 3 of 2 x 4 TPU chips")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(ValueError, match="3 devices of kind cpu cannot be arranged as the mesh"):
        flaxgpt.make_mesh(1, 3)


@pytest.mark.parametrize(
    ("settings", "example"),
    [({"batch_size": 12}, "batch_size=16"), ({"batch_size": 8, "accumulate": 2}, "batch_size=16")],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(settings, example):
    with pytest.raises(ValueError, match=rf"data=4 x fsdp=2 cannot split.*{example}"):
        init_state(CFG, TrainConfig(**settings), mesh=flaxgpt.make_mesh(4, 2))


@slow
def test_a_loss_can_be_computed_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def mean(ids):
        return jax.lax.pmean(loss(CFG, parameters(), ids), "data")

    found = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    ids = np.tile(IDS[0], (4, 1))
    np.testing.assert_allclose(found(ids), loss(CFG, parameters(), ids), rtol=1e-5)


@slow
def test_parameters_on_a_mesh_may_include_an_array_on_one_device():
    params = split((2, 2, 2))
    params = params | {"final_norm": params["final_norm"] | {"scale": jnp.ones(32)}}
    state = init_state(CFG, TrainConfig(batch_size=16), params)
    state, metrics = train_step(state, IDS[0])
    assert metrics["loss"] == pytest.approx(float(loss(CFG, parameters(), IDS[0])), rel=1e-5)


@pytest.mark.parametrize(
    "create", [flaxgpt.init, lambda cfg, key, **options: init_state(cfg, TrainConfig(), **options)]
)
def test_rules_without_a_mesh_are_refused(create):
    with pytest.raises(ValueError, match="rules have no effect without a mesh"):
        create(CFG, jax.random.key(0), rules=flaxgpt.shard_rules(CFG))


def test_a_rule_with_an_unknown_axis_is_refused():
    rules = flaxgpt.shard_rules(CFG).replace({"*": PartitionSpec("tensr")})
    with pytest.raises(ValueError, match="unknown mesh axis 'tensr'"):
        flaxgpt.shard(parameters(), flaxgpt.make_mesh(), rules)
