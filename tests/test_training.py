"""The pure pieces of training: loss, optimiser, one update."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxgpt import GPTConfig
from flaxgpt.model import param_shapes
from flaxgpt.training import (
    TrainConfig,
    init_state,
    loss,
    make_optimizer,
    mean_loss,
    recipe,
    train_step,
    train_steps,
)
from flaxgpt.training.optimizer import learning_rate

CFG = GPTConfig(vocab_size=50, context_length=8, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
TRAIN = TrainConfig(steps=20, batch_size=4, warmup_steps=5)
BATCH = np.random.default_rng(0).integers(0, 50, (4, 9), dtype=np.int32)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Sums in another order differ by some units in the last place of the largest terms (1e-7 each).
ROUNDING = 2e-6


def assert_close(actual, expected, tolerance=ROUNDING):
    def check(a, b):
        scale = np.abs(b).max() + 1e-12
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)

    jax.tree.map(check, actual, expected)


def copy_of(state):
    return jax.tree.map(jnp.copy, state)


def test_several_steps_a_call_are_the_same_steps():
    batches = np.random.default_rng(1).integers(0, 50, (5, 4, 9), dtype=np.int32)
    state = init_state(CFG, TRAIN)
    together, metrics = train_steps(copy_of(state), batches)
    for i, batch in enumerate(batches):
        state, alone = train_step(state, batch)
        assert_close(alone, jax.tree.map(lambda m, i=i: m[i], metrics), 1e-5)
    assert int(together.step) == int(state.step) == 5
    assert_close(together.params, state.params, 1e-4)  # Adam divides small by small


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_gradients_are_the_big_batchs(pieces):
    whole, in_pieces = (
        train_step(init_state(CFG, dataclasses.replace(TRAIN, accumulate=n)), BATCH)
        for n in (1, pieces)
    )
    assert_close(in_pieces[1], whole[1])
    # The first moment is a tenth of the gradient, without Adam's division.
    moments = [optax.tree.get(state.opt_state, "mu") for state, _ in (in_pieces, whole)]
    assert_close(*moments, 1e-5)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradients_are_the_same_with_and_without_remat(drop_rate):
    cfg = dataclasses.replace(CFG, drop_rate=drop_rate)
    params, key = init_state(cfg, TRAIN).params, jax.random.key(3)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnames=("cfg", "remat"))
    kept, computed = (gradient(cfg, params, BATCH, key, remat=remat) for remat in (False, True))
    assert_close(computed, kept, 1e-5)


def test_remat_keeps_fewer_activations_for_the_backward_pass():
    cfg = dataclasses.replace(CFG, n_layers=8)
    params = param_shapes(cfg)

    def kept(remat):
        backward = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(cfg, p, BATCH, remat=remat), params)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kept(True) - weights < (kept(False) - weights) / 4


def test_bfloat16_computes_coarsely_on_float32_parameters():
    fine, coarse = (
        train_step(init_state(CFG, dataclasses.replace(TRAIN, dtype=dtype)), BATCH)
        for dtype in ("float32", "bfloat16")
    )
    difference = abs(float(fine[1]["loss"]) - float(coarse[1]["loss"]))
    assert 0 < difference < 0.02  # bfloat16 has 8 bits: 0.4 % of a loss of 4
    floats = [x for x in jax.tree.leaves((coarse[0].params, coarse[0].opt_state)) if x.ndim]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_dropout_changes_from_step_to_step_and_not_from_run_to_run():
    cfg = dataclasses.replace(CFG, drop_rate=0.5)
    recipe = dataclasses.replace(TRAIN, learning_rate=1e-12, min_learning_rate=0.0)

    def losses():
        return np.asarray(train_steps(init_state(cfg, recipe), np.stack([BATCH] * 3))[1]["loss"])

    assert len(set(losses().tolist())) == 3
    np.testing.assert_array_equal(losses(), losses())


def test_training_learns_a_text_by_heart():
    state = init_state(CFG, dataclasses.replace(TRAIN, steps=200, learning_rate=1e-2))
    for _ in range(10):
        state, metrics = train_steps(state, np.stack([BATCH] * 20))
    assert metrics["loss"][-1] < 0.2 < 3.5 < np.log(CFG.vocab_size)


def test_a_step_compiles_once_and_reuses_the_states_memory(compilations):
    state, _ = train_step(init_state(CFG, TRAIN), BATCH)
    del compilations[:]
    for _ in range(3):
        before = state
        state, _ = train_step(state, BATCH)
        assert jax.tree.leaves(before.params)[0].is_deleted()
    assert not compilations


def test_the_callers_parameters_survive_training():
    params = init_state(CFG, TRAIN).params
    train_step(init_state(CFG, TRAIN, params), BATCH)
    chex.assert_tree_all_finite(params)  # a donated array could not be read


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    recipe = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = np.array([learning_rate(recipe)(jnp.float32(s)) for s in range(111)])
    # nanoGPT's get_lr
    up = (np.arange(10) + 1) / 11
    down = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose(rates, np.concatenate([up, down]), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["matrices", "everything"])
def test_only_what_the_recipe_names_decays(optimizer, decay):
    recipe = dataclasses.replace(TRAIN, decay=decay, weight_decay=1.0, optimizer=optimizer)
    cfg = dataclasses.replace(CFG, qkv_bias=True)
    params = jax.tree.map(jnp.ones_like, init_state(cfg, recipe).params)
    state = init_state(cfg, recipe, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(make_optimizer(recipe).update)(nothing, state.opt_state, params)
    for leaf in jax.tree.leaves(updates):
        decays = decay == "everything" or leaf.ndim == 2
        assert bool((leaf < 0).all()) == decays
        assert bool((leaf == 0).all()) != decays


def test_the_gradient_is_clipped_to_its_global_norm():
    def moment(clip):
        recipe = dataclasses.replace(TRAIN, grad_clip=clip, beta1=0.5)
        state, metrics = train_step(init_state(CFG, recipe), BATCH)
        return optax.tree.norm(optax.tree.get(state.opt_state, "mu")) / 0.5, metrics["grad_norm"]

    free, norm = moment(0.0)
    np.testing.assert_allclose(free, norm, rtol=1e-5)
    assert norm > 0.01
    clipped, norm_before = moment(0.01)
    np.testing.assert_allclose(clipped, 0.01, rtol=1e-5)
    np.testing.assert_allclose(norm_before, norm, rtol=1e-6)


def test_muons_updates_of_matrices_are_orthogonal_and_as_large_as_adamws():
    recipe = dataclasses.replace(
        TRAIN, optimizer="muon", weight_decay=0.0, learning_rate=1.0, min_learning_rate=1.0
    )
    recipe = dataclasses.replace(recipe, warmup_steps=0)
    before = init_state(CFG, recipe)
    after, _ = train_step(copy_of(before), BATCH)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), after.params, before.params)
    matrix = moved["trf_blocks_0"]["ff"]["layers_0"]["weight"]
    values = np.linalg.svd(matrix, compute_uv=False)
    # Newton-Schulz brings singular values near 1, not to it; Liu et al. scale them by
    # 0.2 sqrt(the longer side), so that the root mean square is 0.2 as of AdamW's updates.
    assert values.max() / (0.2 * 8) < 1.3
    assert (
        values[-2] / (0.2 * 8) > 0.5
    )  # the last: a norm's output has no mean, so nor the gradient
    embedding = moved["tok_emb"]["weight"]
    seen = np.unique(BATCH[:, :-1])
    np.testing.assert_allclose(np.abs(embedding[seen]).max(), 1.0, rtol=0.01)  # Adam's first


def test_evaluation_is_the_mean_over_windows_whatever_the_batch():
    params = init_state(CFG, TRAIN).params
    windows = np.random.default_rng(2).integers(0, 50, (7, 9), dtype=np.int32)
    expected = np.mean([float(loss(CFG, params, row[None])) for row in windows])
    for size in (1, 3, 7, 12):
        value = mean_loss(CFG, params, windows, batch_size=size)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [50, -1])
@pytest.mark.parametrize("place", [0, 8])
def test_an_id_outside_the_vocabulary_never_counts_as_another(bad, place):
    params = init_state(CFG, TRAIN).params
    batch = BATCH.copy()
    batch[1, place] = bad
    with pytest.raises(ValueError, match=f"id {bad} at .* outside the vocabulary"):
        loss(CFG, params, batch)
    assert np.isnan(jax.jit(loss, static_argnums=0)(CFG, params, batch))


def test_a_batch_without_targets_is_refused():
    params = init_state(CFG, TRAIN).params
    with pytest.raises(ValueError, match=r"ids of shape \(4, 1\) have no targets"):
        loss(CFG, params, BATCH[:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 would not change the parameters"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a finite number, 0 or more"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 must not exceed learning_rate=0.001"),
        ({"steps": 0}, "steps=0 must be a whole number, 1 or more"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 must be less than steps=2000"),
        ({"accumulate": 5}, "accumulate=5 does not divide batch_size=12"),
        ({"dtype": "float64"}, "dtype='float64' must be one of float32, bfloat16"),
        ({"beta2": 1.0}, "beta2=1.0 must be at least 0 and below 1"),
        ({"data": "a.txt"}, "data='a.txt' must be a tuple of files"),
        ({"remat": 1}, "remat=1 must be a bool"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 or more"),
        ({"seed": 2**32}, "seed=4294967296 must be from 0 to 4294967295"),
    ],
)
def test_a_recipe_that_no_run_can_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig(**change)


def test_a_recipe_survives_json_and_refuses_what_it_does_not_know():
    recipe = TrainConfig(data=("a.txt", "b.txt"), steps=7, warmup_steps=1)
    assert TrainConfig.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match=r"unknown training settings \['stpes'\]"):
        TrainConfig.from_dict({"stpes": 7})


def test_presets_are_recipes_by_name():
    for name in ("shakespeare-char", "tales", "gpt2", "verdict"):
        cfg, train_cfg = recipe(name)
        assert isinstance(cfg, GPTConfig) and isinstance(train_cfg, TrainConfig)
    with pytest.raises(ValueError, match="unknown recipe 'gpt-2': did you mean 'gpt2'"):
        recipe("gpt-2")
