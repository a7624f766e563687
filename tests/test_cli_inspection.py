"""`flaxgpt params` and `flaxgpt plot`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxgpt
from command import assert_refused, both_ways, call
from flaxgpt import GPTConfig
from flaxgpt.cli.params import ParamsCommand, parse_size
from flaxgpt.tokenizer import CharTokenizer

CFG = GPTConfig(vocab_size=26, context_length=16, emb_dim=16, n_heads=2, n_layers=2)


@pytest.fixture(scope="module")
def model():
    return flaxgpt.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A saved model with a vocabulary of 26 letters."""
    path = tmp_path_factory.mktemp("models") / "letters"
    flaxgpt.save(path, CFG, model, tokenizer=CharTokenizer("abcdefghijklmnopqrstuvwxyz"))
    return path


def printed(*arguments, start=call):
    process = start("params", *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stderr == b""
    return process.stdout.decode()


def read_json(*arguments):
    return json.loads(printed(*arguments, "--json"))


@both_ways
def test_the_blocks_of_a_preset_are_listed_once(start):
    text = printed("gpt2-xl", "--flops", "--length", 1024, "--memory", start=start)
    for part in (
        "trf_blocks_0 to 47, each",
        "W_query",
        "1600 x 1600",
        "total 1,557,611,200 parameters, 5.80 GiB float32",
        "with a separate head 1,638,022,400",
        "FLOPs, 1 x 1024 ids",
        "without scores (as in the book)",
        "memory, 1 x 1024 ids",
        "KV cache",
    ):
        assert part in text
    assert len(text.splitlines()) < 65


def test_depth_limits_the_tree():
    text = printed("gpt2", "--depth", 1)
    assert "trf_blocks_0" in text and "W_query" not in text and "att" not in text.split()


@both_ways
def test_the_statistics_of_a_model_are_listed(start, folder, model):
    rows = {row["path"]: row for row in read_json(folder)["parameters"]}
    weight = np.asarray(model["trf_blocks_1"]["ff"]["layers_0"]["weight"], np.float64)
    row = rows["trf_blocks_1/ff/layers_0/weight"]
    assert (row["shape"], row["dtype"], row["count"]) == ([64, 16], "float32", 1024)
    assert row["bytes"] == 4096
    np.testing.assert_allclose(
        [row["mean"], row["std"], row["norm"]],
        [weight.mean(), weight.std(), np.linalg.norm(weight)],
        rtol=1e-9,
    )
    assert row["faults"] == []
    assert rows["final_norm/shift"]["faults"] == ["all zero"]
    assert "all zero" in printed(folder, start=start)


def test_nan_and_infinite_values_are_flagged(model, tmp_path):
    broken = jax.tree.map(lambda x: x, model)
    weight = broken["trf_blocks_0"]["att"]["W_key"]["weight"]
    broken["trf_blocks_0"]["att"]["W_key"]["weight"] = (
        weight.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[1, 2].set(-jnp.inf)
    )
    flaxgpt.save(tmp_path / "broken", CFG, broken)
    rows = {row["path"]: row for row in read_json(tmp_path / "broken")["parameters"]}
    row = rows["trf_blocks_0/att/W_key/weight"]
    assert (row["nan"], row["inf"], row["faults"]) == (1, 2, ["1 NaN", "2 Inf"])
    assert "1 NaN, 2 Inf" in printed(tmp_path / "broken")


def test_json_has_the_documented_keys():
    values = read_json("gpt2", "--flops", "--memory", "--batch", 2, "--length", 512)
    assert list(values) == ["model", "config", "count", "parameters", "flops", "memory"]
    assert values["config"] == GPTConfig.preset("gpt2").to_dict()
    assert values["count"] == flaxgpt.count_params(GPTConfig.preset("gpt2")).to_dict()
    assert len(values["parameters"]) == 4 + 12 * 16
    assert sum(row["count"] for row in values["parameters"]) == values["count"]["total"]
    for row in values["parameters"]:
        assert list(row) == ["path", "shape", "dtype", "count", "bytes"]
        assert np.prod(row["shape"]) == row["count"]
    assert (values["flops"]["batch"], values["flops"]["length"]) == (2, 512)
    assert values["flops"]["forward"] == flaxgpt.flops(GPTConfig.preset("gpt2"), 2, 512).forward
    assert all(isinstance(n, int) for n in values["memory"].values())


@pytest.mark.parametrize("sort", ["count", "name"])
def test_arrays_can_be_sorted(sort):
    lines = [line for line in printed("gpt2", "--sort", sort).splitlines() if "float32" in line]
    names = [line.split()[0] for line in lines if "/" in line.split()[0]]
    assert len(names) == 4 + 12 * 16
    if sort == "name":
        assert names == sorted(names)
    else:
        assert names[:2] == ["tok_emb/weight", "trf_blocks_0/ff/layers_0/weight"]


def test_differences_are_listed_by_name(folder, model, tmp_path):
    changed = jax.tree.map(lambda x: x, model)
    weight = changed["trf_blocks_0"]["ff"]["layers_2"]["weight"]
    changed["trf_blocks_0"]["ff"]["layers_2"]["weight"] = weight.at[3, 4].add(0.5)
    flaxgpt.save(tmp_path / "changed", CFG, changed)
    (item,) = read_json(folder, "--diff", tmp_path / "changed")["differences"]
    assert (item["name"], item["kind"]) == ("trf_blocks_0/ff/layers_2/weight", "values")
    assert item["changed"] == 1 and abs(item["largest"] - 0.5) < 1e-6
    assert "trf_blocks_0/ff/layers_2/weight" in printed(folder, "--diff", tmp_path / "changed")
    assert printed(folder, "--diff", folder).endswith("float32\nthe parameters are equal\n")


def test_the_precision_of_a_file_is_shown(folder, model, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    flaxgpt.save(tmp_path / "half", CFG, half, layout="book")
    values = read_json(tmp_path / "half")
    assert values["stored"] == {"bfloat16": 2 * values["count"]["total"]}
    assert {row["dtype"] for row in values["parameters"]} == {"float32"}
    assert "(14.81 KiB bfloat16 in the file)" in printed(tmp_path / "half")
    assert "in the file" not in printed(folder)
    arguments = folder, "--diff", tmp_path / "half"
    text = printed(*arguments)
    assert f"A: {folder}, stored as float32\n" in text
    assert f"B: {tmp_path / 'half'}, stored as bfloat16\n" in text
    assert [list(stored) for stored in read_json(*arguments)["stored"]] == [
        ["float32"],
        ["bfloat16"],
    ]


def test_half_precision_needs_less_memory():
    whole = read_json("gpt2", "--memory")["memory"]
    half = read_json("gpt2", "--memory", "--dtype", "bfloat16")["memory"]
    assert (half["weights"], half["kv_cache"]) == (whole["weights"], whole["kv_cache"] // 2)


@both_ways
def test_help_includes_the_examples(start):
    process = start("params", "--help")
    assert process.returncode == 0
    assert "flaxgpt params run --diff openai-community/gpt2" in process.stdout.decode()


def test_models_of_different_shapes_can_be_compared(folder, tmp_path):
    other = GPTConfig(
        vocab_size=26, context_length=8, emb_dim=16, n_heads=2, n_layers=1, qkv_bias=True
    )
    flaxgpt.save(tmp_path / "other", other, flaxgpt.init(other, jax.random.key(0)))
    values = read_json(folder, "--diff", tmp_path / "other")
    assert values["config"]["n_layers"] == [2, 1]
    kinds = {item["name"]: item["kind"] for item in values["differences"]}
    assert kinds["pos_emb/weight"] == "shape"
    assert kinds["trf_blocks_1/norm1/scale"] == "only in A"
    assert kinds["trf_blocks_0/att/W_key/bias"] == "only in B"


def test_the_largest_batches_are_listed_by_preset():
    fits = read_json("--fits", "16GB")["fits"]
    assert list(fits)[-1] == "gpt2-xl"
    for name, answer in fits.items():
        assert answer["generating"] >= answer["training_with_remat"] >= answer["training"], name
    assert fits["gpt2"]["training"] >= 1
    assert fits["gpt2-xl"]["training"] == 0  # 25 GB of weights, gradients and moments alone
    text = printed("gpt2", "--fits", "16GB", "--length", 128)
    assert "largest batch in 14.90 GiB" in text and "gpt2-xl" not in text


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16e9), ("500 mb", 5e8), ("15.9GiB", 15.9 * 2**30), (".5tb", 5e11)]
)
def test_sizes_can_have_decimal_and_binary_units(text, size):
    assert parse_size(text) == int(size)


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: give a preset (book-124M, "),
        (["gpt2", "--depth", "0"], "--depth=0 must be a whole number"),
        (["gpt2", "--flops", "--length", "1025"], "length=1025 exceeds context_length=1024"),
        (["gpt2", "--diff", "tales"], "gpt2 is a preset without weights"),
        (["no/where/at/all"], "no file or folder 'no/where/at/all'"),
        (["--fits", "16"], "--fits '16' must be a size such as 16GB"),
        (["--fits", "1e290GB"], "--fits '1e290GB' must be a size"),
        (["gpt2", "--sort", "size"], "--sort"),
        (
            ["gpt2", "--length", "8"],
            "--length has no effect without one of --flops, --memory, --fits",
        ),
        (
            ["gpt2", "--flops", "--dtype", "bfloat16"],
            "--dtype has no effect without one of --memory, --fits",
        ),
        (["tales", "--diff", "book", "--sort", "count"], "--sort has no effect with --diff"),
        (["--fits", "16GB", "--batch", "2"], "--batch has no effect without"),
        (["tales", "--diff", "book", "--length", "8"], "--length has no effect without"),
        (["--fits", "16GB", "--memory"], "--memory has no effect with --fits"),
        (["tales", "--fits", "16GB", "--diff", "book"], "--diff has no effect with --fits"),
        (["gpt2", "--json", "--depth", "1"], "--depth has no effect with --json"),
    ],
)
def test_invalid_input_to_params_gives_one_line(start, arguments, message):
    assert_refused(start("params", *arguments), message)


def test_a_narrow_terminal_shows_all_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    ParamsCommand("gpt2", depth=1).run()
    text = capsys.readouterr().out
    assert "38,597,376" in text and "float32" in text


# Plots


@both_ways
@pytest.mark.parametrize("kind", ["attention", "lens", "activations", "gradients", "shares"])
def test_each_kind_of_plot_is_written(start, kind, folder, tmp_path):
    out = tmp_path / "plot.png"
    text = [] if kind == "shares" else ["thecatsat"]
    process = start("plot", kind, *text, "--model", folder, "--out", out)
    assert process.returncode == 0, process.stderr
    assert process.stdout.decode() == f"{out}\n"
    assert process.stderr == b""
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "no text: give an input text"),
        (["attention", "abc", "--out", "a.pdf"], "--out a.pdf must end in .png"),
        (["attention", "abc", "--out", "no/where.png"], "there is no folder no"),
        (["attention", "abc", "--block", "2"], "has 2 blocks"),
        (["attention", "ABC"], "'A'"),
        (["lens", "a" * 17], "the text has 17 tokens, but"),
        (["lens", "abc", "--block", "1"], "--block has no effect on lens"),
        (["shares", "abc"], "shares plots the presets and takes no text"),
        (["lens", "abc", "--out", "."], "--out . is a folder: give the path of a .png file"),
        (["heads", "abc"], "heads"),
    ],
)
def test_invalid_input_to_plot_gives_one_line(
    start, arguments, message, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_refused(start("plot", *arguments, "--model", folder), message)
    assert not list(tmp_path.iterdir())
