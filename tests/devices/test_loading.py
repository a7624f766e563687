"""Loading parameters onto a mesh. tests/test_sharding.py runs this file on 8 devices."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_restore, to_bytes
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

import flaxgpt
import golden
from flaxgpt.model import param_shapes
from flaxgpt.weights import parts

HF, BOOK, NANOGPT, FLAX = (
    golden.FOLDER / name for name in ("hf-small", "book-small", "nanogpt-small", "hf-flax-msgpack")
)
EMBEDDING, BIAS = "transformer.wte.weight", "transformer.h.1.attn.c_attn.bias"


def write(folder, change=lambda tensors: tensors, source=HF, **settings):
    """Write a copy of a model with other tensors or settings."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(dtype):
    return lambda tensors: {name: values.astype(dtype) for name, values in tensors.items()}


def add_head(tensors):
    return tensors | {"lm_head.weight": tensors[EMBEDDING].copy()}


def in_two_files(folder):
    tensors = load_file(write(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {
        name: f"model-0000{1 + place % 2}-of-00002.safetensors"
        for place, name in enumerate(tensors)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without_qkv_bias(folder):
    cfg, params, _ = golden.model(BOOK.name)  # saved with zeros for the biases that it lacks
    flaxgpt.save(folder, cfg, params)
    return folder


def flax_with_a_head(folder):
    shutil.copytree(FLAX, folder)
    tree = msgpack_restore((FLAX / "flax_model.msgpack").read_bytes())
    tree["lm_head"] = {"kernel": tree["transformer"]["wte"]["embedding"].T}
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree))
    return folder


FOLDERS = {
    "Hugging Face": lambda folder: HF,
    "book": lambda folder: BOOK,
    "nanoGPT": lambda folder: NANOGPT,
    "Flax": lambda folder: FLAX,
    "Flax, with a head": flax_with_a_head,
    "bfloat16": lambda folder: write(folder, convert(ml_dtypes.bfloat16)),
    "float64": lambda folder: write(folder, convert(np.float64)),
    "a head": lambda folder: write(folder, add_head),
    "zero biases": without_qkv_bias,
    "two files": in_two_files,
}
MESHES = {"2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1), "1x1x4": (1, 1, 4)}


def assert_same_bits(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(bits, (a, b))), actual, expected)


def bits(leaf):
    return np.asarray(leaf).view(np.uint32)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param(
            kind,
            sizes,
            marks=() if (kind, name) == ("Hugging Face", "2x2x2") else pytest.mark.slow,
            id=f"{kind}, {name}",
        )
        for kind in FOLDERS
        for name, sizes in MESHES.items()
    ],
)
def test_parameters_have_the_bits_of_one_device_and_the_placement_of_the_rules(
    kind, sizes, tmp_path
):
    folder, mesh = FOLDERS[kind](tmp_path / "m"), flaxgpt.make_mesh(*sizes)
    cfg, params, _ = flaxgpt.load(folder, mesh=mesh)
    assert_same_bits(params, flaxgpt.load(folder)[1])
    wanted = flaxgpt.shard_rules(cfg).shardings(param_shapes(cfg), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == wanted


@pytest.mark.slow
def test_the_rules_given_are_followed():
    mesh = flaxgpt.make_mesh(1, 4, 2)
    rules = flaxgpt.shard_rules(golden.model(HF.name)[0])
    rules = rules.replace({"*pos_emb/weight": PartitionSpec(("fsdp", "tensor"))})
    _, params, _ = flaxgpt.load(HF, mesh=mesh, rules=rules)
    assert params["pos_emb"]["weight"].sharding.spec == PartitionSpec(("fsdp", "tensor"))
    assert_same_bits(params, golden.model(HF.name)[1])


@pytest.mark.slow
def test_a_mesh_with_explicit_axes_gives_parameters_on_automatic_axes():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    _, params, _ = flaxgpt.load(HF, mesh=mesh)
    for leaf in jax.tree.leaves(params):
        assert set(leaf.sharding.mesh.axis_types) == {AxisType.Auto}
    assert_same_bits(params, golden.model(HF.name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("folder", [HF, BOOK], ids=["Hugging Face", "book"])
def test_each_number_is_read_once_however_many_devices_hold_it(folder, sizes, monkeypatch):
    read, numbers = parts.read_part, []

    def record(tensor, part):
        values = read(tensor, part)
        numbers.append(values.size)
        return values

    monkeypatch.setattr(parts, "read_part", record)
    _, params, _ = flaxgpt.load(folder, mesh=flaxgpt.make_mesh(*sizes))
    assert sum(numbers) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_part_larger_than_a_chunk_is_read_in_several(monkeypatch):
    monkeypatch.setattr("flaxgpt.weights.tensors._CHUNK", 1000)
    for folder in (HF, BOOK):
        _, params, _ = flaxgpt.load(folder, mesh=flaxgpt.make_mesh(2, 2, 2))
        assert_same_bits(params, golden.model(folder.name)[1])


@pytest.mark.slow
def test_progress_is_that_of_one_device():
    calls = {None: [], flaxgpt.make_mesh(): []}
    for mesh, seen in calls.items():
        flaxgpt.load(HF, mesh=mesh, progress=lambda *numbers, seen=seen: seen.append(numbers))
    one, several = calls.values()
    assert one == several


@pytest.mark.slow
def test_the_model_of_the_book_is_split_too(monkeypatch):
    cfg = golden.model(BOOK.name)[0]
    monkeypatch.setattr("flaxgpt.weights.loading.read_config", lambda source: cfg)
    mesh = flaxgpt.make_mesh(2, 2, 2)
    _, params, _ = flaxgpt.load("book", mesh=mesh)
    assert_same_bits(params, flaxgpt.book_params(cfg))
    wanted = flaxgpt.shard_rules(cfg).shardings(param_shapes(cfg), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("place", [(0, 0), (299, 63)], ids=["first", "last"])
@pytest.mark.parametrize("value", [7.0, np.nan])
def test_a_head_that_differs_in_one_number_is_an_error(place, value, tmp_path):
    def change(tensors):
        tensors = add_head(tensors)
        tensors["lm_head.weight"][place] = value
        return tensors

    folder = write(tmp_path / "m", change)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the token embedding"):
        flaxgpt.load(folder, mesh=flaxgpt.make_mesh(2, 2, 2))


@pytest.mark.slow
def test_a_head_equals_its_embedding_if_both_have_the_same_nan(tmp_path):
    def change(tensors):
        tensors[EMBEDDING][5, 5] = np.nan
        return add_head(tensors)

    folder = write(tmp_path / "m", change)
    _, params, _ = flaxgpt.load(folder, mesh=flaxgpt.make_mesh(2, 2, 2))
    assert_same_bits(params, flaxgpt.load(folder)[1])


@pytest.mark.slow
def test_a_bias_left_out_that_is_not_zero_is_an_error(tmp_path):
    def change(tensors):
        tensors[BIAS][-1] = 1e-30
        return tensors

    folder = write(tmp_path / "m", change, source=without_qkv_bias(tmp_path / "zeros"))
    with pytest.raises(ValueError, match=rf"{BIAS} is not all zeros"):
        flaxgpt.load(folder, mesh=flaxgpt.make_mesh(2, 2, 2))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (lambda: 8, "mesh must be a jax.sharding.Mesh, .* got 8"),
        (lambda: Mesh(np.array(jax.devices()), ("x",)), "unknown mesh axis 'x'"),
    ],
    ids=["no mesh", "unknown axis"],
)
@pytest.mark.parametrize("source", ["/no/such/folder", "book"])
def test_a_mesh_that_does_not_fit_is_an_error_before_anything_is_read(source, mesh, message):
    with pytest.raises(ValueError, match=message):
        flaxgpt.load(source, mesh=mesh())


def test_rules_without_a_mesh_are_an_error():
    rules = flaxgpt.ShardRules((("*", PartitionSpec()),), 4)
    with pytest.raises(ValueError, match=r"there is no mesh: give one too, such as mesh=flaxgpt"):
        flaxgpt.load("/no/such/folder", rules=rules)


def test_a_rule_that_does_not_fit_is_an_error_before_the_weights_are_read(tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"damaged")
    rules = flaxgpt.ShardRules((("*", PartitionSpec(None, None, "fsdp")),), 4)
    with pytest.raises(ValueError, match=r"has more dimensions than"):
        flaxgpt.load(folder, mesh=flaxgpt.make_mesh(), rules=rules)


def run(code, *arguments, devices=8):
    """Start Python in another process with simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return text


# Print the peak memory of loading over the bytes that the devices hold in the end, and those bytes
# over the parameters'.
PEAK = """
import re, sys, jax, flaxgpt
def peak():  # getrusage starts at the parent process's peak
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
small, large, *sizes = sys.argv[1:]
mesh = flaxgpt.make_mesh(*map(int, sizes))
flaxgpt.load(small, mesh=mesh)
flaxgpt.load_tokenizer("gpt2")
before = peak()
cfg, params, _ = flaxgpt.load(large, mesh=mesh)
extra = peak() - before
shardings = flaxgpt.shard_rules(cfg).shardings(params, mesh)
for leaf, sharding in zip(*map(jax.tree.leaves, (params, shardings)), strict=True):
    for shard in leaf.addressable_shards:
        assert shard.data.shape == sharding.shard_shape(leaf.shape)
        assert leaf.ndim == 1 or 2 * shard.data.size <= leaf.size
leaves = jax.tree.leaves(params)
held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
print(extra / held, held / sum(leaf.nbytes for leaf in leaves))
"""


def save_random(folder, cfg, layout="huggingface"):
    random = np.random.default_rng(0)

    def draw(leaf):
        return random.standard_normal(leaf.shape, np.float32)

    flaxgpt.save(folder, cfg, jax.tree.map(draw, param_shapes(cfg)), layout=layout)
    return folder


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="only Linux shows the peak memory of a process, in /proc",
)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "layout", "most"),
    [("gpt2", "huggingface", 1.1), ("book-124M", "book", 1.1), ("gpt2", "book", 1.3)],
    ids=["Hugging Face", "book", "a head"],
)
def test_loading_gpt2_needs_little_more_memory_than_the_parts_of_the_devices(
    preset, layout, most, tmp_path
):
    folder = save_random(tmp_path / "m", flaxgpt.GPTConfig.preset(preset), layout)
    # The vocabulary is odd, so tensor=2 leaves two copies of the embedding.
    for sizes, copies in (((1, 8, 1), 1.01), ((1, 4, 2), 1.6)):
        peak, held = map(float, output(run(PEAK, HF, folder, *sizes)).split())
        # Measured: 1.01 to 1.02, and 1.19 to 1.22 if the file has the head of a tied model, which
        # is compared with the embedding. Below 0.95 the measurement is wrong.
        assert 0.95 < peak < most
        assert 1 <= held < copies


@needs_proc
@pytest.mark.slow
def test_the_host_never_holds_a_whole_parameter_besides_the_parts_of_the_devices(tmp_path):
    # Four fifths of the model is its embedding, of which each device holds columns.
    cfg = flaxgpt.GPTConfig(50257, 16, 1024, 8, 1, tie_embeddings=True)
    peak, _ = map(float, output(run(PEAK, HF, save_random(tmp_path / "m", cfg), 1, 8, 1)).split())
    # Measured: 1.02. A copy of the embedding, or all of it in memory mapped from the file: 1.6.
    assert 0.95 < peak < 1.2


TWO_PROCESSES = """
import sys, jax, numpy as np
port, number, folder, head, wrong = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
import flaxgpt
from flaxgpt.weights import parts
read, sizes = parts.read_part, []
parts.read_part = lambda tensor, part: (values := read(tensor, part), sizes.append(values.size))[0]
mesh = flaxgpt.make_mesh(1, 8, 1)
_, params, _ = flaxgpt.load(folder, mesh=mesh)
_, whole, _ = flaxgpt.load(folder)
held = 0
for leaf, expected in zip(*map(jax.tree.leaves, (params, whole)), strict=True):
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    held += leaf.size // (1 if leaf.is_fully_replicated else 2)
assert sum(sizes) == held
flaxgpt.load(head, mesh=mesh)
try:
    flaxgpt.load(wrong, mesh=mesh)
except ValueError as error:
    assert "differs from the token embedding" in str(error)
    print("refused")
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_its_half_and_both_refuse_a_head_that_differs(tmp_path):
    def change(tensors):
        tensors = add_head(tensors)
        tensors["lm_head.weight"][0, 0] += 1  # on a device of the first process
        return tensors

    folders = HF, write(tmp_path / "head", add_head), write(tmp_path / "wrong", change)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run(TWO_PROCESSES, port, number, *folders, devices=4) for number in range(2)]
    try:
        assert [output(process)[-8:] for process in processes] == ["refused\n"] * 2
    finally:
        for process in processes:
            process.kill()
