"""`flaxgpt train` and `flaxgpt eval`, most of them in this process to save time."""

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
from flaxgpt.cli.train import RecipeName, defaults
from flaxgpt.evaluation import evaluate_text
from flaxgpt.training.recipes import FINE_TUNING, RECIPES

VERDICT = golden.DATA / "verdict" / "the-verdict.txt"
SMALL = (
    *("--emb-dim", 16, "--n-heads", 2, "--n-layers", 1, "--context-length", 16),
    *("--batch-size", 4, "--warmup-steps", 2, "--steps-per-call", 5),
    *("--sample-every", 0),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def ten_steps(out):
    options = ("--steps", 10, "--eval-every", 5, "--sample-every", 10, "--sample-tokens", 5)
    return "train", "--data", VERDICT, "--out", out, *SMALL, *options


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ten steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, call(*ten_steps(out))


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process.stderr.decode()


def assert_complete(out, process):
    reported = succeeded(process)
    assert process.stdout.decode() == f"{out / 'model'}\n"
    for part in ("compiled 5 steps", "step 10/10  loss", "validation", "sample", "saved"):
        assert part in reported
    assert "Warning" not in reported and "Traceback" not in reported


def test_training_reports_progress_and_prints_the_folder_of_the_model(trained):
    assert_complete(*trained)


@pytest.mark.slow
def test_training_in_a_process_reports_the_same(tmp_path):
    assert_complete(tmp_path / "run", run(*ten_steps(tmp_path / "run")))


def test_options_override_the_recipe_and_the_vocabulary_fits_the_text(trained):
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["emb_dim"] == 16
    assert config["model"]["vocab_size"] == len(set(VERDICT.read_text(encoding="utf-8")))
    assert config["training"]["beta2"] == 0.99  # from the recipe shakespeare-char
    assert config["training"]["data"] == [str(VERDICT)]


def test_a_run_resumes_from_its_folder_alone(trained):
    out, _ = trained
    reported = succeeded(call("train", "--init-from", out, "--steps", 15))
    assert "step 15/15" in reported and "step 5/15" not in reported
    assert_refused(call("train", "--init-from", out, "--emb-dim", 32), "emb_dim=32 (was 16)")


def test_a_run_resumes_however_its_folder_is_spelled(trained):
    out, _ = trained
    process = call("train", "--init-from", f"{out}/", "--out", out, "--learning-rate", "nan")
    assert_refused(process, "learning_rate=nan must be a finite number")
    process = call("train", "--init-from", f"{out}/", "--out", out, "--batch-size", 5)
    assert_refused(process, "batch_size=5 (was 4)")


def test_eval_prints_the_evaluation_of_a_text(trained):
    out, _ = trained
    process = call("eval", "--model", out, "--data", VERDICT, "--stride", 4)
    succeeded(process)
    cfg, params, tokenizer = flaxgpt.load(out)
    ids = np.array(tokenizer.encode(VERDICT.read_text(encoding="utf-8")))
    found = evaluate_text(cfg, params, ids, stride=4, tokenizer=tokenizer)
    loss, perplexity, bits, rest = process.stdout.decode().splitlines()
    assert math.isclose(float(loss.split()[1]), found.loss, abs_tol=1e-4)
    assert math.isclose(float(perplexity.split()[1]), found.perplexity, abs_tol=1e-2)
    assert math.isclose(float(bits.split()[3]), found.bits_per_byte, abs_tol=1e-4)
    assert rest == (
        f"{found.tokens} tokens ({found.bytes} bytes) in {found.windows} windows of 16, stride 4"
    )


def test_fine_tuning_has_the_architecture_of_the_model_and_its_own_settings(trained, tmp_path):
    out = tmp_path / "tuned"
    process = call(
        *("train", "--init-from", trained[0] / "model", "--data", VERDICT, "--out", out),
        *("--steps", 3, "--learning-rate", 3e-5, "--sample-every", 0),
    )
    assert "step 0/3  validation" in succeeded(process)
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["emb_dim"] == 16
    assert config["training"]["batch_size"] == FINE_TUNING.batch_size
    assert config["training"]["learning_rate"] == 3e-5


def test_the_defaults_are_those_of_the_recipe():
    for name, (cfg, train_cfg) in RECIPES.items():
        for spelling in (["--recipe", name], [f"--recipe={name}"]):
            command = defaults(spelling)
            assert (command.cfg, command.train_cfg) == (cfg, train_cfg)
    assert defaults([]).cfg == RECIPES["shakespeare-char"][0]
    assert set(RECIPES) == set(RecipeName.__args__)


def test_a_model_to_start_from_changes_the_defaults():
    tales = defaults(["--init-from", "tales"])
    assert tales.cfg == RECIPES["tales"][0]
    assert (tales.train_cfg.steps, tales.train_cfg.init_from) == (FINE_TUNING.steps, "tales")
    recipe = defaults(["--init_from", "tales", "--recipe", "verdict"])  # underscores, as tyro
    assert recipe.cfg == RECIPES["tales"][0]
    assert (recipe.train_cfg.steps, recipe.train_cfg.tokenizer) == (90, "")
    book = defaults(["--init-from", "book", "--recipe", "verdict"])
    assert (book.cfg, book.train_cfg) == RECIPES["verdict"]


def test_a_run_to_resume_has_its_own_settings_as_defaults(trained):
    out, _ = trained
    resumed = defaults(["--init-from", str(out)])
    assert (resumed.out, resumed.train_cfg.batch_size, resumed.cfg.emb_dim) == (str(out), 4, 16)
    tuned = defaults(["--init-from", str(out), "--out", "elsewhere"])
    assert (tuned.train_cfg.steps, tuned.cfg.emb_dim) == (FINE_TUNING.steps, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", VERDICT], "--out is missing: give the folder"),
        (["train", "--data", VERDICT, "--out", "new", "--learning-rate", "0"], "learning_rate=0.0"),
        (["train", "--data", VERDICT, "--out", "new", "--learning-rte", "1"], "--learning-rte"),
        (
            ["train", "--out", "new", "--recipe", "gpt-2"],
            "unknown recipe 'gpt-2': did you mean",
        ),
        (["train", "--data", VERDICT, "--out", "new", "--vocab-size", "9"], "vocab_size=9"),
        (["train", "--data", VERDICT, "--out", VERDICT], "is in use"),
        (["train", "--init-from", "no/where", "--data", "x", "--out", "new"], "no/where"),
        (["eval", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["eval", "--data", VERDICT, "--stride", "0"], "--stride=0 must be a whole number"),
    ],
)
def test_bad_input_gives_one_clear_line(tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*arguments), message)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(tmp_path):
    out = tmp_path / "run"
    endless = (*SMALL, "--steps", 10**6, "--eval-every", 10**6, "--save-every", 10**6)
    # The background jobs of a shell, and so their children, ignore SIGINT.
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
    printed, reported = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == b""
    assert b"Traceback" not in reported
    (saved,) = (out / "checkpoints").iterdir()
    assert f"step {saved.name}/1000000  checkpoint saved" in reported.decode()


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar(tmp_path):
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
        except OSError:  # Linux's answer once the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert printed.decode() == f"{out / 'model'}\n"
    assert "━" in shown.decode() and "20/20" in shown.decode()
