"""Every choice that a platform makes gives the same results, and the right platform is found."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import flaxgpt
import golden
from flaxgpt import platform
from flaxgpt.generation import Sampling, programs
from flaxgpt.generation.loop_params import loop_params
from flaxgpt.generation.prompts import prepare
from flaxgpt.model.head_loss import head_loss, width_of
from flaxgpt.model.rows import add_copies, drop_copies
from flaxgpt.platform import PLATFORMS, Platform, platform_of
from flaxgpt.sharding import in_force
from flaxgpt.training import TrainConfig, init_state, loss, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = flaxgpt.GPTConfig(
    vocab_size=61, context_length=160, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.0
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def tpu_choices(monkeypatch):
    """Make the choices for TPU on CPU, with kernels interpreted and small pieces of the loss."""
    choices = dataclasses.replace(
        PLATFORMS["tpu"],
        attention=(("float32", "splash"), ("bfloat16", "splash")),
        interpreted=True,
        loss_positions=32,
    )
    monkeypatch.setitem(PLATFORMS, "cpu", choices)
    jax.clear_caches()  # of programs whose traced arrays do not say where they are
    yield choices
    jax.clear_caches()


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def ids_of(*shape):
    return np.random.default_rng(0).integers(0, CFG.vocab_size, shape)


# --- All choices for TPU together


@pytest.mark.parametrize("name", ["hf-small", slow("book-small")])
def test_logits_are_pytorchs_with_the_choices_for_tpu(name, tpu_choices):
    cfg, params, expected = golden.model(name)
    logits = flaxgpt.forward(cfg, params, expected["input_ids"])
    golden.assert_logits_agree(logits, expected["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 160), slow((2, 1)), slow((1, 9))])
def test_logits_are_the_default_ones(shape, params, tpu_choices):
    ids = ids_of(*shape)
    golden.assert_logits_agree(
        flaxgpt.forward(CFG, params, ids), flaxgpt.GPT(CFG).apply({"params": params}, ids)
    )


def test_one_product_gives_query_key_and_value(params):
    fused = loop_params(PLATFORMS["tpu"], jnp.float32, params)
    attention = fused["trf_blocks_1"]["att"]
    assert attention.keys() == {"W_qkv", "out_proj"}
    assert attention["W_qkv"]["weight"].shape == (3 * CFG.emb_dim, CFG.emb_dim)
    ids = ids_of(2, 9)
    found = flaxgpt.GPT(CFG).apply({"params": fused}, ids)
    golden.assert_logits_agree(found, flaxgpt.GPT(CFG).apply({"params": params}, ids))


def test_projections_stay_apart_over_several_devices_and_on_cpu(params):
    for choices in (PLATFORMS["tpu"].over_devices(), PLATFORMS["cpu"]):
        assert loop_params(choices, jnp.float32, params) is params


@pytest.mark.slow
def test_prompts_of_different_lengths_are_read_by_the_kernel(params, tpu_choices):
    prompts = [ids_of(150).tolist(), ids_of(131).tolist()]
    prepared = prepare(CFG, params, prompts, 4, Sampling(), jnp.float32)
    program = jax.make_jaxpr(programs.prefill, static_argnums=0)
    assert "pallas_call" in str(program(*prepared))
    with_kernel = flaxgpt.generate(CFG, params, prompts, 4)
    assert with_kernel == [flaxgpt.generate(CFG, params, [row], 4)[0] for row in prompts]
    logits = flaxgpt.GPT(CFG).apply({"params": params}, np.array(prompts[:1]))
    assert with_kernel[0][-4] == int(logits[0, -1].argmax())


@pytest.mark.parametrize(("rows", "queries"), [(1, 1), slow(3, 1), slow(8, 1), (1, 3), slow(2, 9)])
def test_a_cache_is_extended_beside_copies_of_rows(rows, queries, params, tpu_choices):
    ids = ids_of(rows, 12 + queries)
    cache = flaxgpt.init_cache(CFG, rows, 32)
    assert cache.layout == "joined"
    _, cache = flaxgpt.extend(CFG, params, ids[:, :12], cache)
    logits, cache = flaxgpt.extend(CFG, params, ids[:, 12:], cache)
    assert logits.shape == (rows, queries, CFG.vocab_size)
    golden.assert_logits_agree(logits, flaxgpt.forward(CFG, params, ids)[:, 12:])


@pytest.mark.parametrize("rows", [1, slow(3), slow(9)])
def test_generated_ids_are_the_default_ones(rows, params, tpu_choices, monkeypatch):
    prompts = [row[: 5 + 2 * i] for i, row in enumerate(ids_of(rows, 32))]
    found = flaxgpt.generate(CFG, params, prompts, 12)
    monkeypatch.setitem(PLATFORMS, "cpu", Platform())
    assert found == flaxgpt.generate(CFG, params, prompts, 12)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_change_no_ids_with_the_choices_for_tpu(rows, params, tpu_choices):
    prompts = [
        [*row[:4], *row[:4], *row[: 2 + i]] for i, row in enumerate(ids_of(rows, 32).tolist())
    ]
    plain = flaxgpt.generate(CFG, params, prompts, 12)
    for drafts in ({"lookup": 3}, {"lookup": 9}, {"draft": (CFG, params)}):
        assert flaxgpt.generate(CFG, params, prompts, 12, **drafts) == plain


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step_is_the_default_one(tied, tpu_choices, monkeypatch):
    cfg = dataclasses.replace(CFG, tie_embeddings=tied)
    train_cfg = TrainConfig(batch_size=2)
    ids = ids_of(2, 161)
    found = train_step(init_state(cfg, train_cfg), ids)
    monkeypatch.setitem(PLATFORMS, "cpu", Platform())
    jax.clear_caches()
    state, metrics = train_step(init_state(cfg, train_cfg), ids)
    # Sums of some hundred terms in another order.
    assert_allclose(found[1]["loss"], metrics["loss"], rtol=1e-6)
    assert_allclose(found[1]["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[0].params), jax.tree.leaves(state.params), strict=True):
        # Adam divides by the gradient's size, so tiny gradients move as far as large ones.
        assert np.mean(np.abs(a - b)) < 1e-6


# --- One choice at a time


@pytest.mark.parametrize("width", [3, 5, 12])
def test_a_loss_in_pieces_has_the_value_and_gradients_of_a_whole_one(width):
    random = np.random.default_rng(1)
    states = random.normal(size=(2, 12, 16)).astype(np.float32)
    head = random.normal(size=(61, 16)).astype(np.float32)
    targets, weights = ids_of(2, 12), random.random((2, 12)).astype(np.float32)

    def whole(states, head, weights):
        log_probs = jax.nn.log_softmax(states @ head.T)
        chosen = jnp.take_along_axis(log_probs, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
        return -3 * (weights * chosen).sum()

    def in_pieces(states, head, weights):
        return 3 * head_loss(width, states, head, targets, weights)

    expected = jax.value_and_grad(whole, argnums=(0, 1, 2))(states, head, weights)
    found = jax.value_and_grad(in_pieces, argnums=(0, 1, 2))(states, head, weights)
    assert_allclose(in_pieces(states, head, weights), expected[0], rtol=1e-6)
    # Sums of 61 or 24 products of numbers near 1, in another order.
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_target_outside_the_vocabulary_makes_a_loss_in_pieces_nan():
    arrays = np.ones((1, 4, 8), np.float32), np.ones((61, 8), np.float32)
    for bad in (-1, 61):
        targets = np.array([[0, 1, bad, 2]])
        assert np.isnan(head_loss(2, *arrays, targets, np.ones((1, 4), np.float32)))


@pytest.mark.parametrize(
    ("batch", "length", "positions", "expected"),
    [(8, 1024, 2048, 256), (1, 8, 2048, 8), (3, 10, 7, 2), (16, 257, 2048, 86), (64, 7, 8, 1)],
)
def test_pieces_are_as_few_as_positions_allow(batch, length, positions, expected):
    assert width_of(batch, length, positions) == expected


def test_masked_targets_do_not_count_with_the_choices_for_tpu(params, tpu_choices):
    ids, weights = ids_of(2, 33), np.ones((2, 32), np.float32)
    weights[:, 20:] = 0
    batch = flaxgpt.training.Batch(ids, weights)
    expected = -flaxgpt.score(CFG, params, ids)[:, :20].mean()
    assert_allclose(loss(CFG, params, batch), expected, rtol=1e-6)


def test_one_pass_norms_are_exact_for_numbers_with_a_large_mean():
    x = 30 + np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    norms = [flaxgpt.model.LayerNorm(one_pass=one_pass) for one_pass in (False, True)]
    variables = norms[0].init(jax.random.key(0), x)
    two, one = (norm.apply(variables, x) for norm in norms)
    # The squares are 900 times the variance, so 10 of the 24 bits of float32 cancel.
    assert_allclose(one, two, atol=2e-3)


@pytest.mark.parametrize(("rows", "expected"), [(1, 8), (3, 8), (7, 8), (8, 8), (9, 9)])
def test_few_rows_get_copies(rows, expected):
    x = jnp.arange(rows * 4.0).reshape(rows, 1, 4)
    wide = add_copies(x, Platform(least_rows=(("float32", 8),)))
    assert wide.shape == (expected, 1, 4)
    assert_array_equal(wide, x[np.arange(expected) % rows])
    assert_array_equal(drop_copies(wide, rows), x)
    narrow = x.astype("bfloat16")
    assert add_copies(narrow, Platform(least_rows=(("float32", 8),))).shape == x.shape


@pytest.mark.parametrize(("queries", "expected"), [(1, 8), (3, 3), (5, 2), (8, 2)])
def test_several_positions_in_a_row_need_fewer_copies(queries, expected):
    x = jnp.zeros((2, queries, 4))
    assert len(add_copies(x, Platform(least_rows=(("float32", 8),)))) == expected


# --- Which platform


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device("cpu"), "cpu"),
        (Device("tpu"), "tpu"),
        (Device("gpu", "9.0"), "cuda"),
        (Device("gpu", "8.0"), "cuda"),
        (Device("gpu", "7.5"), "gpu"),
        (Device("gpu", "gfx942"), "gpu"),
        (Device("gpu"), "gpu"),
    ],
)
def test_a_gpu_is_cuda_if_cudnn_can_attend_on_it(device, expected):
    assert platform._name(device) == expected


def test_arrays_on_cpu_are_computed_as_on_cpu(params):
    assert platform_of(params) == PLATFORMS["cpu"]


def test_traced_arrays_are_computed_as_on_the_default_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device(backend or "tpu")])
    assert platform_of() == PLATFORMS["tpu"]
    with jax.default_device("cpu"):
        assert platform_of() == PLATFORMS["cpu"]
    with jax.default_device(jax.devices()[0]):
        assert platform_of() == PLATFORMS["cpu"]


def test_a_mesh_of_devices_that_are_not_attached_decides(monkeypatch):
    mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind="TPU v5 lite"))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert platform_of() == PLATFORMS["tpu"]


def test_a_mesh_on_cpu_is_computed_as_on_cpu_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device("gpu", "9.0")])
    assert platform_of() == PLATFORMS["cuda"]
    with in_force(flaxgpt.make_mesh()):
        assert platform_of() == PLATFORMS["cpu"]
