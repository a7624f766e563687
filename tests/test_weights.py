"""Loading and saving models in both layouts, and the errors for files that cannot be read."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import flaxgpt
import golden
from flaxgpt import GPTConfig, forward, load, save
from flaxgpt.model import param_shapes
from flaxgpt.tokenizer import CharTokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning
from flaxgpt.weights.book import BOOK
from flaxgpt.weights.table import export

HF = golden.FOLDER / "hf-small"
SMALL = golden.FOLDER / "book-small"
BIAS = golden.FOLDER / "book-qkv-bias"

Tensors = dict[str, np.ndarray]


def write(folder: Path, tensors: Tensors, config: Any, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def random_params(cfg: GPTConfig, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        return random.standard_normal(leaf.shape, np.float32) * np.float32(0.02)

    return jax.tree.map(draw, param_shapes(cfg))


def assert_same_bits(actual: Any, expected: Any) -> None:
    found, wanted = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert leaf.dtype == np.float32
        assert np.asarray(leaf).tobytes() == np.asarray(wanted[path]).tobytes(), path


# Loading the golden folders and variants of them


@pytest.mark.parametrize("name", ["hf-small", "book-small", "book-qkv-bias"])
def test_a_loaded_model_computes_the_logits_of_pytorch(name: str) -> None:
    cfg, params, expected = golden.model(name)
    golden.assert_logits_agree(forward(cfg, params, expected["input_ids"]), expected["logits"])


@pytest.mark.parametrize("name", ["book-small", "book-qkv-bias"])
def test_a_loaded_model_computes_the_gradients_of_pytorch(name: str) -> None:
    cfg, params, expected = golden.model(name)
    targets = jnp.asarray(expected["targets"], jnp.int32)[..., None]

    @jax.value_and_grad
    def gradient(params: Any) -> jax.Array:
        logs = jax.nn.log_softmax(forward(cfg, params, expected["input_ids"]))
        return -jnp.take_along_axis(logs, targets, axis=-1).mean()

    loss, grads = jax.jit(gradient)(params)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    named = export(BOOK, cfg, grads)
    assert {f"grad/{name}" for name in named} == {k for k in expected if k.startswith("grad/")}
    for name, actual in named.items():
        wanted = expected[f"grad/{name}"]
        # Rounding accumulates over the batch and the layers: 5e-6 of a tensor's norm is observed
        # and 1e-4 allowed. The gradient of the key bias is zero, because it shifts all scores of a
        # query equally: only rounding remains, 1e-7, while the smallest other norm is 0.04.
        allowed = 1e-4 * np.linalg.norm(wanted) + 1e-6
        assert np.linalg.norm(actual - wanted) <= allowed, name


def test_shards_with_an_index_load_as_one_model(tmp_path: Path) -> None:
    tensors, config = read(HF)
    names, files = sorted(tensors), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = dict(zip(files, [names[:9], names[9:]], strict=True))
    for file, part in parts.items():
        write(tmp_path, {name: tensors[name] for name in part}, config, file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_bits(load(tmp_path)[1], load(HF)[1])

    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"does not have {files[1]}, which model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is damaged: expected JSON with the file of each"),
        ('{"weight_map": []}', "index.json is damaged"),
        ('{"weight_map": {}}', r"index.json lists \[\]: expected .safetensors files in its folder"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"lists \['../x.safetensors'\]: expected"),
    ],
)
def test_a_damaged_index_is_reported(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_tensor_names_may_omit_the_transformer_prefix(tmp_path: Path) -> None:
    tensors, config = read(HF)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    assert_same_bits(load(write(tmp_path, bare, config))[1], load(HF)[1])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_saved_attention_masks_are_ignored(prefix: str, tmp_path: Path) -> None:
    tensors, config = read(HF)
    mask = np.tril(np.ones((1, 1, 64, 64), np.uint8))
    masks = {f"{prefix}h.{block}.attn.bias": mask for block in range(3)}
    low = np.array(-1e4, np.float32)
    masks |= {f"{prefix}h.{block}.attn.masked_bias": low for block in range(3)}
    everything = {n.removeprefix("transformer."): v for n, v in tensors.items()} | masks
    assert_same_bits(load(write(tmp_path, everything, config))[1], load(HF)[1])


def test_saved_masks_of_the_book_are_ignored(tmp_path: Path) -> None:
    tensors, config = read(SMALL)
    mask = np.triu(np.ones((32, 32), np.float32), 1)
    masks = {f"trf_blocks.{block}.att.mask": mask for block in range(3)}
    assert_same_bits(load(write(tmp_path, tensors | masks, config))[1], load(SMALL)[1])


def test_a_single_file_loads_with_the_config_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, *read(SMALL), name="epoch-7.safetensors")
    assert_same_bits(load(tmp_path / "epoch-7.safetensors")[1], load(SMALL)[1])


def test_tensor_names_determine_the_layout_whatever_the_config(tmp_path: Path) -> None:
    tensors, _ = read(HF)
    cfg, params, _ = load(write(tmp_path, tensors, load(HF)[0].to_dict()))
    assert cfg == load(HF)[0]
    assert_same_bits(params, load(HF)[1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_point_types_are_converted_to_float32(dtype: Any, tmp_path: Path) -> None:
    tensors, config = read(HF)
    narrow = {name: value.astype(dtype) for name, value in tensors.items()}
    _, params, _ = load(write(tmp_path / "narrow", narrow, config))
    wide = {name: value.astype(np.float32) for name, value in narrow.items()}
    assert_same_bits(params, load(write(tmp_path / "wide", wide, config))[1])


def test_a_tied_model_may_store_a_head_equal_to_its_embedding(tmp_path: Path) -> None:
    tensors, config = read(HF)
    head = {"lm_head.weight": tensors["transformer.wte.weight"]}
    assert_same_bits(load(write(tmp_path, tensors | head, config))[1], load(HF)[1])


def test_a_tied_model_with_a_head_that_differs_from_its_embedding_is_an_error(
    tmp_path: Path,
) -> None:
    tensors, config = read(HF)
    head = {"lm_head.weight": tensors["transformer.wte.weight"] * 2}
    folder = write(tmp_path, tensors | head, config)
    message = r'lm_head.weight differs from the token embedding, .*"tie_word_embeddings" to false'
    with pytest.raises(ValueError, match=message):
        load(folder)
    cfg, params, _ = load(write(tmp_path, tensors | head, config | {"tie_word_embeddings": False}))
    assert not cfg.tie_embeddings
    np.testing.assert_array_equal(params["out_head"]["weight"], head["lm_head.weight"])


def test_an_untied_model_requires_a_head(tmp_path: Path) -> None:
    tensors, config = read(HF)
    folder = write(tmp_path, tensors, config | {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"tie_embeddings=False .*: missing lm_head.weight\."):
        load(folder)


def test_a_model_without_a_tokenizer_gets_gpt2s_if_its_vocabulary_size_matches(
    tmp_path: Path,
) -> None:
    cfg = GPTConfig(50257, 8, 8, 1, 1)
    params = random_params(cfg)
    save(tmp_path / "without", cfg, params)
    assert load(tmp_path / "without")[2] is flaxgpt.load_tokenizer("gpt2")
    save(tmp_path / "with", cfg, params, tokenizer=CharTokenizer("abc"))
    assert load(tmp_path / "with")[2] == CharTokenizer("abc")
    assert load(HF)[2] is None


def test_book_loads_the_untrained_model_of_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing 163 million numbers takes seconds, and test_book.py covers it.
    monkeypatch.setattr(
        "flaxgpt.weights.loading.book_params", lambda cfg, progress: (cfg, progress)
    )
    cfg, drawn, tokenizer = load("book", progress=print)
    assert drawn == (GPTConfig.preset("book-124M"), print)
    assert cfg == GPTConfig.preset("book-124M")
    assert tokenizer is flaxgpt.load_tokenizer("gpt2")


def test_progress_reaches_the_number_of_parameters() -> None:
    calls: list[tuple[int, int]] = []
    _, params, _ = load(HF, progress=lambda done, total: calls.append((done, total)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)
    assert len(calls) == len(load_file(HF / "model.safetensors"))


# Saving


@st.composite
def models(draw: st.DrawFn) -> tuple[GPTConfig, dict[str, Any]]:
    heads = draw(st.integers(1, 3))
    rate = st.sampled_from([0.0, 0.1, 0.25])
    cfg = GPTConfig(
        vocab_size=draw(st.integers(1, 9)),
        context_length=draw(st.integers(1, 5)),
        emb_dim=heads * draw(st.integers(1, 4)),
        n_heads=heads,
        n_layers=draw(st.integers(1, 11)),
        qkv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        drop_rate_emb=draw(rate),
        drop_rate_attn=draw(rate),
        drop_rate_shortcut=draw(rate),
    )
    random = np.random.default_rng(draw(st.integers(0, 99)))

    def any_bits(leaf: Any) -> np.ndarray:  # includes NaN, infinities and -0.0
        return random.integers(0, 2**32, leaf.shape, np.uint32).view(np.float32)

    return cfg, jax.tree.map(any_bits, param_shapes(cfg))


@pytest.mark.parametrize("layout", ["huggingface", "book"])
@given(model=models())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_saved_model_loads_bit_for_bit(
    layout: Any, tmp_path: Path, model: tuple[GPTConfig, dict[str, Any]]
) -> None:
    cfg, params = model
    save(tmp_path / "model", cfg, params, layout=layout)
    read_cfg, read_params, _ = load(tmp_path / "model")
    # Hugging Face's config has the three rates in force, so the defaults behind them may differ.
    rates = {"drop_rate": 0.0, "drop_rate_emb": None, "drop_rate_attn": None}
    rates |= {"drop_rate_shortcut": None}
    assert read_cfg.drop_rates == cfg.drop_rates
    assert dataclasses.replace(read_cfg, **rates) == dataclasses.replace(cfg, **rates)
    assert_same_bits(read_params, params)


def test_saving_a_golden_model_reproduces_its_tensors(tmp_path: Path) -> None:
    for folder, layout in ((HF, "huggingface"), (SMALL, "book"), (BIAS, "book")):
        cfg, params, _ = load(folder)
        save(tmp_path / "model", cfg, params, layout=layout)  # type: ignore[arg-type]
        written, original = load_file(tmp_path / "model" / "model.safetensors"), read(folder)[0]
        assert written.keys() == original.keys()
        for name, value in written.items():
            np.testing.assert_array_equal(value, original[name], err_msg=name)


def test_only_the_layout_of_the_book_stores_the_head_of_a_tied_model(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    save(tmp_path / "book", cfg, params, layout="book")
    save(tmp_path / "hf", cfg, params)
    head = read(tmp_path / "book")[0]["out_head.weight"]
    np.testing.assert_array_equal(head, params["tok_emb"]["weight"])
    assert "lm_head.weight" not in read(tmp_path / "hf")[0]


def test_hugging_faces_layout_stores_zeros_for_a_missing_qkv_bias(tmp_path: Path) -> None:
    cfg, params, _ = load(SMALL)
    save(tmp_path, cfg, params)
    tensors, config = read(tmp_path)
    assert config["qkv_bias"] is False
    assert not tensors["transformer.h.2.attn.c_attn.bias"].any()

    tensors["transformer.h.1.attn.c_attn.bias"][5] = 1e-30
    write(tmp_path, tensors, config)
    message = (
        r'transformer.h.1.attn.c_attn.bias is not all zeros, .*"qkv_bias": false; set it to tr'
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_hugging_faces_config_has_the_keys_of_transformers(tmp_path: Path) -> None:
    cfg = GPTConfig(50257, 8, 12, 3, 1, qkv_bias=True, drop_rate_attn=0.2, drop_rate=0.3)
    save(tmp_path, cfg, random_params(cfg))
    config = read(tmp_path)[1]
    assert config == {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.2,
        "bos_token_id": 50256,
        "embd_pdrop": 0.3,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": 12,
        "n_head": 3,
        "n_inner": None,
        "n_layer": 1,
        "n_positions": 8,
        "resid_pdrop": 0.3,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": False,
        "vocab_size": 50257,
    }
    header = (tmp_path / "model.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_the_config_of_a_small_vocabulary_has_no_end_of_text_id(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    save(tmp_path, cfg, params)
    assert read(tmp_path)[1]["eos_token_id"] is None


@pytest.mark.parametrize("layout", ["huggingface", "book"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_saved_unchanged(dtype: Any, layout: Any, tmp_path: Path) -> None:
    cfg, params, _ = load(SMALL)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save(tmp_path, cfg, narrow, layout=layout)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.6 * (SMALL / "model.safetensors").stat().st_size
    assert_same_bits(load(tmp_path)[1], jax.tree.map(lambda leaf: leaf.astype("float32"), narrow))


def test_numpy_float64_is_saved_as_float32(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    save(tmp_path, cfg, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
    assert {value.dtype for value in read(tmp_path)[0].values()} == {np.dtype(np.float32)}
    assert_same_bits(load(tmp_path)[1], params)


def test_fused_weights_of_different_dtypes_are_saved_as_float32(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    mixed = jax.tree.map(lambda leaf: leaf, params)
    key = mixed["trf_blocks_0"]["att"]["W_key"]
    key["weight"] = key["weight"].astype(jnp.bfloat16)
    save(tmp_path, cfg, mixed)
    key["weight"] = key["weight"].astype(jnp.float32)
    assert_same_bits(load(tmp_path)[1], mixed)


def test_saving_replaces_a_saved_model(tmp_path: Path) -> None:
    for folder in (HF, SMALL):
        cfg, params, _ = load(folder)
        save(tmp_path / "model", cfg, params, tokenizer=CharTokenizer("ab"))
    assert load(tmp_path / "model")[0].emb_dim == 48
    assert os.listdir(tmp_path) == ["model"]


def test_saving_replaces_a_model_saved_by_transformers(tmp_path: Path) -> None:
    names = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    names += ["vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"]
    for name in names:
        (tmp_path / name).touch()
    cfg, params, _ = load(HF)
    save(tmp_path, cfg, params)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_saving_into_a_folder_with_other_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    cfg, params, _ = load(HF)
    with pytest.raises(ValueError, match=r"also holds notes.md, which saving would delete: choose"):
        save(tmp_path, cfg, params)
    assert os.listdir(tmp_path) == ["notes.md"]


def test_saving_over_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    cfg, params, _ = load(HF)
    with pytest.raises(ValueError, match="model is a file: give the path of a folder"):
        save(tmp_path / "model", cfg, params)


def test_an_unknown_layout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown layout 'onnx': expected huggingface, book"):
        save(tmp_path, *load(HF)[:2], layout="onnx")  # type: ignore[arg-type]


def test_params_that_do_not_fit_are_an_error_before_anything_is_written(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    with pytest.raises(ValueError, match="unexpected trf_blocks_2/att/W_key/bias"):
        save(tmp_path / "model", dataclasses.replace(cfg, n_layers=2), params)
    assert not (tmp_path / "model").exists()


def test_integer_params_are_an_error(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    whole = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int8), params)
    with pytest.raises(ValueError, match="final_norm/scale is int8 instead of floating point"):
        save(tmp_path / "model", cfg, whole)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    save(tmp_path / "model", cfg, params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the file needs 700 kB
    try:
        with pytest.raises(OSError, match=r"model.*File too large"):
            save(tmp_path / "model", cfg, jax.tree.map(lambda leaf: leaf + 1, params))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_bits(load(tmp_path / "model")[1], params)
    assert os.listdir(tmp_path) == ["model"]


KILLED = """
import sys, numpy as np, jax
from flaxgpt import GPTConfig, save
from flaxgpt.model import param_shapes
cfg = GPTConfig(vocab_size=500, context_length=64, emb_dim=64, n_heads=4, n_layers=4)
for number in range(10**9):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, number, np.float32), param_shapes(cfg))
    save(sys.argv[1], cfg, params, layout=("huggingface", "book")[number % 2])
    if number == 0:
        print("going", flush=True)
"""


@pytest.mark.slow
def test_a_save_killed_at_any_point_leaves_a_model_that_loads(tmp_path: Path) -> None:
    for attempt in range(12):
        folder = tmp_path / str(attempt) / "model"
        command = [sys.executable, "-c", KILLED, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            time.sleep(0.1 + 0.007 * attempt)
            process.send_signal(signal.SIGKILL)
        _, params, _ = load(folder)
        values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        assert (values == values[0]).all()


# Folders and files that cannot be read


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    tensors, config = read(HF)
    del tensors["transformer.wpe.weight"]
    tensors["wte.scale"] = np.zeros((2, 64), np.float32)
    tensors["transformer.ln_f.bias"] = np.zeros(63, np.float32)
    tensors["transformer.ln_f.weight"] = np.ones(64, np.int32)
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, tensors, config))
    assert str(caught.value) == (
        f"the weights in {tmp_path / 'model.safetensors'} do not fit vocab_size=300, "
        "context_length=64, emb_dim=64, n_layers=3, bias=True, qkv_bias=True, "
        "tie_embeddings=True of config.json: missing transformer.wpe.weight; unexpected wte.scale; "
        "transformer.ln_f.bias has shape (63,) instead of (64,); transformer.ln_f.weight is I32 "
        "instead of floating point. Correct config.json, or get the weights that belong to it"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 5}, r"json: the weights have 3 blocks instead of n_layers=5\. Correct"),
        ({"n_layer": 2}, r"json: the weights have 3 blocks instead of n_layers=2\. Correct"),
        ({"vocab_size": 301}, r"wte.weight has shape \(300, 64\) instead of \(301, 64\)\. Correct"),
        ({"n_positions": 1024}, r"wpe.weight has shape \(64, 64\) instead of \(1024, 64\)\."),
        (
            {"n_embd": 128},
            r"emb_dim=128, .*c_attn.bias has shape \(192,\) .*\(384,\).*; and 32 more",
        ),
        (
            {"n_layer": 4, "n_positions": 9},
            r"have 3 blocks .*n_layers=4; transformer.wpe.weight has",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_an_error(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    tensors, config = read(HF)
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors, config | changes))


@pytest.mark.parametrize(
    ("folder", "switch", "message"),
    [
        (SMALL, True, r"qkv_bias=True.*: missing trf_blocks.0.att.W_key.bias; .*; and 1 more"),
        (BIAS, False, r"qkv_bias=False.*: unexpected trf_blocks.0.att.W_key.bias; "),
    ],
)
def test_a_wrong_qkv_bias_is_an_error(
    folder: Path, switch: bool, message: str, tmp_path: Path
) -> None:
    tensors, config = read(folder)
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors, config | {"qkv_bias": switch}))


def test_a_wrong_number_of_blocks_does_not_hide_other_faults(tmp_path: Path) -> None:
    tensors, config = read(HF)
    tensors["h.extra.9.weight"] = np.zeros((2, 64), np.float32)
    message = r"3 blocks instead of n_layers=2; unexpected h\.extra\.9\.weight\. Correct"
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors, config | {"n_layer": 2}))


def test_a_missing_block_in_the_middle_is_reported(tmp_path: Path) -> None:
    tensors, config = read(HF)
    rest = {name: value for name, value in tensors.items() if ".h.1." not in name}
    message = r"json: missing transformer.h.1.attn.c_attn.bias; .*; and 4 more"
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, rest, config))


def test_a_name_with_and_without_its_prefix_is_an_error(tmp_path: Path) -> None:
    tensors, config = read(HF)
    twice = tensors | {"wpe.weight": tensors["transformer.wpe.weight"]}
    with pytest.raises(
        ValueError, match=r"unexpected second (transformer\.)?wpe.weight in model.s"
    ):
        load(write(tmp_path, twice, config))


def test_unknown_tensor_names_are_shown_with_the_expected_ones(tmp_path: Path) -> None:
    tensors = {f"encoder.layer.{i}.weight": np.zeros(2, np.float32) for i in range(20)}
    message = (
        r"no GPT-2 weights .*Its tensors: encoder.layer.0.weight, .*, and 12 more. Expected "
        r"Hugging Face's \(transformer.wte.weight, .*\) or the book's \(tok_emb.weight, "
    )
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors, read(HF)[1]))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_the_error_for_a_pickle_shows_how_to_convert_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    with pytest.raises(ValueError, match="is a pickle, which can run arbitrary code") as caught:
        load(path)
    _, first, second = str(caught.value).splitlines()
    assert "torch.load(" in first and str(path) in first and "weights_only=True" in first
    assert "safetensors.torch.save_file(" in second
    assert str(tmp_path / "model.safetensors") in second


def test_a_folder_with_only_a_pickle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        load(tmp_path)


def test_a_file_that_is_not_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.npz").touch()
    with pytest.raises(ValueError, match=r"model.npz is not a .safetensors file: give one"):
        load(tmp_path / "model.npz")


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor model\.s"):
        load(tmp_path)


def test_a_folder_with_weights_of_another_name_suggests_the_file(tmp_path: Path) -> None:
    write(tmp_path, *read(SMALL), name="epoch-7.safetensors")
    message = r"no model.safetensors, but it has epoch-7.safetensors: give .*/epoch-7.safetensors'"
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path)


def test_weights_without_a_config_are_an_error(tmp_path: Path) -> None:
    shutil.copy(HF / "model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no config.json: expected"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n_embd": 64', "config.json is not valid JSON .*: copy or download it again"),
        ("\ufeff\x00", "config.json is not valid JSON"),
        ("[1, 2]", "config.json: a config must be a dict of settings, got list"),
        ('{"emb_size": 3}', r"config.json: unknown config keys \['emb_size'\]"),
        ('{"model_type": "llama"}', "config.json: the Hugging Face option model_type='llama'"),
        ('{"n_embd": null}', "config.json: "),
        ('{"n_embd": 64, "attn_pdrop": []}', "config.json: "),
    ],
)
def test_a_damaged_config_is_reported(text: str, message: str, tmp_path: Path) -> None:
    shutil.copy(HF / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def damaged(tmp_path: Path, data: bytes) -> Path:
    shutil.copy(HF / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="no header length"),
        pytest.param(lambda data: data[:100], id="cut in the header"),
        pytest.param(lambda data: data[:-1], id="last byte lost"),
        pytest.param(lambda data: data + b"\0", id="a byte too many"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="endless header"),
        pytest.param(lambda data: data[:8] + b"[" + data[9:], id="no JSON"),
        pytest.param(lambda data: data.replace(b"[0,", b"[9,", 1), id="wrong offset"),
        pytest.param(lambda data: data.replace(b'"F32"', b'"F16"', 1), id="wrong type"),
    ],
)
def test_a_truncated_or_modified_file_is_reported(damage: Any, tmp_path: Path) -> None:
    data = damage((HF / "model.safetensors").read_bytes())
    message = "model.safetensors is truncated or damaged .*: download or copy it again"
    with pytest.raises(ValueError, match=message):
        load(damaged(tmp_path, data))


@given(place=st.integers(0, 2500), byte=st.integers(0, 255), end=st.integers(0, 700_000))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_corrupted_file_loads_or_raises_value_error(
    place: int, byte: int, end: int, tmp_path: Path
) -> None:
    data = bytearray((HF / "model.safetensors").read_bytes()[: max(end, place + 1)])
    data[place] = byte
    try:
        load(damaged(tmp_path, bytes(data)))
    except ValueError as error:
        assert str(tmp_path) in str(error)


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"
    with pytest.raises(ValueError, match=r"is a Git LFS pointer .*: run `git lfs pull`"):
        load(damaged(tmp_path, pointer))


def test_a_file_replaced_while_it_is_read_is_detected(tmp_path: Path) -> None:
    cfg, params, _ = load(HF)
    save(tmp_path / "model", cfg, params)

    def meanwhile(done: int, total: int) -> None:
        if done < total:
            save(tmp_path / "model", cfg, params)

    with pytest.raises(
        ValueError, match="model was modified while it was being read: load it again"
    ):
        load(tmp_path / "model", progress=meanwhile)


# Hub names and paths


@pytest.mark.parametrize(
    "source",
    ["./x", "/no/such", "~/no-such", "a/b/c", "x/", "", "model.pth", "org/m.safetensors", "../no"],
)
def test_names_that_look_like_paths_are_not_sought_on_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flaxgpt.weights.source.fetch", lambda _: pytest.fail("contacted the hub"))
    for given_as in (source, Path("gpt3")):
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*: expected a model's"):
            load(given_as)


def test_a_folder_takes_precedence_over_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HF, tmp_path / "openai-community" / "gpt2")
    assert load("openai-community/gpt2")[0].vocab_size == 300


def hub_error(kind: str) -> Exception:
    # Without __init__, which requires a response object of the installed HTTP client.
    error = getattr(huggingface_hub.errors, kind)
    return error.__new__(error)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            "RepositoryNotFoundError",
            FileNotFoundError,
            "has no model of that name, .*check the spell",
        ),
        ("GatedRepoError", PermissionError, "is gated: request access on its page, then log in"),
        ("LocalEntryNotFoundError", ConnectionError, "could not be reached .*: check the network"),
    ],
)
def test_errors_of_the_hub_are_explained(
    raised: str, expected: type[OSError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise hub_error(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(expected, match=f"no file or folder 'org/name' here, .*{message}") as caught:
        load("org/name")
    assert type(caught.value.__cause__).__name__ == raised


def test_other_responses_of_the_hub_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        error = OSError("429 Too Many Requests\nsee the documentation")
        error.response = types.SimpleNamespace(status_code=429)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ConnectionError, match="responded with 429: 429 Too Many Requests; try ag"):
        load("org/name")


def test_a_preset_is_not_a_model() -> None:
    with pytest.raises(
        FileNotFoundError, match="'book-124M', and the preset of that name has no weights"
    ):
        load("book-124M")


def test_an_unreadable_tokenizer_is_a_warning(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.warns(UserWarning, match=r"no tokenizer: .*tokenizer.json: .*missing field"):
        cfg, params, tokenizer = load(tmp_path / "model")
    assert tokenizer is None
    assert forward(cfg, params, [[1, 2]]).shape == (1, 2, cfg.vocab_size)


def test_gpt2_is_not_assumed_if_the_folder_names_another_tokenizer(tmp_path: Path) -> None:
    cfg = GPTConfig(50257, 8, 8, 1, 1)
    save(tmp_path, cfg, random_params(cfg))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.warns(UnreadableTokenizerWarning, match="T5Tokenizer"):
        assert load(tmp_path)[2] is None


def test_offline_a_model_that_is_not_cached_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"'org/name' here, .*HF_HUB_OFFLINE is set: unset i"):
        load("org/name")


def test_a_full_disk_is_not_reported_as_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(OSError, match="No space left"):
        load("org/name")


def test_only_the_files_that_load_reads_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "merges.txt", "model.safetensors", "vocab.json", "tokenizer.json"]
    wanted += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    unwanted = ["64.tflite", "flax_model.msgpack", "pytorch_model.bin", "rust_model.ot"]
    unwanted += ["README.md", "onnx/config.json", "onnx/decoder.onnx", "coreml/model.safetensors"]
    taken: list[str] = []

    def download(model_id: str, **patterns: Any) -> str:
        assert model_id == "gpt2"
        taken.extend(filter_repo_objects(wanted + unwanted, **patterns))
        return str(HF)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("gpt2")[0].vocab_size == 300
    assert sorted(taken) == sorted(wanted)


def run(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_cached_model_loads_offline_and_folders_do_not_import_the_hub_client(
    tmp_path: Path,
) -> None:
    commit, model = "0123456789abcdef0123456789abcdef01234567", "models--gpt2-tiny--model"
    cache = tmp_path / "hub" / model
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HF / name, cache / "blobs" / f"blob-of-{name}")
        (cache / "snapshots" / commit / name).symlink_to(f"../../blobs/blob-of-{name}")
    code = (
        "import sys, flaxgpt\n"
        "flaxgpt.load(sys.argv[1])\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "print(flaxgpt.load('gpt2-tiny/model')[0].vocab_size)\n"
    )
    assert run(code, str(HF), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1") == "300\n"


# Memory

PEAK = """
import re, sys, jax, flaxgpt
def peak():  # getrusage starts at the parent process's peak
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
flaxgpt.load(sys.argv[2])
flaxgpt.load_tokenizer("gpt2")
before = peak()
_, params, _ = flaxgpt.load(sys.argv[1])
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def assert_peak_is_within_bound(tmp_path: Path, cfg: GPTConfig, layout: Any) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    save(tmp_path / "model", cfg, random_params(cfg), layout=layout)
    ratio = float(run(PEAK, str(tmp_path / "model"), str(HF), JAX_PLATFORMS="cpu"))
    # Measured: 1.01 to 1.11, and 1.24 if the file has the head of a tied model, which is compared
    # with the embedding. Reading all tensors at once takes 2.0. Below 1.0 the measurement is wrong.
    assert 0.95 < ratio < 1.3


@pytest.mark.parametrize("layout", ["huggingface", "book"])
def test_loading_needs_little_more_memory_than_the_weights(layout: Any, tmp_path: Path) -> None:
    cfg = GPTConfig(16000, 256, 512, 8, 4, qkv_bias=True)
    assert_peak_is_within_bound(tmp_path, cfg, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["huggingface", "book"])
@pytest.mark.parametrize("preset", ["gpt2", "book-124M"])
def test_loading_gpt2_needs_little_more_memory_than_the_weights(
    preset: str, layout: Any, tmp_path: Path
) -> None:
    assert_peak_is_within_bound(tmp_path, GPTConfig.preset(preset), layout)
