"""The numbers that the book prints in chapter 4 and before training in chapter 5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.model import LayerNorm, Linear

ODD_END = [-1.3700731992721558, 0.9714289903640747, -2.6343274116516113]
VERDICT = golden.DATA / "verdict" / "the-verdict.txt"


@pytest.fixture(scope="module")
def model():
    return GPTConfig(), flaxgpt.book_params(GPTConfig(), seed=123)


@pytest.fixture(scope="module")
def short_model():
    cfg = GPTConfig(context_length=256)
    return cfg, flaxgpt.book_params(cfg, seed=123)


def test_section_4_2_layer_normalization():
    values = golden.book_values()["layernorm_example"]
    layer = {"params": {"weight": jnp.array(values["W"]), "bias": jnp.array(values["b"])}}
    out = nn.relu(Linear(6).apply(layer, jnp.array(values["x"])))
    np.testing.assert_allclose(out, values["out_printed"], atol=5e-5)  # printed to 4 places
    norm = LayerNorm()
    normed = norm.apply(norm.init(jax.random.key(0), out), out)
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(normed.var(-1), values["var_after_LN_biased_printed"], atol=5e-5)


@pytest.mark.parametrize("shortcut", [False, True])
def test_section_4_4_gradients_with_and_without_shortcuts(shortcut):
    values = golden.book_values()["shortcut_demo"]
    layers = [
        {"weight": jnp.array(layer["W"]), "bias": jnp.array(layer["b"])}
        for layer in values["layers"]
    ]

    def loss(layers):
        x = jnp.array(values["x"], jnp.float32)
        for layer in layers:
            y = nn.gelu(Linear(len(layer["bias"])).apply({"params": layer}, x), approximate=True)
            x = x + y if shortcut and x.shape == y.shape else y
        return jnp.square(x - jnp.array(values["target"], jnp.float32)).mean()

    means = [jnp.abs(layer["weight"]).mean() for layer in jax.grad(loss)(layers)]
    expected = values["grad_mean_shortcut" if shortcut else "grad_mean_no_shortcut"]
    np.testing.assert_allclose(means, expected, rtol=1e-5)  # float32 through five layers


def test_the_weights_of_the_124M_model_match_pytorch(model):
    _, params = model
    with np.load(golden.FOLDER / "book124M_seed123_ctx1024.npz") as expected:
        tok_emb, out_head = expected["tok_emb_first"], expected["out_head_last"]
    # PyTorch's vectorized log and cos differ from NumPy's in the last place.
    np.testing.assert_allclose(params["tok_emb"]["weight"][:2], tok_emb, atol=1e-6)
    np.testing.assert_array_equal(params["out_head"]["weight"][-2:], out_head)


def test_the_logits_of_the_124M_model_match_pytorch(model):
    cfg, params = model
    with np.load(golden.FOLDER / "book124M_seed123_ctx1024.npz") as file:
        expected = dict(file)
    logits = np.asarray(flaxgpt.forward(cfg, params, expected["input_ids"]))
    tolerance = golden.LOGITS_TOLERANCE * np.abs(logits).max()
    np.testing.assert_allclose(logits[..., :64], expected["logits_first64"], atol=tolerance, rtol=0)
    np.testing.assert_allclose(logits[..., -64:], expected["logits_last64"], atol=tolerance, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), expected["logits_argmax"])
    np.testing.assert_allclose(logits.mean(-1), expected["logits_mean"], atol=1e-5)
    np.testing.assert_allclose(logits.std(-1, ddof=1), expected["logits_std"], rtol=1e-5)


def test_section_4_7_output_of_the_untrained_model(model):
    values = golden.book_values()["greedy_124M_seed123_ctx1024"]
    cfg, params = model
    assert flaxgpt.generate(cfg, params, [values["prompt"]], 10) == [values["next10"]]
    tokenizer = flaxgpt.load_tokenizer("gpt2")
    assert tokenizer.encode("Hello, I am") == values["prompt"]
    texts = flaxgpt.generate_text(cfg, params, tokenizer, ["Hello, I am"], 10)
    assert "Hello, I am" + texts[0] == values["text"]


@pytest.mark.slow
def test_chapter_5_output_of_the_untrained_model(short_model):
    values = golden.book_values()["ch05_ctx256_seed123"]
    cfg, params = short_model
    assert flaxgpt.generate(cfg, params, [values["prompt"]], 10) == [values["next10"]]


@pytest.mark.slow
def test_chapter_5_target_probabilities_and_perplexity(short_model):
    values = golden.book_values()["ch05_ctx256_seed123"]
    logits = flaxgpt.forward(*short_model, np.array(values["inputs"]))
    np.testing.assert_array_equal(logits.argmax(-1), values["argmax"])
    targets = np.array(values["targets"])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(jnp.exp(chosen), values["target_probs"], rtol=1e-4)  # 5 digits
    np.testing.assert_allclose(-chosen.mean(), values["ce"], atol=5e-4)
    np.testing.assert_allclose(jnp.exp(-chosen.mean()), values["ppl"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "train"])
def test_chapter_5_losses_before_training(split, short_model):
    values = golden.book_values()["ch05_ctx256_seed123"]
    cfg, params = short_model
    text = VERDICT.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    text = {"train": text[:cut], "val": text[cut:]}[split]
    ids = np.array(flaxgpt.load_tokenizer("gpt2").encode(text))
    windows = np.stack([ids[start : start + 257] for start in range(0, len(ids) - 256, 256)])
    losses = [
        -flaxgpt.score(cfg, params, pair).mean() for pair in np.split(windows, len(windows) // 2)
    ]
    np.testing.assert_allclose(np.mean(losses), values[f"{split}_loss"], atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_progress_counts_the_drawn_parameters(bias):
    cfg = GPTConfig(
        vocab_size=100, context_length=8, emb_dim=16, n_heads=2, n_layers=2, qkv_bias=bias
    )
    seen = []
    params = flaxgpt.book_params(cfg, progress=lambda done, total: seen.append((done, total)))
    norms = (2 * cfg.n_layers + 1) * 2 * cfg.emb_dim
    total = sum(leaf.size for leaf in jax.tree.leaves(params)) - norms
    assert {t for _, t in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_an_embedding_whose_size_is_not_a_multiple_of_16_matches_pytorch():
    # torch.manual_seed(7); nn.Embedding(37, 5), PyTorch 2.13: the last three of 185 values.
    cfg = GPTConfig(vocab_size=37, context_length=4, emb_dim=5, n_heads=1, n_layers=1)
    params = flaxgpt.book_params(cfg, seed=7)
    last = params["tok_emb"]["weight"][-1, -3:]
    np.testing.assert_allclose(last, ODD_END, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "x"])
def test_a_seed_that_pytorch_does_not_accept_is_an_error(seed):
    with pytest.raises(ValueError, match=f"seed={seed!r} must be a whole number"):
        flaxgpt.book_params(GPTConfig(), seed=seed)


def test_tied_embeddings_are_an_error():
    with pytest.raises(ValueError, match="tie_embeddings=True: the book's model has a separate"):
        flaxgpt.book_params(GPTConfig.preset("gpt2"))


def test_an_embedding_of_fewer_than_16_values_is_an_error():
    cfg = GPTConfig(vocab_size=3, context_length=4, emb_dim=5, n_heads=1, n_layers=1)
    with pytest.raises(ValueError, match="embedding of 3 x 5 values cannot be reproduced"):
        flaxgpt.book_params(cfg)
