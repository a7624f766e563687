"""`flaxgpt shard`."""

import json

import pytest

import flaxgpt
from command import assert_refused, call, run
from flaxgpt import GPTConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = GPTConfig(
    vocab_size=27, context_length=16, emb_dim=16, n_heads=2, n_layers=2, tie_embeddings=True
)
SIZE = ("--batch", 8, "--length", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a vocabulary of odd size. Its weights are not needed."""
    path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(json.dumps(CFG.to_dict()))
    return path


def test_one_device_sends_nothing(folder):
    process = call("shard", folder, "--mesh", "data=1", *SIZE, "--json")
    assert process.returncode == 0, process.stderr
    values = json.loads(process.stdout)
    assert list(values) == [
        *("model", "config", "step", "platform", "mesh", "weights", "optimizer", "gradients"),
        *("arguments", "temporaries", "unsplit", "collectives", "peak", "received"),
    ]
    assert values["config"] == CFG.to_dict()
    assert values["step"] == {
        "batch": 8,
        "length": 8,
        "accumulate": 1,
        "optimizer": "adamw",
        "dtype": "float32",
        "remat": False,
    }
    assert values["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert values["weights"] == values["gradients"] == 4 * flaxgpt.count_params(CFG).total
    assert (values["collectives"], values["received"], values["unsplit"]) == ([], 0, [])


@pytest.mark.slow
def test_eight_devices_are_simulated(folder):
    process = run("shard", folder, "--mesh", "data=2, fsdp=2,tensor=2", *SIZE, "--json")
    assert (process.returncode, process.stderr) == (0, b"")
    values = json.loads(process.stdout)
    assert values["platform"] == "cpu"
    assert values["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert values["weights"] < 2 * flaxgpt.count_params(CFG).total
    assert values["received"] == sum(found["received"] for found in values["collectives"])
    assert values["unsplit"] == [
        {
            "path": "tok_emb/weight",
            "shape": [27, 16],
            "axis": "tensor",
            "reason": "27 is not a multiple of 2",
        }
    ]
    for found in values["collectives"]:
        assert list(found) == ["kind", "axes", "operations", "arrays", "bytes", "received"]
        assert set(found["axes"]) <= {"data", "fsdp", "tensor"}


@pytest.mark.slow
def test_the_cost_is_printed_as_tables(folder):
    options = ("--vocab-size", 33, "--n-layers", 3, "--accumulate", 2, "--optimizer", "muon")
    process = run("shard", folder, "--mesh", "tensor=4", *SIZE, *options)
    assert (process.returncode, process.stderr) == (0, b"")
    text = process.stdout.decode()
    for part in (
        "memory per device, tensor=4, 8 x 8 ids",
        "optimizer state",
        "received",
        "trf_blocks_0 to 2/att/W_query/weight",
        "2 heads are not a multiple of 4",
        "33 is not a multiple of 4",
        "compiled for 4 simulated CPU devices",
    ):
        assert part in text
    assert "trf_blocks_1" not in text
    # The result of a compilation that is read from the cache is the same.
    assert run("shard", folder, "--mesh", "tensor=4", *SIZE, *options).stdout == process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--mesh is missing"),
        (["--mesh", "two"], "the mesh 'two' must be sizes of data, fsdp, tensor"),
        (["--mesh", "data=2,model=2"], "unknown mesh axis 'model'"),
        (["--mesh", "data=-1"], "data=-1 must be a whole number, 1 or more"),
        (["--mesh", "data=4,fsdp=4"], "batch=8 must be a multiple of 16"),
        (["--mesh", "data=4", "--accumulate", "4"], "batch=8 must be a multiple of 16"),
        (["--mesh", "data=4,tensor=2", "--batch", "6"], "batch=6 must be a multiple of 4"),
        (["--mesh", "data=2", "--batch", "0"], "batch=0 must be a whole number"),
        (["--mesh", "data=2", "--accumulate", "0"], "accumulate=0 must be a whole number"),
        (["--mesh", "data=2", "--length", "17"], "length=17 exceeds context_length=16"),
        (["--mesh", "data=2", "--n-layers", "0"], "n_layers=0 must be a whole number"),
        (["--mesh", "data=2", "--optimizer", "sgd"], "--optimizer"),
        (["--mesh", "data=2", "--batch-size", "8"], "did you mean --batch?"),
    ],
)
def test_invalid_input_gives_one_line(folder, arguments, message):
    assert_refused(call("shard", folder, *arguments), message)


def test_an_unknown_model_gives_one_line():
    assert_refused(call("shard", "no/where/at/all", "--mesh", "data=2"), "no file or folder")
