"""Inputs that users have, each with its right result. A new one is a line in a table.

The tables are ordered by the kind of fault that they guard against.
"""

import dataclasses
import fnmatch
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.tokenizer.folder import read_model_tokenizer
from flaxgpt.training import TrainConfig, init_state, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

NANOGPT, GELU, LAYERS, FLAX = (golden.FOLDER / name for name in golden.FOREIGN)
HF = golden.FOLDER / "hf-small"


# Checkpoints of other origins load, and everything works on them


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nanogpt-small", {"bias": False, "activation": "gelu", "tie_embeddings": True}),
        ("hf-gelu-eps", {"activation": "gelu", "norm_eps": 1e-6}),
        ("hf-inverse-layer", {"scale_attn_by_layer": True}),
        ("hf-flax-msgpack", {"activation": "gelu_tanh", "tie_embeddings": True}),
    ],
)
def test_a_foreign_checkpoint_has_its_configuration(name, changes):
    cfg = golden.model(name)[0]
    assert {key: getattr(cfg, key) for key in changes} == changes


@pytest.mark.parametrize("name", golden.FOREIGN)
def test_a_foreign_model_generates_what_its_logits_say(name):
    cfg, params, expected = golden.model(name)
    prompt = expected["input_ids"][:, :6]
    ids = np.concatenate([prompt, flaxgpt.generate(cfg, params, prompt, 10)], axis=1)
    best = np.asarray(flaxgpt.forward(cfg, params, ids[:, :-1])).argmax(-1)
    np.testing.assert_array_equal(ids[:, 6:], best[:, 5:])


@pytest.mark.slow
def test_a_padded_vocabulary_generates_pytorchs_ids_without_the_padding():
    cfg, params, expected = golden.model("nanogpt-small")
    vocab, prompt = int(expected["vocab"]), expected["input_ids"]
    allowed = np.arange(cfg.vocab_size) < vocab
    new = expected["greedy_ids_below_vocab"][:, prompt.shape[1] :]
    assert flaxgpt.generate(cfg, params, prompt, new.shape[1], allowed=allowed) == new.tolist()
    plain = flaxgpt.generate(cfg, params, prompt, new.shape[1])
    assert np.max(plain) >= vocab, "the model draws no padding by itself: this tests nothing"


@pytest.mark.parametrize("name", golden.FOREIGN)
def test_a_foreign_model_can_be_counted_and_inspected(name):
    cfg, params, expected = golden.model(name)
    ids = expected["input_ids"][:1, :5]
    assert flaxgpt.count_params(cfg) == flaxgpt.count_params(params)
    assert flaxgpt.flops(cfg, 1, 5).forward > 0
    found = flaxgpt.activations(cfg, params, ids)
    golden.assert_logits_agree(found["logits"], expected["logits"][:1, :5])
    for layer in range(cfg.n_layers):  # the weights that were used are the ones that are shown
        att = f"trf_blocks_{layer}/att"
        heads = np.einsum(
            "bnts,bnsh->bnth", found[f"{att}/weights"], found[f"{att}/value"], dtype=np.float64
        )
        np.testing.assert_allclose(found[f"{att}/heads"], heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", golden.FOREIGN)
def test_a_foreign_model_trains_and_keeps_its_parameters_names(name):
    cfg, params, expected = golden.model(name)
    state = init_state(cfg, TrainConfig(steps=2, warmup_steps=0), params)
    state, metrics = train_step(state, expected["input_ids"])
    assert np.isfinite(metrics["loss"])
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


@pytest.mark.parametrize("layout", ["huggingface", "book"])
@pytest.mark.parametrize("name", golden.FOREIGN)
def test_a_foreign_model_is_the_same_after_saving_in_another_layout(name, layout, tmp_path):
    cfg, params, _ = golden.model(name)
    flaxgpt.save(tmp_path / "m", cfg, params, layout=layout)
    loaded, again, _ = flaxgpt.load(tmp_path / "m")
    assert loaded == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_biases_that_a_model_lacks_are_zeros_in_hugging_faces_layout(tmp_path):
    cfg, params, _ = golden.model("nanogpt-small")
    flaxgpt.save(tmp_path / "m", cfg, params)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == cfg.n_layers * 6 + 1
    assert not any(tensors[name].any() for name in biases)

    tensors["transformer.h.1.mlp.c_fc.bias"][0] = 1.0
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r'mlp.c_fc.bias is not all zeros.*"bias": false'):
        flaxgpt.load(tmp_path / "m")


def copy(source, folder, tensors=None, file="model.safetensors", **changes):
    """Copy a golden model with other tensors or other keys in config.json."""
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        load_file(source / "model.safetensors") if tensors is None else tensors, folder / file
    )
    return folder


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("source", [NANOGPT, HF], ids=lambda path: path.name)
def test_prefixes_of_compiled_and_parallel_modules_are_ignored(source, prefix, tmp_path):
    tensors = load_file(source / "model.safetensors")
    renamed = {prefix + name.removeprefix("_orig_mod."): tensors[name] for name in tensors}
    _, params, _ = flaxgpt.load(copy(source, tmp_path, renamed))
    jax.tree.map(np.testing.assert_array_equal, params, golden.model(source.name)[1])


def test_nanogpt_with_biases_has_all_of_them(tmp_path):
    tensors = load_file(NANOGPT / "model.safetensors")
    random = np.random.default_rng(0)
    for name, tensor in list(tensors.items()):
        if ".wte." not in name and ".wpe." not in name and "lm_head" not in name:
            bias = random.standard_normal(len(tensor), np.float32)
            tensors[name.removesuffix("weight") + "bias"] = bias
    cfg, params, _ = flaxgpt.load(copy(NANOGPT, tmp_path, tensors, bias=True))
    assert cfg.bias and cfg.qkv_bias
    fused = tensors["_orig_mod.transformer.h.2.attn.c_attn.bias"]
    att = params["trf_blocks_2"]["att"]
    parts = [att[name]["bias"] for name in ("W_query", "W_key", "W_value")]
    np.testing.assert_array_equal(np.concatenate(parts), fused)
    with pytest.raises(ValueError, match=r"bias=False.*unexpected \S*attn\.c_attn\.bias"):
        flaxgpt.load(copy(NANOGPT, tmp_path, tensors, bias=False))


def test_a_nanogpt_of_before_june_2023_is_read_with_an_activation_in_its_config(tmp_path):
    assert (
        flaxgpt.load(copy(NANOGPT, tmp_path, activation="gelu_tanh"))[0].activation == "gelu_tanh"
    )
    with pytest.raises(ValueError, match=r"unknown nanoGPT settings \['rotary'\]"):
        flaxgpt.load(copy(NANOGPT, tmp_path, rotary=True))


@pytest.mark.parametrize(("vocab_size", "has_gpt2s"), [(50304, True), (50257, True), (320, False)])
def test_nanogpts_padded_vocabulary_is_gpt2s(vocab_size, has_gpt2s, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"block_size": 8, "vocab_size": vocab_size}))
    tokenizer = read_model_tokenizer(tmp_path, vocab_size)
    assert (tokenizer == flaxgpt.load_tokenizer("gpt2")) == has_gpt2s


def nanogpt_checkpoint(path):
    """Write the parts of PyTorch's zip file that flaxgpt looks at."""
    import zipfile

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ckpt/data.pkl", b"\x80\x02}q\x00(X\x0a\x00\x00\x00model_argsq\x01")


@pytest.mark.parametrize(
    ("write", "name", "expected"),
    [
        (nanogpt_checkpoint, "ckpt.pt", r'state\["model_args"\].*state = state\["model"\]'),
        (lambda path: path.write_bytes(b"\x80\x02."), "ckpt.pt", "pickle.*save_file"),
        (lambda path: path.write_bytes(b""), "pytorch_model.bin", "pickle.*save_file"),
    ],
)
def test_a_pickle_is_refused_with_its_conversion(write, name, expected, tmp_path):
    write(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"(?s){expected}"):
            flaxgpt.load(source)


# Flax's msgpack files


@pytest.mark.parametrize("prefix", [{"transformer"}, set()], ids=["with head", "without"])
def test_a_flax_model_may_lack_the_prefix_of_the_language_model(prefix, tmp_path):
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    folder = shutil.copytree(FLAX, tmp_path / "m")
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree if prefix else tree["transformer"]))
    jax.tree.map(np.testing.assert_array_equal, flaxgpt.load(folder)[1], golden.model(FLAX.name)[1])


def test_an_untied_flax_head_is_transposed(tmp_path):
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    head = np.random.default_rng(0).standard_normal((48, 211), np.float32)
    folder = shutil.copytree(FLAX, tmp_path / "m")
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree | {"lm_head": {"kernel": head}}))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(flaxgpt.load(folder)[1]["out_head"]["weight"], head.T)


def test_a_tied_flax_model_may_store_its_transposed_embedding_as_a_head(tmp_path):
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    head = tree["transformer"]["wte"]["embedding"].T
    folder = shutil.copytree(FLAX, tmp_path / "m")
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree | {"lm_head": {"kernel": head}}))
    jax.tree.map(np.testing.assert_array_equal, flaxgpt.load(folder)[1], golden.model(FLAX.name)[1])

    tree["lm_head"] = {"kernel": head * 2}
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree))
    with pytest.raises(ValueError, match=r"lm_head.kernel differs from the token embedding"):
        flaxgpt.load(folder)


def test_flax_shards_with_an_index_load_as_one_model(tmp_path):
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    names = sorted(flat := flatten_dict(tree, sep="/"))
    shutil.copy(FLAX / "config.json", tmp_path)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"flax_model-0000{number}-of-00002.msgpack"
        weight_map |= dict.fromkeys(part, file)
        shard = unflatten_dict({name: flat[name] for name in part}, sep="/")
        (tmp_path / file).write_bytes(to_bytes(shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    _, params, _ = flaxgpt.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, golden.model(FLAX.name)[1])

    (tmp_path / "flax_model-00002-of-00002.msgpack").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not have flax_model-00002-of-00002"):
        flaxgpt.load(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_flax_weights_of_another_dtype_become_float32(dtype, tmp_path):
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    stored = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)
    folder = shutil.copytree(FLAX, tmp_path / "m")
    (folder / "flax_model.msgpack").write_bytes(to_bytes(stored))
    found = flaxgpt.load(folder)[1]["tok_emb"]["weight"]
    expected = stored["transformer"]["wte"]["embedding"].astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1000], "flax_model.msgpack is truncated or damaged"),
        (lambda data: data[:1], "flax_model.msgpack is truncated or damaged"),
        (lambda data: b"", "flax_model.msgpack is truncated or damaged"),
        (lambda data: b"\x93\x01\x02\x03", "flax_model.msgpack is truncated or damaged"),
        (lambda data: b"\x81\xa1a\x01", "flax_model.msgpack is truncated or damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (lambda data: bytes(reversed(data)), "flax_model.msgpack is truncated or damaged"),
    ],
)
def test_a_damaged_flax_file_is_one_clear_error(damage, message, tmp_path):
    folder = shutil.copytree(FLAX, tmp_path / "m")
    data = (folder / "flax_model.msgpack").read_bytes()
    (folder / "flax_model.msgpack").write_bytes(damage(data))
    with pytest.raises(ValueError, match=message):
        flaxgpt.load(folder)


@pytest.mark.parametrize("files", [(FLAX,), (FLAX, HF)], ids=["Flax alone", "both"])
def test_flax_weights_on_the_hub_are_downloaded_if_there_are_no_safetensors(
    files, tmp_path, monkeypatch
):
    remote = {path.name: path for source in files for path in source.iterdir()}

    def download(model_id, allow_patterns, ignore_patterns):
        for name, path in remote.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cfg, params, _ = flaxgpt.load("org/name")
    expected = golden.model(files[-1].name)
    assert cfg == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    assert (tmp_path / "flax_model.msgpack").exists() == (files == (FLAX,))


# Tensors that are not of the language model


@pytest.mark.parametrize(
    "name",
    ["score.weight", "multiple_choice_head.summary.weight", "classifier.bias", "v_head.weight"],
)
def test_another_head_is_named_and_left_out(name, tmp_path):
    tensors = load_file(HF / "model.safetensors") | {name: np.ones((2, 64), np.float32)}
    with pytest.warns(UserWarning, match=f"also has {name}, which the language model does not use"):
        _, params, _ = flaxgpt.load(copy(HF, tmp_path, tensors))
    jax.tree.map(np.testing.assert_array_equal, params, golden.model("hf-small")[1])


@pytest.mark.parametrize(
    "name", ["transformer.h.0.crossattention.bias", "h.1.attn.c_attn.lora_A.weight", "wte.scale"]
)
def test_an_unknown_tensor_inside_the_language_model_is_refused(name, tmp_path):
    tensors = load_file(HF / "model.safetensors") | {name: np.ones((2, 64), np.float32)}
    with pytest.raises(ValueError, match=f"unexpected {name}"):
        flaxgpt.load(copy(HF, tmp_path, tensors))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}', "a LORA adapter.*model, gpt2"),
        ('{"peft_type": "IA3"}', "a IA3 adapter.*does not name"),
        ("{", "a LORA adapter"),
    ],
)
def test_an_adapter_is_refused_with_its_base_model(contents, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(contents)
    save_file({"base_model.x.lora_A.weight": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=f"(?s){message}.*merge_and_unload"):
            flaxgpt.load(source)


def test_a_model_beside_an_adapter_is_loaded_without_it(tmp_path):
    (copy(HF, tmp_path) / "adapter_config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.warns(UserWarning, match=r"adapter_config.json, is not applied"):
            _, params, _ = flaxgpt.load(source)
        jax.tree.map(np.testing.assert_array_equal, params, golden.model("hf-small")[1])


# Configuration keys that change the function


def huggingface(**changes):
    return json.loads((HF / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 8}, {"n_heads": 8}),  # where both names stand, the alias wins
        ({"num_hidden_layers": 1}, {"n_layers": 1}),
        ({"hidden_size": 32}, {"emb_dim": 32}),
        ({"max_position_embeddings": 16}, {"context_length": 16}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"activation_function": "gelu_fast"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"layer_norm_epsilon": 1e-6}, {"norm_eps": 1e-6}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_layer": True}),
        ({"reorder_and_upcast_attn": True}, {}),
        (
            {"n_ctx": 64, "id2label": {"0": "no"}, "_name_or_path": "x", "torch_dtype": "float16"},
            {},
        ),
    ],
    ids=str,
)
def test_a_hugging_face_key_means_what_it_means_in_transformers(changes, expected):
    cfg, usual = (GPTConfig.from_dict(huggingface(**c)) for c in (changes, {}))
    assert cfg == dataclasses.replace(usual, **expected)


def test_a_hugging_face_config_may_consist_of_aliases_alone():
    values = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
    cfg = GPTConfig.from_dict(values)
    assert (cfg.emb_dim, cfg.n_heads, cfg.n_layers, cfg.tie_embeddings) == (48, 6, 2, True)


@pytest.mark.parametrize("key", ["rope_theta", "n_experts", "sliding_window", "auto_map"])
def test_an_unknown_hugging_face_key_is_reported(key):
    with pytest.warns(UserWarning, match=f"config.json has {key}, unknown to flaxgpt"):
        GPTConfig.from_dict(huggingface(**{key: 2}))


# Guessing by folder names


def test_a_model_folder_that_also_has_checkpoints_is_a_model(tmp_path):
    (copy(HF, tmp_path) / "checkpoints").mkdir()
    assert flaxgpt.load(tmp_path)[0] == golden.model("hf-small")[0]
    (tmp_path / "model").mkdir()
    assert flaxgpt.load(tmp_path)[0] == golden.model("hf-small")[0]


def test_a_folder_of_models_names_them(tmp_path):
    for name in ("checkpoint-500", "checkpoint-1000"):
        copy(HF, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"such as checkpoint-1000, checkpoint-500 in it"):
        flaxgpt.load(tmp_path)


# The memory layout of arrays on their way to a file


def strided(values):
    return np.repeat(np.asarray(values), 2, axis=0)[::2]


@pytest.mark.parametrize(
    "change",
    [
        strided,
        np.asfortranarray,
        lambda values: np.asarray(values)[..., ::-1][..., ::-1],
        lambda values: np.asarray(values).astype(">f4"),
        lambda values: np.asarray(values).astype(np.float64),
        lambda values: np.broadcast_to(np.asarray(values)[None], (2, *values.shape))[1],
    ],
    ids=["strided", "fortran", "reversed", "big-endian", "float64", "broadcast"],
)
@pytest.mark.parametrize("layout", ["huggingface", "book"])
@pytest.mark.parametrize("name", ["hf-small", "book-qkv-bias"])
def test_the_memory_layout_of_parameters_does_not_reach_the_file(name, layout, change, tmp_path):
    cfg, params, _ = golden.model(name)
    flaxgpt.save(tmp_path / "m", cfg, jax.tree.map(change, params), layout=layout)
    jax.tree.map(np.testing.assert_array_equal, flaxgpt.load(tmp_path / "m")[1], params)
    if layout == "book" and cfg.tie_embeddings:
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        np.testing.assert_array_equal(tensors["out_head.weight"], params["tok_emb"]["weight"])


# What transformers 5.24 writes for `GPT2Config`s with random values, and how it reads that itself
CONFIGS = json.loads((golden.FOLDER / "huggingface_configs.json").read_text())
MEANING = {  # of the fields of GPT2Config
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "layer_norm_epsilon": "norm_eps",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_layer",
    "tie_word_embeddings": "tie_embeddings",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"
)


@pytest.mark.parametrize("case", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_of_transformers_has_its_meaning_or_is_refused_by_name(case):
    meaning = case["meaning"]
    refused = {
        "activation_function": meaning["activation_function"] not in ACTIVATIONS,
        "n_inner": meaning["n_inner"] not in (None, 4 * meaning["n_embd"]),
        "scale_attn_weights": not meaning["scale_attn_weights"],
        "add_cross_attention": meaning["add_cross_attention"],
    }
    names = [name for name, is_refused in refused.items() if is_refused]
    if names:
        with pytest.raises(ValueError, match="|".join(names)):
            GPTConfig.from_dict(case["config"])
        return
    cfg = GPTConfig.from_dict(case["config"])
    assert {key: getattr(cfg, ours) for key, ours in MEANING.items()} == {
        key: meaning[key] for key in MEANING
    }
    assert cfg.activation == ACTIVATIONS[meaning["activation_function"]]
    assert cfg.drop_rates == tuple(meaning[f"{place}_pdrop"] for place in ("embd", "attn", "resid"))
    assert cfg.qkv_bias and cfg.bias


# Files that an editor on Windows has saved with a byte-order mark


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_byte_order_mark_in_a_models_json_is_ignored(name, tmp_path):
    folder = shutil.copytree(HF, tmp_path / "m")
    (folder / name).write_text((HF / name).read_text(), encoding="utf-8-sig")
    assert flaxgpt.load(folder)[0] == golden.model("hf-small")[0]
