import dataclasses
import json

import jax
import numpy as np
import pytest

import golden
from flaxgpt import GPTConfig
from flaxgpt.model import param_shapes

COUNTS = {  # the book, exercise 4.2 and section 4.6; Radford et al. 2019 as released
    "book-124M": 163_009_536,
    "book-355M": 406_212_608,
    "book-774M": 838_220_800,
    "book-1558M": 1_637_792_000,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def test_the_default_is_the_books_124M():
    assert GPTConfig().to_dict() == {
        "vocab_size": 50257,
        "context_length": 1024,
        "emb_dim": 768,
        "n_heads": 12,
        "n_layers": 12,
        "drop_rate": 0.1,
        "qkv_bias": False,
        "tie_embeddings": False,
    }
    assert GPTConfig.preset("book-124M") == GPTConfig()


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_its_published_number_of_parameters(name):
    shapes = jax.tree.leaves(param_shapes(GPTConfig.preset(name)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)  # nothing allocated
    assert sum(leaf.size for leaf in shapes) == COUNTS[name]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'gpt2-xxl': did you mean .*'gpt2-xl'"):
        GPTConfig.preset("gpt2-xxl")


def test_equal_configurations_behave_alike_under_replace():
    given = GPTConfig(drop_rate=0.1, drop_rate_attn=0.1)
    read = GPTConfig.from_dict(given.to_dict())
    assert read == given
    for cfg in (given, read):
        assert dataclasses.replace(cfg, drop_rate=0.5).drop_rates == (0.5, 0.1, 0.5)


def test_it_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_heads = 1
    assert len({GPTConfig(), GPTConfig(drop_rate=0.1), GPTConfig(n_layers=1)}) == 2


def test_the_three_rates_follow_drop_rate_unless_given():
    cfg = GPTConfig(drop_rate=0.2, drop_rate_attn=0.3)
    assert cfg.drop_rates == (0.2, 0.3, 0.2)
    cfg = dataclasses.replace(cfg, drop_rate=0.0)
    assert cfg.drop_rates == (0.0, 0.3, 0.0)
    cfg = dataclasses.replace(GPTConfig.from_dict(cfg.to_dict()), drop_rate=0.5)
    assert cfg.drop_rates == (0.5, 0.3, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 7}, "n_heads=7 does not divide emb_dim=768.*use n_heads=6"),
        ({"drop_rate": 1.0}, r"drop_rate=1.0 must be a probability"),
        ({"drop_rate_attn": -0.1}, r"drop_rate_attn=-0.1 must be a probability"),
        ({"drop_rate": float("nan")}, r"drop_rate=nan must be a probability"),
        ({"drop_rate": "0.1"}, r"drop_rate='0.1' must be a probability"),
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number"),
        ({"n_layers": -3}, "n_layers=-3 must be a whole number"),
        ({"emb_dim": 2.5}, "emb_dim=2.5 must be a whole number"),
        ({"context_length": True}, "context_length=True must be a whole number"),
        ({"qkv_bias": 1}, "qkv_bias=1 must be True or False"),
    ],
)
def test_the_impossible_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


def test_a_numpy_integer_is_a_size():
    cfg = GPTConfig(n_layers=np.int64(2))
    assert cfg.n_layers == 2
    assert type(cfg.n_layers) is int


def test_it_reads_back_what_it_writes_through_json():
    cfg = GPTConfig(n_layers=3, qkv_bias=True, tie_embeddings=True, drop_rate_emb=0.05)
    assert GPTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    cfg = GPTConfig(bias=False, activation="gelu", norm_eps=1e-6, scale_attn_by_layer=True)
    assert GPTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"unknown config keys \['n_head'\]"):
        GPTConfig.from_dict({"n_head": 12})


def huggingface(**changes):
    return json.loads((golden.FOLDER / "hf-small" / "config.json").read_text()) | changes


def test_it_reads_a_hugging_face_config():
    cfg = GPTConfig.from_dict(huggingface())
    assert cfg == GPTConfig(
        vocab_size=300,
        context_length=64,
        emb_dim=64,
        n_heads=4,
        n_layers=3,
        drop_rate=0.0,
        qkv_bias=True,
        tie_embeddings=True,
    )


def test_a_sparse_hugging_face_config_has_hugging_faces_defaults():
    assert GPTConfig.from_dict({"model_type": "gpt2"}) == GPTConfig.preset("gpt2")


def test_unequal_hugging_face_rates_are_kept():
    cfg = GPTConfig.from_dict(huggingface(attn_pdrop=0.2, resid_pdrop=0.3))
    assert cfg.drop_rates == (0.0, 0.2, 0.3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("n_inner", 128),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_hugging_face_option_that_changes_the_mathematics_is_refused(option, value):
    with pytest.raises(ValueError, match=f"option {option}=.*is not supported"):
        GPTConfig.from_dict(huggingface(**{option: value}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("n_embd", None, "n_embd=None must be a whole number"),
        ("n_head", "4", "n_heads='4' must be a whole number"),
        ("attn_pdrop", [], r"drop_rate_attn=\[\] must be a probability"),
        ("tie_word_embeddings", 1, "tie_embeddings=1 must be True or False"),
    ],
)
def test_a_broken_hugging_face_value_is_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(huggingface(**{option: value}))


def test_four_times_the_width_written_out_is_not_another_n_inner():
    assert GPTConfig.from_dict(huggingface(n_inner=256)) == GPTConfig.from_dict(huggingface())
