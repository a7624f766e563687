"""Every function on meshes that users make. tests/test_sharding.py runs this file on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flaxgpt
from flaxgpt.evaluation import evaluate_text
from flaxgpt.inspection import gradient_norms
from flaxgpt.training import TrainConfig, init_state, mean_loss, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(
    vocab_size=48,
    context_length=16,
    emb_dim=32,
    n_heads=4,
    n_layers=2,
    drop_rate=0.1,
    qkv_bias=True,
    tie_embeddings=True,
)
IDS = np.random.default_rng(0).integers(0, CFG.vocab_size, (4, 9))
RAGGED = [IDS[0, :5].tolist(), IDS[1, :9].tolist(), IDS[2, :2].tolist()]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def on_mesh(kind, is_sharded, names=("x", "y")):
    """Return a function that places parameters on a mesh of 4 x 2 devices."""
    mesh = jax.make_mesh((4, 2), names, axis_types=(kind, kind))
    split = {1: PartitionSpec(names[1]), 2: PartitionSpec(*names)}

    def place(leaf):
        spec = split.get(leaf.ndim, PartitionSpec()) if is_sharded else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return lambda params: jax.tree.map(place, params)


PLACEMENTS = {
    "automatic axes, replicated": on_mesh(AUTO, False),
    "automatic axes, sharded": on_mesh(AUTO, True),
    "explicit axes, replicated": on_mesh(EXPLICIT, False),
    "explicit axes, sharded": on_mesh(EXPLICIT, True),
    "both kinds of axes": on_mesh(EXPLICIT, True, ("data", "tensor")),
    "another device": lambda params: jax.device_put(params, jax.devices()[5]),
}


FAST = "explicit axes, sharded"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in PLACEMENTS
    ],
    ids=[name.replace(" ", "_") for name in PLACEMENTS],
)
def placed(request, params):
    return PLACEMENTS[request.param](params)


def assert_close(actual, expected):
    # The order of sums depends on the mesh: 1e-6 of the largest value is observed.
    actual, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (actual, expected)
    )
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        flaxgpt.forward,
        flaxgpt.states,
        flaxgpt.score,
        flaxgpt.logit_lens,
        gradient_norms,
        lambda cfg, params, ids: flaxgpt.logits(cfg, params, flaxgpt.states(cfg, params, ids)),
        lambda cfg, params, ids: flaxgpt.patch(cfg, params, ids, {"trf_blocks_0/ff": jnp.tanh}),
        lambda cfg, params, ids: flaxgpt.activations(cfg, params, ids)["trf_blocks_1/att/weights"],
        lambda cfg, params, ids: mean_loss(cfg, params, ids, batch_size=2),
        lambda cfg, params, ids: evaluate_text(cfg, params, ids.ravel()).loss,
    ],
    ids=[
        *("forward", "states", "score", "logit_lens", "gradient_norms", "logits", "patch"),
        *("activations", "mean_loss", "evaluate_text"),
    ],
)
def test_a_function_computes_what_it_does_on_one_device(function, params, placed):
    assert_close(function(CFG, placed, IDS), function(CFG, params, IDS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (RAGGED, {"temperature": 0.9, "key": jax.random.key(3)}),
        pytest.param(RAGGED, {}, marks=pytest.mark.slow),
        pytest.param(IDS.tolist(), {}, marks=pytest.mark.slow),
    ],
    ids=["ragged and sampled", "ragged", "equal"],
)
def test_ids_are_those_of_one_device_also_past_the_context(prompts, options, params, placed):
    new = flaxgpt.generate(CFG, placed, prompts, 24, **options)
    assert new == flaxgpt.generate(CFG, params, prompts, 24, **options)


@pytest.mark.slow
def test_streamed_ids_are_those_of_one_device(params, placed):
    prompt = IDS[0].tolist()
    new = list(flaxgpt.stream(CFG, placed, prompt, 12))
    assert [new] == flaxgpt.generate(CFG, params, [prompt], 12)


@pytest.mark.slow
def test_a_cache_is_extended(params, placed):
    logits, cache = flaxgpt.extend(CFG, placed, IDS, flaxgpt.init_cache(CFG, len(IDS), 16))
    again, _ = flaxgpt.extend(CFG, placed, IDS[:, :3], cache)
    both = flaxgpt.forward(CFG, params, np.concatenate([IDS, IDS[:, :3]], axis=1))
    assert_close(jnp.concatenate([logits, again], axis=1), both)


@pytest.mark.slow
def test_training_has_the_losses_of_one_device(params, placed):
    def losses(start):
        state = init_state(CFG, TrainConfig(steps=4, warmup_steps=0, batch_size=4), start)
        for _ in range(3):
            state, metrics = train_step(state, IDS)
            yield float(metrics["loss"])

    np.testing.assert_allclose([*losses(placed)], [*losses(params)], rtol=1e-5)


@pytest.mark.slow
def test_parameters_are_counted_and_saved(params, placed, tmp_path):
    assert flaxgpt.count_params(placed) == flaxgpt.count_params(CFG)
    flaxgpt.save(tmp_path / "m", CFG, placed, tokenizer=None)
    with pytest.warns(UserWarning, match="no tokenizer"):
        _, loaded, _ = flaxgpt.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [jax.jit, lambda f: jax.jit(jax.grad(f))],
    ids=["jit", "grad"],
)
def test_functions_work_inside_a_callers_jit(transform, params, placed):
    def loss(params):
        return -flaxgpt.score(CFG, params, IDS).mean()

    assert_close(transform(loss)(placed), transform(loss)(params))
