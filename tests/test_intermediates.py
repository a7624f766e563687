"""Intermediate values of a model: reading, replacing, the logit lens and gradient norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxgpt
import golden
from flaxgpt.inspection import gradient_norms, without_shortcuts
from flaxgpt.training import loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODELS = ["book-qkv-bias", "hf-small"]


def example(name="hf-small"):
    cfg, params, expected = golden.model(name)
    return cfg, params, expected["input_ids"]


@pytest.fixture(scope="module")
def seen():
    return flaxgpt.activations(*example())


# Reading


def test_every_intermediate_has_its_shape(seen):
    cfg, _, ids = example()
    (b, t), n, h, d = ids.shape, cfg.n_heads, cfg.head_dim, cfg.emb_dim
    assert list(seen)[: len(flaxgpt.activation_names(cfg))] == list(flaxgpt.activation_names(cfg))
    shapes = {
        "pos_emb": (1, t, d),
        "trf_blocks_1/att/key": (b, n, t, h),
        "trf_blocks_1/att/weights": (b, n, t, t),
        "trf_blocks_1/att/heads": (b, n, t, h),
        "trf_blocks_1/att": (b, t, d),
        "trf_blocks_1/middle": (b, t, d),
        "trf_blocks_1/ff/wide": (b, t, 4 * d),
        "trf_blocks_1/ff/active": (b, t, 4 * d),
        "trf_blocks_1": (b, t, d),
        "final_norm": (b, t, d),
        "logits": (b, t, cfg.vocab_size),
    }
    assert {name: seen[name].shape for name in shapes} == shapes


def test_hidden_states_match_hugging_face(seen):
    cfg, _, _ = example()
    expected = golden.model("hf-small")[2]
    for i in range(cfg.n_layers + 1):
        golden.assert_logits_agree(seen[f"hidden_{i}"], expected[f"hidden_{i}"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_forward(name):
    cfg, params, ids = example(name)
    logits = flaxgpt.activations(cfg, params, ids, select=["logits"])["logits"]
    golden.assert_logits_agree(logits, flaxgpt.forward(cfg, params, ids))


def test_attention_weights_are_causal_and_sum_to_one(seen):
    cfg, _, ids = example()
    for i in range(cfg.n_layers):
        weights = np.asarray(seen[f"trf_blocks_{i}/att/weights"])
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        future = np.triu(np.ones((ids.shape[1],) * 2, bool), 1)
        assert (weights[..., future] == 0).all() and (weights >= 0).all()


def test_the_residual_stream_is_the_sum_of_the_outputs_added_to_it(seen):
    np.testing.assert_array_equal(seen["embeddings"], seen["tok_emb"] + seen["pos_emb"])
    x = seen["embeddings"]
    for i in range(example()[0].n_layers):
        block = f"trf_blocks_{i}"
        np.testing.assert_allclose(seen[f"{block}/middle"], x + seen[f"{block}/att"], atol=1e-6)
        x = seen[block]
        np.testing.assert_allclose(x, seen[f"{block}/middle"] + seen[f"{block}/ff"], atol=1e-6)


def test_heads_are_weighted_means_of_the_values(seen):
    made = seen["trf_blocks_0/att/weights"] @ seen["trf_blocks_0/att/value"]
    np.testing.assert_allclose(seen["trf_blocks_0/att/heads"], made, atol=1e-6)


def test_only_selected_values_are_returned():
    cfg, params, ids = example()
    found = flaxgpt.activations(cfg, params, ids, select=["*/att/weights", "hidden_1"])
    weights = [f"trf_blocks_{i}/att/weights" for i in range(cfg.n_layers)]
    assert list(found) == [*weights, "hidden_1"]


def test_values_that_are_not_selected_take_no_memory():
    cfg, params, _ = example()
    ids = jax.ShapeDtypeStruct((8, 24), jnp.int32)

    def result_bytes(select):
        def call(params, ids):
            return flaxgpt.activations(cfg, params, ids, select=select)

        return jax.jit(call).lower(params, ids).compile().memory_analysis().output_size_in_bytes

    one = 8 * 24 * cfg.emb_dim * 4
    assert one <= result_bytes(["final_norm"]) < 1.1 * one
    assert result_bytes(None) > 20 * one


def test_activations_support_jit_grad_and_vmap():
    cfg, params, ids = example()

    def one(params, row):
        return flaxgpt.activations(cfg, params, row[None], select=["trf_blocks_0"])["trf_blocks_0"]

    rows = jax.jit(jax.vmap(one, (None, 0)))(params, ids)[:, 0]
    together = flaxgpt.activations(cfg, params, ids, select=["trf_blocks_0"])["trf_blocks_0"]
    np.testing.assert_allclose(rows, together, atol=1e-5)
    gradient = jax.grad(lambda p: one(p, ids[0]).sum())(params)
    assert (np.asarray(gradient["final_norm"]["scale"]) == 0).all()
    assert (np.asarray(gradient["trf_blocks_0"]["att"]["out_proj"]["weight"]) != 0).any()


# Replacing


@pytest.mark.parametrize("name", MODELS)
def test_identity_patches_leave_the_logits_unchanged(name):
    cfg, params, ids = example(name)
    logits = flaxgpt.forward(cfg, params, ids)
    everywhere = dict.fromkeys(flaxgpt.activation_names(cfg), lambda x: x)
    golden.assert_logits_agree(flaxgpt.patch(cfg, params, ids, everywhere), logits)


def test_a_patch_changes_later_values_and_not_earlier_ones():
    cfg, params, ids = example()
    names = flaxgpt.activation_names(cfg)
    base = flaxgpt.activations(cfg, params, ids)
    for name in names[3:17] + names[-2:]:
        changed = flaxgpt.activations(
            cfg, params, ids, patches={name: lambda x: jnp.roll(x, 1, axis=0)}
        )
        before = names[: names.index(name)]
        for earlier in before:
            assert np.allclose(changed[earlier], base[earlier], atol=1e-5), (name, earlier)
        np.testing.assert_allclose(changed[name], jnp.roll(base[name], 1, axis=0), atol=1e-5)
        assert not np.allclose(changed["logits"], base["logits"], atol=1e-4), name


def test_the_residual_stream_of_another_prompt_gives_the_logits_of_that_prompt():
    cfg, params, ids = example()
    other = flaxgpt.activations(cfg, params, ids[::-1])
    for name in ("embeddings", "trf_blocks_1/middle", "hidden_2", "final_norm"):
        swapped = flaxgpt.patch(cfg, params, ids, {name: lambda _, name=name: other[name]})
        golden.assert_logits_agree(swapped, other["logits"])


def test_zeroing_a_head_equals_zeroing_its_output_weights():
    cfg, params, ids = example()
    n, h = 2, cfg.head_dim
    weight = params["trf_blocks_1"]["att"]["out_proj"]["weight"]
    zeroed = jax.tree.map(lambda x: x, params)
    zeroed["trf_blocks_1"]["att"]["out_proj"]["weight"] = weight.at[:, n * h : (n + 1) * h].set(0)
    expected = flaxgpt.forward(cfg, zeroed, ids)
    patches = {"trf_blocks_1/att/heads": lambda heads: heads.at[:, n].set(0)}
    golden.assert_logits_agree(flaxgpt.patch(cfg, params, ids, patches), expected)
    weights = {"trf_blocks_1/att/weights": lambda weights: weights.at[:, n].set(0)}
    golden.assert_logits_agree(flaxgpt.patch(cfg, params, ids, weights), expected)


def test_a_patch_has_a_gradient():
    cfg, params, ids = example()

    def loss(scale):
        patches = {"trf_blocks_0/ff": lambda x: scale * x}
        return flaxgpt.patch(cfg, params, ids, patches)[0, -1, 0]

    slope = jax.jit(jax.grad(loss))(1.0)
    near = [float(loss(1.0 + step)) for step in (-1e-2, 1e-2)]
    np.testing.assert_allclose(slope, (near[1] - near[0]) / 2e-2, rtol=0.02)


def test_a_patch_does_not_affect_later_calls():
    cfg, params, ids = example()
    before = flaxgpt.forward(cfg, params, ids)
    flaxgpt.patch(cfg, params, ids, {"final_norm": lambda x: 0 * x})
    np.testing.assert_array_equal(flaxgpt.forward(cfg, params, ids), before)


def test_a_patch_may_run_models_itself():
    cfg, params, ids = example()
    other = ids[:1, :7]  # this shape is first traced here, while another model runs
    seen = []

    def look(x):
        seen.append(flaxgpt.activations(cfg, params, other, select=["hidden_1"])["hidden_1"])
        seen.append(flaxgpt.patch(cfg, params, other, {"logits": lambda x: 0 * x}))
        return x

    patched = flaxgpt.patch(cfg, params, ids, {"trf_blocks_0/att/weights": look})
    golden.assert_logits_agree(patched, flaxgpt.forward(cfg, params, ids))
    expected = flaxgpt.activations(cfg, params, ids)["hidden_1"][:1, :7]
    golden.assert_logits_agree(seen[0], expected)
    assert not np.asarray(seen[1]).any()


# The logit lens


def test_the_lens_starts_at_the_embeddings_and_ends_at_the_logits():
    cfg, params, ids = example()
    lens = flaxgpt.logit_lens(cfg, params, ids)
    assert lens.shape == (cfg.n_layers + 1, *ids.shape, cfg.vocab_size)
    golden.assert_logits_agree(lens[-1], flaxgpt.forward(cfg, params, ids))
    stream = flaxgpt.activations(cfg, params, ids)["trf_blocks_0"]
    last = {f"trf_blocks_{cfg.n_layers - 1}": lambda _: stream}
    golden.assert_logits_agree(lens[1], flaxgpt.patch(cfg, params, ids, last))


def test_the_lens_applies_patches():
    cfg, params, ids = example()
    patches = {"trf_blocks_1": lambda x: 0 * x}
    plain = flaxgpt.logit_lens(cfg, params, ids)
    patched = flaxgpt.logit_lens(cfg, params, ids, patches=patches)
    golden.assert_logits_agree(patched[:2], plain[:2])
    assert np.ptp(patched[2], axis=(0, 1)).max() == 0  # the same at every position


# Invalid input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda *a: flaxgpt.activations(*a, select=["trf_blocks_0/att/wieghts"]),
            "unknown intermediate 'trf_blocks_0/att/wieghts': did you mean "
            "'trf_blocks_0/att/weights'",
        ),
        (lambda *a: flaxgpt.activations(*a, select=["trf_blocks_3"]), "did you mean 'trf_blocks_"),
        (lambda *a: flaxgpt.activations(*a, select="logits"), r"for one name, use \['logits'\]"),
        (lambda *a: flaxgpt.patch(*a, {"hidden_9": abs}), "did you mean 'hidden_"),
        (lambda *a: flaxgpt.patch(*a, {"logits": 0.0}), "must be a function of the value there"),
        (lambda *a: flaxgpt.patch(*a, ["logits"]), "patches must be a dict of name: function"),
        (
            lambda *a: flaxgpt.patch(*a, {"hidden_0": abs, "embeddings": abs}),
            "embeddings is embeddings, which already has a patch|hidden_0 is",
        ),
        (lambda *a: flaxgpt.patch(*a, {"att": lambda _: None}), "unknown intermediate 'att'"),
        (
            lambda *a: flaxgpt.patch(*a, {"embeddings": lambda _: None}),
            "embeddings returned NoneType",
        ),
        (
            lambda *a: flaxgpt.patch(*a, {"embeddings": lambda x: x.astype("complex64")}),
            "expected real numbers",
        ),
        (lambda *a: flaxgpt.activations(*a, select=[0]), "has 0, which is not the name"),
        (lambda *a: flaxgpt.activations(*a, select=["LOGITS"]), "did you mean 'logits'"),
        (lambda *a: flaxgpt.logit_lens(*a, patches={"logits": abs}), "logits cannot be patched"),
        (
            lambda *a: flaxgpt.patch(*a, {"final_norm": lambda x: x[0]}),
            r"the patch of final_norm returned shape \(24, 64\); expected \(4, 24, 64\)",
        ),
    ],
)
def test_invalid_names_and_patches_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*example())


@pytest.mark.parametrize("function", [flaxgpt.activation_names, without_shortcuts])
def test_a_configuration_of_another_type_is_an_error(function):
    with pytest.raises(ValueError, match="cfg must be a GPTConfig, got dict"):
        function({})


def test_invalid_ids_and_parameters_are_errors():
    cfg, params, ids = example()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        flaxgpt.activations(cfg, params, ids + cfg.vocab_size)
    with pytest.raises(ValueError, match="missing final_norm"):
        flaxgpt.patch(cfg, {k: v for k, v in params.items() if k != "final_norm"}, ids, {})
    with pytest.raises(ValueError, match="exceed context_length"):
        flaxgpt.logit_lens(cfg, params, np.zeros((1, cfg.context_length + 1), int))


# NumPy parameters and gradient norms


def test_numpy_parameters_can_be_patched():
    cfg, params, ids = example()
    plain = jax.tree.map(np.asarray, params)
    patches = {"trf_blocks_0/att": lambda x: 0 * x}
    golden.assert_logits_agree(
        flaxgpt.patch(cfg, plain, ids, patches), flaxgpt.patch(cfg, params, ids, patches)
    )


def _flat(tree):
    return [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_gradient_norms_match_the_gradient_of_the_loss():
    cfg, params, ids = example()
    gradient = jax.grad(lambda p: loss(cfg, p, ids))(params)
    blocks = [gradient[f"trf_blocks_{i}"] for i in range(cfg.n_layers)]
    expected = [np.linalg.norm(np.concatenate(flat)) for flat in map(_flat, blocks)]
    # Thousands of squares are added in another order.
    np.testing.assert_allclose(gradient_norms(cfg, params, ids), expected, rtol=1e-4)


def test_without_shortcuts_a_block_returns_only_its_own_output():
    cfg, params, ids = example()
    seen = flaxgpt.activations(cfg, params, ids, patches=without_shortcuts(cfg))
    for i in range(cfg.n_layers):
        block = f"trf_blocks_{i}"
        np.testing.assert_array_equal(seen[f"{block}/middle"], seen[f"{block}/att"])
        np.testing.assert_array_equal(seen[block], seen[f"{block}/ff"])


@pytest.mark.parametrize("ids", [[[1, 2, 99999]], [[1, -1]], [[1]]])
def test_gradient_norms_require_valid_ids_with_a_target(ids):
    cfg, params, _ = example()
    with pytest.raises(ValueError, match=r"outside the vocabulary|nothing to predict"):
        gradient_norms(cfg, params, ids)
