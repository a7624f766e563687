"""A whole run: what it writes, how it resumes, and which inputs it refuses."""

import dataclasses
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

import flaxgpt
import golden
from flaxgpt import GPTConfig
from flaxgpt.runs import DivergedError, loop, read_run, texts, train
from flaxgpt.runs.folder import lock_run
from flaxgpt.runs.journal import read_metrics
from flaxgpt.runs.start import start_run
from flaxgpt.training import TrainConfig

VERDICT = golden.DATA / "verdict" / "the-verdict.txt"
CFG = GPTConfig(vocab_size=62, context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.1)
RECIPE = TrainConfig(
    data=(str(VERDICT),),
    tokenizer="characters",
    steps=40,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=5,
    steps_per_call=4,  # divides the periods below, so that one function is compiled
    log_every=2,
    eval_every=20,
    eval_windows=8,
    save_every=8,
    sample_every=20,
    sample_tokens=8,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(out, cfg=CFG, **changes):
    """Train in this process; return the result and what was printed."""
    seen = io.StringIO()
    recipe = dataclasses.replace(RECIPE, **changes)
    result = train(cfg, recipe, out, console=Console(file=seen, width=200))
    return result, seen.getvalue()


def leaves(result):
    state = result.state
    kept = (state.params, state.opt_state, state.step, jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(kept)]


def assert_equal(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "done"
    result, seen = run(out)
    return out, result, seen


def test_a_run_writes_its_files_and_configuration(done):
    out, _, _ = done
    assert {path.name for path in out.iterdir() if path.name != ".lock"} == {
        "config.json",
        "flaxgpt_tokenizer.json",
        "data",
        "checkpoints",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "model",
    }
    assert read_run(out) == (CFG, RECIPE)
    header = json.loads((out / "config.json").read_text())
    assert header["training"]["learning_rate"] == 1e-2
    assert header["model"]["emb_dim"] == 16


def test_a_run_reports_its_progress(done):
    out, result, seen = done
    metrics = read_metrics(out / "metrics.jsonl")
    assert [m["step"] for m in metrics if "loss" in m] == list(range(2, 41, 2))
    assert [m["step"] for m in metrics if "validation_loss" in m] == [20, 40]
    assert "step 20/40  loss" in seen
    assert "step 40/40  validation" in seen
    assert "step 20/40  sample" in (out / "samples.txt").read_text() + seen
    assert result.validation_loss == min(m.get("validation_loss", 9) for m in metrics)
    first, last = metrics[0]["loss"], result.validation_loss
    assert last < first - 0.5  # it learns at least the frequencies of characters


def test_the_model_of_a_run_can_be_loaded_and_generates_text(done):
    out, result, _ = done
    cfg, params, tokenizer = flaxgpt.load(out)
    assert (cfg, result.best_step) == (CFG, 40)
    jax.tree.map(np.testing.assert_array_equal, params, result.state.params)
    text = VERDICT.read_text(encoding="utf-8")
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert len(flaxgpt.generate_text(cfg, params, tokenizer, ["I had"], 5)[0]) == 5


def test_the_validation_text_is_the_last_tenth_of_the_characters(done):
    out, _, _ = done
    text = VERDICT.read_text(encoding="utf-8")
    tokenizer = flaxgpt.load(out)[2]
    train_ids, val_ids = (
        flaxgpt.data.read_ids(out / "data" / f"{name}.npy").ids for name in ("train", "val")
    )
    assert tokenizer.decode(train_ids) == text[: int(0.9 * len(text))]
    assert tokenizer.decode(val_ids) == text[int(0.9 * len(text)) :]


@pytest.mark.slow
def test_a_run_is_reproducible(done, tmp_path):
    assert_equal(run(tmp_path / "again")[0], done[1])


def test_a_run_interrupted_by_ctrl_c_and_resumed_is_bit_identical(done, tmp_path, monkeypatch):
    out = tmp_path / "run"
    report = flaxgpt.runs.report.Report.training

    def press(self, step, *others):
        report(self, step, *others)
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(flaxgpt.runs.report.Report, "training", press)
    # A background job of a shell ignores Ctrl-C, and so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (out / "checkpoints").iterdir() if int(path.name) > 8] == ["12"]
    result, _ = run(out, init_from=str(out))
    assert_equal(result, done[1])
    steps = [m["step"] for m in read_metrics(out / "metrics.jsonl") if "loss" in m]
    assert steps == list(range(2, 41, 2))
    assert read_run(out)[1].init_from == "scratch"


KILLED = """
import sys, pathlib
from flaxgpt.runs import read_run, train
import dataclasses
cfg, recipe = read_run(pathlib.Path(sys.argv[1]))
train(cfg, dataclasses.replace(recipe, init_from=sys.argv[1]), sys.argv[1])
"""


def kill_at_random(out, rounds, seed, longest):
    """Resume a run in processes that are killed; return how many finished before."""
    chance = random.Random(seed)
    ended = 0
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(out)],
            # A process killed while it writes to JAX's cache would leave half a file in it.
            env=os.environ
            | {
                "PYTHONPATH": str(Path(flaxgpt.__file__).parent.parent),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
            },
            stderr=subprocess.PIPE,
        )
        # Wait until training starts: killing it during imports would test nothing.
        assert process.stderr is not None
        for line in process.stderr:
            if b"compiled" in line or b"saved" in line:
                break
        time.sleep(chance.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        ended += process.wait() != -signal.SIGKILL
        process.stderr.close()
    return ended


def create(out, **changes):
    """Create the folder of a run without training a step."""
    start_run(CFG, dataclasses.replace(RECIPE, **changes), out, lambda line: None)
    return out


@pytest.mark.filterwarnings("ignore:removing")
def test_a_killed_and_resumed_run_is_bit_identical(done, tmp_path):
    out = create(tmp_path / "run")
    kill_at_random(out, 1, seed=1, longest=0.3)
    result, _ = run(out, init_from=str(out))
    assert_equal(result, done[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:removing")
def test_a_run_killed_many_times_is_bit_identical(tmp_path, seed):
    changes = {"steps": 1000, "save_every": 7, "eval_every": 50, "seed": seed}
    whole, _ = run(tmp_path / "whole", **changes)
    out = create(tmp_path / "run", **changes)
    assert kill_at_random(out, 8, seed, longest=1.5) < 8
    result, _ = run(out, init_from=str(out), **changes)
    assert_equal(result, whole)


@pytest.mark.slow
def test_a_complete_run_can_be_extended(tmp_path):
    out = tmp_path / "run"
    run(out, steps=8, sample_every=0)
    result, _ = run(out, steps=12, init_from=str(out), sample_every=0)
    assert int(result.state.step) == 12
    assert read_run(out)[1].steps == 12


def test_fine_tuning_starts_from_a_saved_model(done, tmp_path):
    out, trained, _ = done
    cfg = dataclasses.replace(CFG, drop_rate=0.0)
    result, _ = run(
        tmp_path / "tuned",
        cfg,
        init_from=str(out / "model"),
        tokenizer="",
        steps=1,
        warmup_steps=0,
        learning_rate=1e-9,
        min_learning_rate=0.0,
    )
    assert abs(result.validation_loss - trained.validation_loss) < 1e-4
    with pytest.raises(ValueError, match=r"has another architecture: emb_dim=32 \(was 16\)"):
        run(tmp_path / "x", dataclasses.replace(CFG, emb_dim=32), init_from=str(out / "model"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:removing")
def test_fine_tuning_killed_in_its_first_checkpoint_restarts_from_the_source(done, tmp_path):
    changes = {"init_from": str(done[0] / "model"), "tokenizer": "", "steps": 8, "sample_every": 0}
    whole, _ = run(tmp_path / "whole", **changes)
    out = tmp_path / "run"
    create(out, **changes)
    (out / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    (out / "data" / ".train.npy.0123456789abcdef0123456789abcdef.tmp").touch()
    result, _ = run(out, **changes | {"init_from": str(out)})
    assert_equal(result, whole)
    assert not list((out / "data").glob(".*.tmp"))


@pytest.mark.slow
def test_fine_tuning_that_never_improves_keeps_the_source_model_as_the_best(done, tmp_path):
    out, trained, _ = done
    result, seen = run(
        tmp_path / "tuned",
        init_from=str(out / "model"),
        tokenizer="",
        steps=4,
        learning_rate=1.0,
        warmup_steps=0,
        sample_every=0,
    )
    assert "step 0/4  validation" in seen
    assert result.best_step == 0
    _, params, _ = flaxgpt.load(tmp_path / "tuned")
    jax.tree.map(np.testing.assert_array_equal, params, trained.state.params)


def test_fine_tuning_a_model_without_a_tokenizer_requires_one(done, tmp_path):
    bare = tmp_path / "bare"
    flaxgpt.save(bare, CFG, done[1].state.params)
    with pytest.raises(ValueError, match="bare has no tokenizer that flaxgpt can read: set --tok"):
        run(tmp_path / "run", init_from=str(bare), tokenizer="")


def test_without_validation_the_last_model_is_saved(tmp_path):
    result, seen = run(tmp_path / "run", val_fraction=0.0, steps=8, sample_every=0)
    assert result.validation_loss is None and result.best_step is None
    assert "  validation" not in seen
    _, params, _ = flaxgpt.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params, result.state.params)


@pytest.mark.slow
def test_a_diverged_run_stops_before_saving_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        DivergedError,
        match=r"step 2[1-9] has loss .*; the last checkpoint: step 20\. Try a learning_rate below",
    ):
        create(out)
        run(out, init_from=str(out), steps=20)
        changes = {"learning_rate": 1e30, "min_learning_rate": 1e30, "grad_clip": 0.0}
        run(out, init_from=str(out), warmup_steps=1, **changes)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"16", "20"}


def test_a_folder_in_use_is_refused_and_left_unchanged(done, tmp_path):
    out, _, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match=rf"{out} is in use.*--init-from {out} resumes it"):
        run(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in use, and nothing in it is overwritten: choose a"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_cannot_resume_with_another_model_or_batch_size(done):
    out, _, _ = done
    with pytest.raises(
        ValueError, match=r"cannot resume with emb_dim=32 \(was 16\), batch_size=8 \(was 4\)"
    ):
        run(out, dataclasses.replace(CFG, emb_dim=32), batch_size=8, init_from=str(out))


def test_a_run_cannot_resume_with_another_text(done, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(VERDICT.read_text(encoding="utf-8").replace("I", "i"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the text has changed since the run in .* started"):
        run(done[0], data=(str(other),), init_from=str(done[0]))


@pytest.mark.slow
def test_a_run_can_resume_without_its_text_files(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(VERDICT.read_bytes())
    out = tmp_path / "run"
    run(out, steps=8, data=(str(text),), sample_every=0)
    text.unlink()
    result, seen = run(out, steps=12, data=(str(text),), init_from=str(out), sample_every=0)
    assert "text.txt no longer exists" in seen
    assert int(result.state.step) == 12


def test_tokenizing_reports_its_progress_every_ten_seconds(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(0, 60).__next__)
    monkeypatch.setattr(texts, "time", clock)
    lines = []
    start_run(CFG, RECIPE, tmp_path / "run", lines.append)
    path = tmp_path / "run" / "data" / "train.npy"
    assert lines[0] == f"tokenizing into {path}"
    assert lines[1].startswith(f"tokenizing into {path}: ") and lines[1].endswith(" %")


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    out = create(tmp_path / "run")
    with lock_run(out), pytest.raises(ValueError, match="another process is training in"):
        run(out, init_from=str(out), steps=48)
    assert read_run(out)[1].steps == 40  # the configuration of the other process


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data is empty: give at least one text file"),
        ({"data": ("nowhere.txt",)}, "nowhere.txt does not exist"),
        ({"batch_size": 5000}, "batch_size=5000 exceeds the data: 18431 ids are 1151 windows"),
        ({"tokenizer": "gpt2"}, "the tokenizer has 50257 ids, more than the model's vocab_size=62"),
        ({"tokenizer": "nowhere"}, "tokenizer='nowhere' must be one of gpt2, tales, characters"),
        ({"init_from": "no/where"}, "there is no file or folder 'no/where'"),
        ({"val_fraction": 0.0005}, "the validation text is too short"),
        ({"sample_prompt": "7"}, "sample_prompt='7': "),
    ],
)
def test_invalid_input_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; pass a file that contains text"),
        (b"tiny", "ids do not fill one window; a context of 16 needs 17"),
        (b"good \xff bad" * 30, "is not UTF-8: byte 0xff at position 5"),
    ],
)
def test_invalid_text_is_refused_before_anything_is_written(tmp_path, content, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", data=(str(text),))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_invalid_utf8_can_be_replaced(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"good \xff bad" * 30)
    run(tmp_path / "run", data=(str(text),), errors="replace", steps=2, warmup_steps=0)
    assert "\ufffd" in flaxgpt.load(tmp_path / "run")[2].characters


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount the small file system that this needs")
    try:
        out = disk / "run"
        run(out, steps=20, sample_every=0)
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 100_000))
        with pytest.raises(OSError, match="free some space"):
            run(out, init_from=str(out), sample_every=0)
        (disk / "filler").unlink()
        result, _ = run(out, init_from=str(out), sample_every=0)
        assert int(result.state.step) == 40
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # ids are mapped from it


@pytest.mark.slow
def test_a_sample_has_no_ids_that_the_tokenizer_lacks(tmp_path):
    cfg = dataclasses.replace(CFG, vocab_size=500)
    recipe = dataclasses.replace(RECIPE, sample_prompt="I had", sample_tokens=20)
    started = start_run(cfg, recipe, tmp_path / "run", lambda line: None)
    text = loop._sample(started, flaxgpt.init(cfg, jax.random.key(0)))
    assert text.startswith("I had") and len(text) == 25 and "\ufffd" not in text
    assert set(text) <= set(started.tokenizer.characters)
