"""`flaxgpt train` and `flaxgpt eval` as their users meet them: processes."""

import json
import math
import os
import pty
import signal
import subprocess

import numpy as np
import pytest

import flaxgpt
import golden
from command import COMMAND, QUICK, assert_refused, call, run
from flaxgpt.evaluation import measure

VERDICT = golden.DATA / "verdict" / "the-verdict.txt"
SMALL = (
    *("--emb-dim", 16, "--n-heads", 2, "--n-layers", 1, "--context-length", 16),
    *("--batch-size", 4, "--warmup-steps", 2, "--steps-per-call", 5),
    *("--sample-every", 0),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ten steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ("--steps", 10, "--eval-every", 5, "--sample-every", 10, "--sample-tokens", 5)
    return out, run("train", "--data", VERDICT, "--out", out, *SMALL, *options)


def test_it_trains_on_a_file_and_prints_where_the_model_is(trained):
    out, process = trained
    assert process.returncode == 0, process.stderr
    assert process.stdout.decode() == f"{out / 'model'}\n"
    told = process.stderr.decode()
    for part in ("compiled 5 steps", "step 10/10  loss", "validation", "sample", "saved"):
        assert part in told
    assert "Warning" not in told and "Traceback" not in told


def test_options_override_the_preset_and_the_vocabulary_is_the_texts(trained):
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["emb_dim"] == 16
    assert config["model"]["vocab_size"] == len(set(VERDICT.read_text(encoding="utf-8")))
    assert config["training"]["beta2"] == 0.99  # of the preset shakespeare-char
    assert config["training"]["data"] == [str(VERDICT)]


def test_the_folder_of_a_run_alone_makes_it_go_on(trained):
    out, _ = trained
    process = run("train", "--init-from", out, "--steps", 15)
    assert process.returncode == 0, process.stderr
    told = process.stderr.decode()
    assert "step 15/15" in told and "step 5/15" not in told
    assert b"refused" not in process.stderr
    assert_refused(
        call("train", "--init-from", out, "--emb-dim", 32), "cannot go on with emb_dim=32 (was 16)"
    )


def test_eval_measures_a_model_on_a_text(trained):
    out, _ = trained
    process = run("eval", "--model", out, "--data", VERDICT, "--stride", 4)
    assert process.returncode == 0, process.stderr
    cfg, params, tokenizer = flaxgpt.load(out)
    ids = np.array(tokenizer.encode(VERDICT.read_text(encoding="utf-8")))
    found = measure(cfg, params, ids, stride=4, tokenizer=tokenizer)
    loss, perplexity, bits, rest = process.stdout.decode().splitlines()
    assert math.isclose(float(loss.split()[1]), found.loss, abs_tol=1e-4)
    assert math.isclose(float(perplexity.split()[1]), found.perplexity, abs_tol=1e-2)
    assert math.isclose(float(bits.split()[3]), found.bits_per_byte, abs_tol=1e-4)
    assert rest == (
        f"{found.tokens} tokens ({found.bytes} bytes) in {found.windows} windows of 16, stride 4"
    )


def test_fine_tuning_takes_the_models_shape_and_a_recipe_of_its_own(trained, tmp_path):
    out = tmp_path / "tuned"
    process = run(
        *("train", "--init-from", trained[0] / "model", "--data", VERDICT, "--out", out),
        *("--steps", 3, "--learning-rate", 3e-5, "--sample-every", 0),
    )
    assert process.returncode == 0, process.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["emb_dim"] == 16
    assert config["training"]["batch_size"] == 4
    assert (config["training"]["learning_rate"], config["training"]["warmup_steps"]) == (3e-5, 0)
    assert "step 0/3  validation" in process.stderr.decode()


def test_a_run_goes_on_however_its_folder_is_spelled(trained):
    out, _ = trained
    process = call("train", "--init-from", f"{out}/", "--out", out, "--learning-rate", "nan")
    assert_refused(process, "learning_rate=nan must be a finite number")
    process = call("train", "--init-from", f"{out}/", "--out", out, "--batch-size", 5)
    assert_refused(process, "cannot go on with batch_size=5 (was 4)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", VERDICT], "no --out: give the folder"),
        (["train", "--data", VERDICT, "--out", "new", "--learning-rate", "0"], "learning_rate=0.0"),
        (["train", "--data", VERDICT, "--out", "new", "--learning-rte", "1"], "--learning-rte"),
        (
            ["train", "--out", "new", "--preset", "gpt-2"],
            "no training preset 'gpt-2': did you mean",
        ),
        (["train", "--data", VERDICT, "--out", "new", "--vocab-size", "9"], "vocab_size=9"),
        (["train", "--data", VERDICT, "--out", VERDICT], "is in use"),
        (["train", "--init-from", "no/where", "--data", "x", "--out", "new"], "no/where"),
        (["eval", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["eval", "--data", VERDICT, "--stride", "0"], "--stride=0 must be a whole number"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*arguments), message)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_says_so_and_exits_130(tmp_path):
    out = tmp_path / "run"
    endless = (*SMALL, "--steps", 10**6, "--eval-every", 10**6, "--save-every", 10**6)
    # A shell's background job has SIGINT ignored, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "train", "--data", str(VERDICT), "--out", str(out), *map(str, endless)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=QUICK,
    )
    signal.signal(signal.SIGINT, before)
    for line in process.stderr:
        if b"loss" in line:
            break
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == b""
    assert b"Traceback" not in told
    (saved,) = (out / "checkpoints").iterdir()
    assert f"step {saved.name}/1000000  checkpoint saved" in told.decode()


def test_on_a_terminal_a_bar_moves(tmp_path):
    out = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, ("train", "--data", VERDICT, "--out", out, *SMALL, "--steps", 20))],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=QUICK | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # what Linux answers when the other side has closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert printed.decode() == f"{out / 'model'}\n"
    assert "━" in shown.decode() and "20/20" in shown.decode()
