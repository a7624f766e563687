import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.model import FeedForward, LayerNorm, param_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = GPTConfig(vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2)
SMALL_MODELS = ["book-small", "book-qkv-bias", "hf-small", *golden.FOREIGN]


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocab_size)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_logits_are_pytorchs(name):
    cfg, params, expected = golden.model(name)
    logits = flaxgpt.forward(cfg, params, expected["input_ids"])
    chex.assert_shape(logits, expected["logits"].shape)
    golden.assert_logits_agree(logits, expected["logits"])


def test_the_linen_module_computes_what_forward_does(params, ids):
    logits = flaxgpt.GPT(TINY).apply({"params": params}, ids)
    golden.assert_logits_agree(flaxgpt.forward(TINY, params, ids), logits)


def test_forward_can_be_called_within_another_module(params, ids):
    class Probe(nn.Module):
        def setup(self):  # after which linen accepts no further modules
            self.scale = self.param("scale", nn.initializers.ones, ())

        def __call__(self, ids):
            return self.scale * flaxgpt.forward(TINY, params, ids)

    five = ids[:, :5]  # a shape that is traced here for the first time
    logits, variables = Probe().init_with_output(jax.random.key(0), five)
    golden.assert_logits_agree(logits, flaxgpt.forward(TINY, params, five))
    assert list(variables["params"]) == ["scale"]


def test_a_future_id_never_changes_an_earlier_logit(params, ids):
    def logits_of_embeddings(tok_emb, position):
        changed = params | {"tok_emb": {"weight": tok_emb}}
        return flaxgpt.forward(TINY, changed, unique)[0, position].sum()

    unique = jnp.arange(8)[None]  # each id occurs once, so embedding gradients do not mix
    for position in range(8):
        weight = params["tok_emb"]["weight"]
        gradient = np.abs(jax.grad(logits_of_embeddings)(weight, position)).sum(-1)
        assert (gradient[: position + 1] > 0).all()
        assert (gradient[position + 1 : 8] == 0).all()


def test_init_follows_gpt2():
    cfg = GPTConfig(vocab_size=500, context_length=64, emb_dim=128, n_heads=4, n_layers=4)
    params = flaxgpt.init(cfg, jax.random.key(0))
    assert type(params) is dict
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, param_shapes(cfg))
    block = params["trf_blocks_3"]
    # Of 16,384 draws or more, the sample deviation is within 2 % (4 standard errors).
    for weight in (params["tok_emb"], params["out_head"], block["att"]["W_key"]):
        np.testing.assert_allclose(weight["weight"].std(), 0.02, rtol=0.02)
    for weight in (block["att"]["out_proj"], block["ff"]["layers_2"]):
        np.testing.assert_allclose(weight["weight"].std(), 0.02 / 8**0.5, rtol=0.02)
        assert (weight["bias"] == 0).all()
    assert (block["norm1"]["scale"] == 1).all()
    assert (block["norm2"]["shift"] == 0).all()


def test_a_tied_model_has_no_head_of_its_own():
    shapes = param_shapes(dataclasses.replace(TINY, tie_embeddings=True))
    assert "out_head" not in shapes
    assert "out_head" in param_shapes(TINY)


def test_weights_are_stored_out_in():
    shapes = param_shapes(TINY)["trf_blocks_0"]["ff"]
    assert shapes["layers_0"]["weight"].shape == (96, 24)
    assert shapes["layers_2"]["weight"].shape == (24, 96)


def test_dropout_is_off_by_default_and_on_with_a_key(params, ids):
    plain = flaxgpt.forward(TINY, params, ids)
    chex.assert_trees_all_equal(plain, flaxgpt.forward(TINY, params, ids))
    dropped = flaxgpt.forward(TINY, params, ids, dropout_key=jax.random.key(2))
    again = flaxgpt.forward(TINY, params, ids, dropout_key=jax.random.key(2))
    other = flaxgpt.forward(TINY, params, ids, dropout_key=jax.random.key(3))
    chex.assert_trees_all_equal(dropped, again)
    assert jnp.abs(dropped - plain).max() > 1e-3
    assert jnp.abs(dropped - other).max() > 1e-3


def test_a_rate_of_zero_is_no_dropout(params, ids):
    cfg = dataclasses.replace(TINY, drop_rate=0.0)
    dropped = flaxgpt.forward(cfg, params, ids, dropout_key=jax.random.key(2))
    golden.assert_logits_agree(dropped, flaxgpt.forward(cfg, params, ids))


def test_dropout_keeps_the_expectation(params, ids):
    cfg = dataclasses.replace(TINY, drop_rate=0.0, drop_rate_emb=0.5)

    def stream(key):
        _, state = flaxgpt.GPT(cfg).apply(
            {"params": params},
            ids,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
            capture_intermediates=lambda module, _: module.name == "drop_emb",
        )
        return state["intermediates"]["drop_emb"]["__call__"][0]

    plain = stream(None)
    drawn = jax.jit(jax.vmap(stream))(jax.random.split(jax.random.key(0), 4000))
    kept = (drawn != 0).mean()
    np.testing.assert_allclose(kept, 0.5, atol=0.005)  # 1.7 million draws: 13 standard errors
    # Each mean over 4,000 keys has a standard error of |x| / sqrt(4000) = 1.6 %; 432 of them.
    assert (jnp.abs(drawn.mean(0) - plain) <= 0.08 * jnp.abs(plain)).all()


@pytest.mark.parametrize("rate", ["drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut"])
def test_each_rate_of_exercise_4_3_acts_alone(rate, params, ids):
    cfg = dataclasses.replace(TINY, drop_rate=0.0, **{rate: 0.5})
    plain = flaxgpt.forward(cfg, params, ids)
    dropped = flaxgpt.forward(cfg, params, ids, dropout_key=jax.random.key(2))
    assert jnp.abs(dropped - plain).max() > 1e-4


def test_layernorm_is_biased_and_float32_inside():
    x = jax.random.normal(jax.random.key(0), (4, 6)) * 10 + 1000
    variables = LayerNorm().init(jax.random.key(1), x)
    normed = LayerNorm().apply(variables, x)
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-4)  # floats near 1000 are 6e-5 apart
    np.testing.assert_allclose(normed.var(-1), 1, atol=1e-4)  # divided by n, not n - 1
    # bfloat16 has 8 bits, too few for the mean of a few thousand numbers near 1.
    ones = jnp.tile(jnp.array([1.0, 1.0078125], jnp.bfloat16), 2048)
    half = LayerNorm(dtype=jnp.bfloat16)
    normed = half.apply(half.init(jax.random.key(1), ones), ones)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(normed.astype(jnp.float32)[:2], [-0.77, 0.77], atol=0.01)


def test_feed_forward_uses_the_tanh_form_of_gelu():
    layer = FeedForward(TINY)
    x = jax.random.normal(jax.random.key(0), (1, 1, 24), jnp.float32)
    variables = layer.init(jax.random.key(1), x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64) * 50, variables["params"])
    wide = np.asarray(x, np.float64) @ p["layers_0"]["weight"].T
    gelu = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    expected = gelu @ p["layers_2"]["weight"].T
    scaled = jax.tree.map(lambda a: a * 50, variables)
    np.testing.assert_allclose(layer.apply(scaled, x), expected, rtol=1e-4, atol=1e-4)


def primitive_outputs(jaxpr, name):
    """Yield the abstract result of every such primitive in a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation.outvars[0].aval
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitive_outputs(inner, name)


def test_softmax_is_float32_whatever_the_dtype(params, ids):
    half = partial(flaxgpt.forward, TINY, dtype=jnp.bfloat16)
    exponentials = list(primitive_outputs(jax.make_jaxpr(half)(params, ids).jaxpr, "exp"))
    assert len(exponentials) == TINY.n_layers
    assert {aval.dtype for aval in exponentials} == {jnp.dtype("float32")}


def test_dropout_is_where_the_book_has_it(params, ids):
    drawn = partial(flaxgpt.forward, TINY, dropout_key=jax.random.key(0))
    bits = list(primitive_outputs(jax.make_jaxpr(drawn)(params, ids).jaxpr, "random_bits"))
    stream, weights = (2, 9, 24), (2, 3, 9, 9)
    in_a_block = [weights, stream, stream]  # attention weights, then before each addition
    assert [aval.shape for aval in bits] == [stream, *(TINY.n_layers * in_a_block)]


def test_hidden_states_are_hugging_faces():
    cfg, params, expected = golden.model("hf-small")
    _, state = flaxgpt.GPT(cfg).apply(
        {"params": params},
        expected["input_ids"],
        capture_intermediates=lambda module, _: (
            (module.name.startswith("trf_blocks_") or module.name in ("drop_emb", "final_norm"))
            if module.name and module.path == (module.name,)
            else False
        ),
    )
    seen = state["intermediates"]
    states = [seen["drop_emb"]["__call__"][0]]
    states += [seen[f"trf_blocks_{layer}"]["__call__"][0][0] for layer in range(cfg.n_layers)]
    states[-1] = seen["final_norm"]["__call__"][0]  # as transformers reports the last one
    for layer, hidden in enumerate(states):
        golden.assert_logits_agree(hidden, expected[f"hidden_{layer}"])


def test_bfloat16_logits_are_not_rounded_to_bfloat16(params, ids):
    logits = flaxgpt.forward(TINY, params, ids, dtype=jnp.bfloat16)
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.9
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    shared = {name: value for name, value in params.items() if name != "out_head"}
    logits = flaxgpt.forward(tied, shared, ids, dtype=jnp.bfloat16)
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.9


def test_bfloat16_computes_in_bfloat16_and_returns_float32(params, ids):
    half = flaxgpt.forward(TINY, params, ids, dtype=jnp.bfloat16)
    full = flaxgpt.forward(TINY, params, ids)
    assert half.dtype == jnp.float32
    relative = jnp.abs(half - full).max() / jnp.abs(full).max()
    assert 1e-4 < relative < 0.05  # bfloat16 has 8 bits: one rounding is 0.4 %


def test_parameters_stay_as_the_caller_has_them(params, ids):
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    gradient = jax.grad(lambda p: flaxgpt.forward(TINY, p, ids).sum())(cast)
    chex.assert_trees_all_equal_dtypes(gradient, cast)


def test_forward_is_transparent_to_transformations(params, ids):
    plain = flaxgpt.forward(TINY, params, ids)
    jitted = jax.jit(partial(flaxgpt.forward, TINY))
    golden.assert_logits_agree(jitted(params, ids), plain)
    rows = jax.vmap(lambda row: flaxgpt.forward(TINY, params, row[None])[0])(ids)
    golden.assert_logits_agree(rows, plain)
    shape = jax.eval_shape(partial(flaxgpt.forward, TINY), param_shapes(TINY), ids)
    assert (shape.shape, shape.dtype) == ((2, 9, 61), jnp.float32)
    exported = export.export(jitted)(params, ids)
    golden.assert_logits_agree(exported.call(params, ids), plain)


def test_forward_exports_with_a_symbolic_batch(params, ids):
    batch = export.symbolic_shape("b")[0]
    spec = jax.ShapeDtypeStruct((batch, 9), jnp.int32)
    exported = export.export(jax.jit(partial(flaxgpt.forward, TINY)))(params, spec)
    plain = flaxgpt.forward(TINY, params, ids)
    golden.assert_logits_agree(exported.call(params, ids), plain)
    golden.assert_logits_agree(exported.call(params, ids[:1]), plain[:1])


@pytest.mark.parametrize("bad", [-1, 61, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_refused_on_the_host_and_nan_under_jit(bad, params):
    ids = np.array([[1, 2, 3], [4, bad, 5]], np.int32)
    with pytest.raises(ValueError, match=rf"id {bad} at \[1, 1\] is outside .* 0 to 60"):
        flaxgpt.forward(TINY, params, ids)
    logits = jax.jit(partial(flaxgpt.forward, TINY))(params, ids)
    assert jnp.isfinite(logits[0]).all()
    assert jnp.isnan(logits[1, 1:]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32])
def test_narrow_and_unsigned_ids_are_ids(dtype, params, ids):
    plain = flaxgpt.forward(TINY, params, ids)
    golden.assert_logits_agree(flaxgpt.forward(TINY, params, np.asarray(ids, dtype)), plain)
    wrong = np.array([[1, 2, -1]]).astype(dtype)  # such as 255 if unsigned
    logits = jax.jit(partial(flaxgpt.forward, TINY))(params, wrong)
    assert jnp.isnan(logits[0, -1]).all()


def test_init_is_float32_even_where_float64_is_on():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        chex.assert_type(jax.tree.leaves(flaxgpt.init(TINY, jax.random.key(0))), jnp.float32)


def test_a_plain_dict_is_not_a_configuration(params, ids):
    book = TINY.to_dict()
    for call in (
        lambda: flaxgpt.init(book, jax.random.key(0)),
        lambda: flaxgpt.forward(book, params, ids),
        lambda: flaxgpt.init_cache(book, 1, 4),
        lambda: flaxgpt.generate(book, params, [[1]], 1),
        lambda: flaxgpt.book_params(book),
    ):
        with pytest.raises(ValueError, match=r"got dict; convert it with GPTConfig.from_dict"):
            call()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((0, 4), int), r"shape \(0, 4\) are empty"),
        (np.zeros((2, 0), int), r"shape \(2, 0\) are empty"),
        ([[]], r"shape \(1, 0\) are empty"),
        (np.zeros(4, int), r"shape \(4,\) must be \[batch, length\]"),
        (np.zeros((1, 4), np.float32), "float32 must be integers"),
        (jnp.zeros((1, 4), bool), "bool must be integers"),
        ([[1, 2], [3]], "all rows equally long"),
        (np.zeros((1, 17), int), "17 ids per row exceed context_length=16"),
    ],
)
def test_bad_ids_are_refused(ids, message, params):
    with pytest.raises(ValueError, match=message):
        flaxgpt.forward(TINY, params, ids)


def test_params_that_do_not_fit_are_all_named_at_once(params, ids):
    wrong = {k: v for k, v in params.items() if k != "final_norm"}
    wrong |= {"extra": jnp.zeros(3), "pos_emb": {"weight": jnp.zeros((15, 24))}}
    with pytest.raises(ValueError) as error:
        flaxgpt.forward(TINY, wrong, ids)
    for part in (
        "missing final_norm/scale",
        "missing final_norm/shift",
        "unexpected extra",
        "pos_emb/weight has shape (15, 24) instead of (16, 24)",
    ):
        assert part in str(error.value)


def test_a_variables_dict_is_not_params(params, ids):
    with pytest.raises(ValueError, match=r'pass variables\["params"\]'):
        flaxgpt.forward(TINY, {"params": params}, ids)
    with pytest.raises(ValueError, match="must be a nested dict of arrays, got list"):
        flaxgpt.forward(TINY, [params], ids)


def test_an_unknown_dtype_is_refused(params, ids):
    with pytest.raises(ValueError, match="dtype='float31' must be float32, bfloat16 or float16"):
        flaxgpt.forward(TINY, params, ids, dtype="float31")
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        flaxgpt.forward(TINY, params, ids, dtype=jnp.int32)
