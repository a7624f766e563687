"""The pure parts of training: losses, optimizer, training step, configuration and recipes."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxgpt import GPTConfig
from flaxgpt.model import forward, param_shapes
from flaxgpt.model.log_probs import token_log_probs
from flaxgpt.training import (
    Batch,
    TrainConfig,
    init_state,
    loss,
    make_optimizer,
    mean_loss,
    recipe,
    token_loss,
    train_step,
    train_steps,
)
from flaxgpt.training.optimizer import learning_rate
from flaxgpt.training.recipes import FINE_TUNING

CFG = GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
TRAIN = TrainConfig(steps=20, batch_size=4, warmup_steps=5)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 50, (4, 9), dtype=np.int32)
# Rows of very different total weight; the first is masked completely.
WEIGHTS = np.float32([[0], [1], [2], [0.1]]) * RNG.uniform(0.5, 1, (4, 8)).astype(np.float32)
WEIGHTS[2, :4] = 0

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Summing in another order changes a few units in the last place of the largest terms (1e-7 each).
ROUNDING = 2e-6


def assert_close(actual, expected, tolerance=ROUNDING):
    def check(a, b):
        scale = np.abs(b).max() + 1e-12
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    jax.tree.map(check, actual, expected)


def copy_of(state):
    return jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="module")
def params():
    return init_state(CFG, TRAIN).params


loss_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


# Losses


def test_the_loss_is_the_mean_negative_log_probability_of_the_targets(params):
    probabilities = jax.nn.softmax(forward(CFG, params, IDS[:, :-1]))
    chosen = np.take_along_axis(np.asarray(probabilities), IDS[:, 1:, None], axis=-1)
    np.testing.assert_allclose(loss(CFG, params, IDS), -np.log(chosen).mean(), rtol=1e-6)


def test_token_log_probs_of_an_id_outside_the_vocabulary_is_nan():
    found = token_log_probs(jnp.zeros((2, 2, 5)), jnp.array([[0, -1], [5, 4]]))
    np.testing.assert_allclose(found, [[-np.log(5), np.nan], [np.nan, -np.log(5)]], rtol=1e-6)


def test_the_loss_of_a_batch_is_the_weighted_mean(params):
    each = -token_log_probs(forward(CFG, params, IDS[:, :-1]), IDS[:, 1:])
    expected = np.average(each, weights=WEIGHTS)
    np.testing.assert_allclose(loss(CFG, params, Batch(IDS, WEIGHTS)), expected, rtol=1e-6)


@pytest.mark.slow
def test_weights_of_one_equal_no_weights(params):
    plain, weighted = (
        loss_and_gradient(CFG, params, batch) for batch in (IDS, Batch(IDS, np.ones_like(WEIGHTS)))
    )
    assert_close(weighted, plain)


def test_a_mask_of_booleans_is_a_batch_of_weights(params):
    mask = WEIGHTS > 0.5
    found = loss(CFG, params, Batch(IDS, mask))
    np.testing.assert_array_equal(found, loss(CFG, params, Batch(IDS, np.float32(mask))))


def test_masked_targets_have_no_gradient(params):
    weights = np.ones_like(WEIGHTS)
    weights[:2] = 0  # two whole rows
    weights[:, -1] = 0  # the last id of each row, which is a target only
    other = IDS.copy()
    other[:2] = (other[:2] + 1) % 50
    other[:, -1] = (other[:, -1] + 1) % 50
    one, two = (loss_and_gradient(CFG, params, Batch(ids, weights)) for ids in (IDS, other))
    assert_close(two, one)
    assert_close(one, loss_and_gradient(CFG, params, IDS[2:, :-1]))


def test_the_mean_loss_does_not_depend_on_the_batch_size(params):
    windows = np.random.default_rng(2).integers(0, 50, (7, 9), dtype=np.int32)
    expected = np.mean([float(loss(CFG, params, row[None])) for row in windows])
    for size in (1, 3, 12):
        value = mean_loss(CFG, params, windows, batch_size=size)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_mean_loss_of_weighted_windows_is_that_of_one_batch(params):
    batch = Batch(IDS, WEIGHTS)
    for size in (1, 3):
        value = mean_loss(CFG, params, batch, batch_size=size)
        np.testing.assert_allclose(value, loss(CFG, params, batch), rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:, :-1], r"weights of shape \(4, 7\) must be \(4, 8\)"),
        (WEIGHTS[0], r"weights of shape \(8,\) must be \(4, 8\)"),
        (-WEIGHTS, "weight -.* must be a finite number, 0 or more"),
        (WEIGHTS + np.inf, "weight inf must be a finite number"),
        (0 * WEIGHTS, "all weights are 0"),
    ],
)
def test_invalid_weights_are_refused(params, weights, message):
    with pytest.raises(ValueError, match=message):
        loss(CFG, params, Batch(IDS, weights))


def test_weights_of_the_wrong_shape_are_refused_under_jit():
    with pytest.raises(ValueError, match=r"weights of shape \(4, 7\) must be \(4, 8\)"):
        train_step(init_state(CFG, TRAIN), Batch(IDS, WEIGHTS[:, :-1]))


def test_the_mean_loss_of_nothing_is_refused(params):
    with pytest.raises(ValueError, match="all weights are 0"):
        mean_loss(CFG, params, Batch(IDS, 0 * WEIGHTS))


@pytest.mark.parametrize("bad", [50, -1])
@pytest.mark.parametrize("place", [0, 8])
def test_an_id_outside_the_vocabulary_is_refused_or_gives_nan(params, bad, place):
    ids = IDS.copy()
    ids[1, place] = bad
    with pytest.raises(ValueError, match=f"id {bad} at .* outside the vocabulary"):
        loss(CFG, params, ids)
    assert np.isnan(loss_and_gradient(CFG, params, ids)[0])


def test_rows_without_targets_are_refused(params):
    with pytest.raises(ValueError, match=r"ids of shape \(4, 1\) have no targets"):
        loss(CFG, params, IDS[:, :1])


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradients_are_the_same_with_and_without_remat(params, drop_rate):
    cfg, key = dataclasses.replace(CFG, drop_rate=drop_rate), jax.random.key(3)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnames=("cfg", "remat"))
    stored, recomputed = (gradient(cfg, params, IDS, key, remat=remat) for remat in (False, True))
    assert_close(recomputed, stored, 1e-5)


def test_remat_stores_fewer_activations_for_the_backward_pass():
    cfg = dataclasses.replace(CFG, n_layers=8)
    shapes = param_shapes(cfg)

    def stored(remat):
        backward = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(cfg, p, IDS, remat=remat), params)[1], shapes
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert stored(True) - weights < (stored(False) - weights) / 4


# Training step


def test_several_steps_in_one_call_equal_single_steps():
    ids = np.random.default_rng(1).integers(0, 50, (3, 4, 9), dtype=np.int32)
    weights = np.stack([WEIGHTS, WEIGHTS[::-1], 2 * WEIGHTS])
    state = init_state(CFG, TRAIN)
    at_once, metrics = train_steps(copy_of(state), Batch(ids, weights))
    for i in range(3):
        state, single = train_step(state, Batch(ids[i], weights[i]))
        assert_close(single, jax.tree.map(lambda m, i=i: m[i], metrics), 1e-5)
    assert int(at_once.step) == int(state.step) == 3
    assert_close(at_once.params, state.params, 1e-4)  # Adam divides small by small


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(weights):
    whole, in_pieces = (
        train_step(init_state(CFG, dataclasses.replace(TRAIN, accumulate=n)), Batch(IDS, weights))
        for n in (1, 4)
    )
    assert_close(in_pieces[1], whole[1])
    # The first moment is a tenth of the gradient, without Adam's division.
    moments = [optax.tree.get(state.opt_state, "mu") for state, _ in (in_pieces, whole)]
    assert_close(*moments, 1e-5)


def test_the_metrics_describe_the_batch_before_the_step(params):
    batch = Batch(IDS, WEIGHTS)
    _, metrics = train_step(init_state(CFG, TRAIN), batch)
    value, gradient = loss_and_gradient(CFG, params, batch)
    norm = optax.tree.norm(gradient)
    expected = {
        "loss": value,
        "grad_norm": norm,
        "weight": WEIGHTS.sum(),
        "learning_rate": 1e-3 / 6,
    }
    assert_close(metrics, {name: np.float32(x) for name, x in expected.items()})


def test_a_step_without_any_target_has_loss_0_and_keeps_the_state_finite():
    for accumulate in (1, 4):
        state = init_state(CFG, dataclasses.replace(TRAIN, accumulate=accumulate))
        state, metrics = train_step(state, Batch(IDS, 0 * WEIGHTS))
        assert (metrics["loss"], metrics["grad_norm"], metrics["weight"]) == (0, 0, 0)
        chex.assert_tree_all_finite((state.params, state.opt_state))


def squared_error(cfg, params, batch, dropout_key, *, dtype, remat):
    """A loss function that needs no model: half the squared norm, with a weight of 4 per batch."""
    squares = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
    return 4 * squares / 2, jnp.float32(4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_loss_function_can_be_trained(params, accumulate):
    train_cfg = dataclasses.replace(TRAIN, accumulate=accumulate, grad_clip=0.0, beta1=0.5)
    state, metrics = train_step(init_state(CFG, train_cfg), IDS, squared_error)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(params), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["grad_norm"] ** 2 / 2, rtol=1e-5)
    # The gradient of half the squared norm is the parameters themselves.
    assert_close(optax.tree.get(state.opt_state, "mu"), jax.tree.map(lambda p: p / 2, params))
    _, stacked = train_steps(init_state(CFG, train_cfg), IDS[None], loss_fn=squared_error)
    np.testing.assert_allclose(stacked["loss"], metrics["loss"][None], rtol=1e-6)
    found = mean_loss(CFG, params, IDS, loss_fn=squared_error)
    np.testing.assert_allclose(found, metrics["loss"], rtol=1e-5)


def test_a_loss_function_receives_the_batch_and_the_settings_of_the_run():
    seen = []

    def record(cfg, params, batch, dropout_key, *, dtype, remat):
        seen.append((cfg, batch.ids.shape, dropout_key is None, dtype, remat))
        return token_loss(cfg, params, batch, dropout_key, dtype=dtype, remat=remat)

    dropping = dataclasses.replace(CFG, drop_rate=0.1)
    train_cfg = dataclasses.replace(TRAIN, dtype="bfloat16", remat=True, accumulate=2)
    train_step.eval_shape(init_state(CFG, train_cfg), IDS, record)
    train_step.eval_shape(init_state(dropping, TRAIN), IDS, record)
    assert seen[0] == (CFG, (2, 9), True, jnp.bfloat16, True)
    assert seen[-1] == (dropping, (4, 9), False, jnp.float32, False)


def test_bfloat16_changes_the_computation_but_not_the_dtype_of_the_parameters():
    fine, coarse = (
        train_step(init_state(CFG, dataclasses.replace(TRAIN, dtype=dtype)), IDS)
        for dtype in ("float32", "bfloat16")
    )
    difference = abs(float(fine[1]["loss"]) - float(coarse[1]["loss"]))
    assert 0 < difference < 0.02  # bfloat16 has 8 bits of precision: 0.4 % of a loss of 4
    floats = [x for x in jax.tree.leaves((coarse[0].params, coarse[0].opt_state)) if x.ndim]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_dropout_differs_between_steps_and_is_the_same_in_each_run():
    cfg = dataclasses.replace(CFG, drop_rate=0.5)
    train_cfg = dataclasses.replace(TRAIN, learning_rate=1e-12, min_learning_rate=0.0)

    def losses():
        return np.asarray(train_steps(init_state(cfg, train_cfg), np.stack([IDS] * 3))[1]["loss"])

    assert len(set(losses().tolist())) == 3
    np.testing.assert_array_equal(losses(), losses())


def test_training_overfits_a_single_batch():
    state = init_state(CFG, dataclasses.replace(TRAIN, steps=200, learning_rate=1e-2))
    for _ in range(10):
        state, metrics = train_steps(state, np.stack([IDS] * 20))
    assert metrics["loss"][-1] < 0.2 < 3.5 < np.log(CFG.vocab_size)


def test_a_step_compiles_once_and_reuses_the_memory_of_the_state(compilations):
    state, _ = train_step(init_state(CFG, TRAIN), IDS)
    del compilations[:]
    for _ in range(3):
        before = state
        state, _ = train_step(state, IDS)
        assert jax.tree.leaves(before.params)[0].is_deleted()
    assert not compilations


def test_training_leaves_the_parameters_of_the_caller_intact(params):
    train_step(init_state(CFG, TRAIN, params), IDS)
    chex.assert_tree_all_finite(params)  # a donated array could not be read


def test_the_learning_rate_grows_linearly_and_falls_along_a_cosine():
    train_cfg = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = np.array([learning_rate(train_cfg)(jnp.float32(s)) for s in range(111)])
    # nanoGPT's get_lr
    up = (np.arange(10) + 1) / 11
    down = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose(rates, np.concatenate([up, down]), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["matrices", "everything"])
def test_only_the_selected_parameters_decay(optimizer, decay):
    train_cfg = dataclasses.replace(TRAIN, decay=decay, weight_decay=1.0, optimizer=optimizer)
    cfg = dataclasses.replace(CFG, qkv_bias=True)
    params = jax.tree.map(jnp.ones_like, init_state(cfg, train_cfg).params)
    state = init_state(cfg, train_cfg, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = jax.jit(make_optimizer(train_cfg).update)(nothing, state.opt_state, params)
    for leaf in jax.tree.leaves(updates):
        decays = decay == "everything" or leaf.ndim == 2
        assert bool((leaf < 0).all()) == decays
        assert bool((leaf == 0).all()) != decays


def test_the_gradient_is_clipped_to_its_global_norm():
    def moment(clip):
        train_cfg = dataclasses.replace(TRAIN, grad_clip=clip, beta1=0.5)
        state, metrics = train_step(init_state(CFG, train_cfg), IDS)
        return optax.tree.norm(optax.tree.get(state.opt_state, "mu")) / 0.5, metrics["grad_norm"]

    free, norm = moment(0.0)
    np.testing.assert_allclose(free, norm, rtol=1e-5)
    assert norm > 0.01
    clipped, norm_before = moment(0.01)
    np.testing.assert_allclose(clipped, 0.01, rtol=1e-5)
    np.testing.assert_allclose(norm_before, norm, rtol=1e-6)


def test_muon_updates_of_matrices_are_orthogonal_and_as_large_as_those_of_adamw():
    train_cfg = dataclasses.replace(
        TRAIN, optimizer="muon", weight_decay=0.0, learning_rate=1.0, warmup_steps=0
    )
    before = init_state(CFG, train_cfg)
    after, _ = train_step(copy_of(before), IDS)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), after.params, before.params)
    matrix = moved["trf_blocks_0"]["ff"]["layers_0"]["weight"]
    values = np.linalg.svd(matrix, compute_uv=False)
    # Newton-Schulz brings the singular values close to 1. Liu et al. scale them by 0.2 times the
    # square root of the longer side, so that the root mean square is 0.2, as in AdamW's updates.
    # The smallest one is 0: the input comes from a layer norm and sums to 0, as does the gradient.
    values /= 0.2 * 8
    assert values[-2] > 0.5 and values[0] < 1.3
    embedding = moved["tok_emb"]["weight"]
    seen = np.unique(IDS[:, :-1])
    np.testing.assert_allclose(np.abs(embedding[seen]).max(), 1.0, rtol=0.01)  # Adam's first step


# Configuration and recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 would not change the parameters"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a finite number, 0 or more"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 must not exceed learning_rate=0.001"),
        ({"steps": 0}, "steps=0 must be a whole number, 1 or more"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 must be less than steps=2000"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be a whole number, 0 or more"),
        ({"warmup_fraction": 1.0}, "warmup_fraction=1.0 must be at least 0 and below 1"),
        ({"min_learning_rate_fraction": 2}, "min_learning_rate_fraction=2.0 must be from 0 to 1"),
        ({"learning_rate": None}, "learning_rate=None must be a finite number"),
        ({"accumulate": 5}, "accumulate=5 does not divide batch_size=12"),
        ({"dtype": "float64"}, "dtype='float64' must be one of float32, bfloat16"),
        ({"beta2": 1.0}, "beta2=1.0 must be at least 0 and below 1"),
        ({"data": "a.txt"}, "data='a.txt' must be a tuple of files"),
        ({"remat": 1}, "remat=1 must be a bool"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 or more"),
        ({"seed": 2**32}, "seed=4294967296 must be from 0 to 4294967295"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig(**change)


def test_a_configuration_survives_json_and_refuses_unknown_keys():
    train_cfg = TrainConfig(data=("a.txt", "b.txt"), steps=7, warmup_steps=1)
    assert TrainConfig.from_dict(json.loads(json.dumps(train_cfg.to_dict()))) == train_cfg
    with pytest.raises(ValueError, match=r"unknown training settings \['stpes'\]"):
        TrainConfig.from_dict({"stpes": 7})


def test_warm_up_and_minimum_follow_the_steps_and_the_peak():
    short = TrainConfig(steps=40, learning_rate=2e-3)
    assert (short.resolved_warmup_steps, short.resolved_min_learning_rate) == (2, 2e-4)
    assert TrainConfig(steps=1, warmup_fraction=0.9).resolved_warmup_steps == 0
    absolute = dataclasses.replace(short, warmup_steps=7, min_learning_rate=1e-5)
    assert (absolute.resolved_warmup_steps, absolute.resolved_min_learning_rate) == (7, 1e-5)


@pytest.mark.parametrize(
    ("train_cfg", "steps", "warmup_steps", "peak", "minimum"),
    [
        (recipe("shakespeare-char")[1], 2000, 100, 4e-3, 4e-4),
        (recipe("tales")[1], 8000, 444, 5e-3, 0.0),
        (recipe("gpt2")[1], 600_000, 2000, 6e-4, 6e-5),
        (recipe("verdict")[1], 90, 0, 4e-4, 4e-4),
        (FINE_TUNING, 200, 10, 1e-4, 0.0),
    ],
    ids=["shakespeare-char", "tales", "gpt2", "verdict", "fine-tuning"],
)
def test_each_recipe_has_its_published_schedule(train_cfg, steps, warmup_steps, peak, minimum):
    assert train_cfg.steps == steps
    absolute = TrainConfig(
        steps=steps, warmup_steps=warmup_steps, learning_rate=peak, min_learning_rate=minimum
    )
    step = jnp.arange(steps, dtype=jnp.float32)
    rates, expected = (np.asarray(learning_rate(c)(step)) for c in (train_cfg, absolute))
    np.testing.assert_array_equal(rates, expected)
    assert rates.argmax() == warmup_steps
    np.testing.assert_allclose(rates[warmup_steps], peak, rtol=1e-6)


@pytest.mark.parametrize("name", ["shakespeare-char", "tales", "gpt2", "verdict"])
def test_a_recipe_is_an_architecture_and_a_training_configuration(name):
    cfg, train_cfg = recipe(name)
    assert isinstance(cfg, GPTConfig) and isinstance(train_cfg, TrainConfig)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="unknown recipe 'gpt-2': did you mean 'gpt2'"):
        recipe("gpt-2")
