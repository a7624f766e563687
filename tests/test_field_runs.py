"""Inputs from outside the laboratory: one table per kind, one line per input."""

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import flaxgpt
from command import QUICK
from command import run as command
from flaxgpt import GPTConfig
from flaxgpt.runs import checkpoints as checkpoint
from flaxgpt.runs import loop, read_run, train
from flaxgpt.runs import report as reporting
from flaxgpt.runs.checkpoints import Checkpoints
from flaxgpt.runs.report import Report
from flaxgpt.training import TrainConfig

CFG = GPTConfig(vocab_size=20, context_length=8, emb_dim=8, n_heads=2, n_layers=1)
RECIPE = TrainConfig(
    tokenizer="characters",
    steps=2,
    batch_size=2,
    warmup_steps=0,
    eval_every=1,
    eval_windows=2,
    save_every=1,
    sample_every=1,
    sample_tokens=2,
    steps_per_call=1,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text("hello world, " * 60)
    return path


def trained(out, text, cfg=CFG, **changes):
    """Train in this process; return the result and what was printed."""
    seen = io.StringIO()
    recipe = dataclasses.replace(RECIPE, data=(str(text),), **changes)
    result = train(cfg, recipe, out, console=Console(file=seen, width=200))
    return result, seen.getvalue()


# Names of folders


NAMES = [
    "a[1]",
    "[bold]",
    "a*b",
    "a?b",
    "**",
    "a\\b",
    "gs:",
    "s3:",
    "file:",
    "a#b",
    "a%20b",
    "a|b",
    "{0}",
    "$HOME",
    "a\nb",
    " lead",
    "trail ",
    "dot.",
    ".hidden",
    "-x",
    "~",
    "~nosuchuser",
    "1",
    "1.orbax-checkpoint-tmp",
    "é" * 120,
    "日" * 80,
    os.fsdecode(b"\xff\xfe"),
]


def trains_and_resumes(out, text):
    trained(out, text)
    result, _ = trained(out, text, steps=3, init_from=str(out))
    assert int(result.state.step) == 3
    assert read_run(out)[1].steps == 3
    cfg, _, _ = flaxgpt.load(result.model)
    assert cfg == CFG


@pytest.mark.parametrize("name", NAMES[:3] + NAMES[5:7] + NAMES[-1:], ids=ascii)
def test_a_run_in_a_folder_of_any_name_resumes(name, text, tmp_path):
    trains_and_resumes(tmp_path / name, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_run_in_a_folder_of_any_listed_name_resumes(name, text, tmp_path):
    trains_and_resumes(tmp_path / name, text)


def allowed(name):
    return name not in (b".", b"..") and not {0, ord("/")} & set(name) and 0 < len(name) < 200


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=60).map(lambda s: s.encode(errors="ignore")), st.binary()))
@example(b"[a-z]*\\")
def test_a_run_in_a_folder_of_any_name_that_the_file_system_allows_resumes(
    text, tmp_path_factory, name
):
    if allowed(name):
        trains_and_resumes(tmp_path_factory.mktemp("any") / os.fsdecode(name), text)


@pytest.mark.parametrize("parent", ["a[1]", "x\\y", "gs:"])
def test_a_run_below_a_folder_of_any_name_can_be_moved_and_resumed(parent, text, tmp_path):
    trained(tmp_path / parent / "run", text)
    (tmp_path / parent).rename(tmp_path / "[moved]")
    out = tmp_path / "[moved]" / "run"
    assert int(trained(out, text, steps=3, init_from=str(out))[0].state.step) == 3


def test_a_run_resumes_through_a_link_and_from_another_directory(text, tmp_path, monkeypatch):
    (tmp_path / "real[1]").mkdir()
    (tmp_path / "link").symlink_to("real[1]")
    monkeypatch.chdir(tmp_path)
    result, _ = trained("link/run", text)
    monkeypatch.chdir(tmp_path / "link" / "run")
    assert flaxgpt.load(result.model)[0] == CFG
    assert int(trained(".", text, steps=3, init_from="../run")[0].state.step) == 3


def test_a_run_leaves_no_link_in_the_temporary_folder(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trained(tmp_path / "a[1]", text)
    assert os.listdir(tmp_path) == ["a[1]"]


def test_a_link_that_the_system_removed_is_created_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = {"array": jnp.arange(3)}
    with Checkpoints(tmp_path / "a[1]", 2) as checkpoints:
        (link,) = tmp_path.glob("flaxgpt-link-*/*")
        link.unlink()
        link.parent.rmdir()
        checkpoints.save(1, state, {}, {})
        checkpoints.verify(state)


# Checkpoints that cannot be read back


def lose_the_arrays(folder, monkeypatch):
    finalize = checkpoint._DurableFolder.finalize

    async def finalize_elsewhere(self):
        for path in Path(self.get()).glob("arrays/d/*"):
            path.unlink()
        await finalize(self)

    monkeypatch.setattr(checkpoint._DurableFolder, "finalize", finalize_elsewhere)


def test_a_folder_whose_checkpoints_cannot_be_restored_is_refused_before_training(
    text, tmp_path, monkeypatch
):
    lose_the_arrays(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=r"cannot be restored: .*train in another folder"):
        trained(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_on_disk_as_written_is_a_failed_write(tmp_path, monkeypatch):
    state = {"array": jnp.arange(3)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoint, "sync", lambda path: path.is_file() and path.write_text(""))
        checkpoints.save(2, state, {}, {})
        with pytest.raises(OSError, match="checkpoint of step 2 could not be written"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.restore(state).step == 1


def test_a_first_checkpoint_that_differs_from_the_state_is_an_error(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"array": jnp.arange(3)}, {}, {})
        with pytest.raises(OSError, match="array is not what was written; train in another folder"):
            checkpoints.verify({"array": jnp.arange(1, 4)})


# What happens to the folder of a run while nobody watches it


def replace_by_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def dangle(path):
    path.unlink(missing_ok=True)
    path.symlink_to("no/where")


DISTURBANCES = {  # what happens, and what the run says about it
    "stray": (lambda out: (out / "model" / ".DS_Store").touch(), "other files"),
    "folder in model": (lambda out: (out / "model" / "old").mkdir(), "other files"),
    "no model": (lambda out: shutil.rmtree(out / "model"), None),
    "metrics": (lambda out: replace_by_folder(out / "metrics.jsonl"), "metrics are not written"),
    "no metrics": (lambda out: (out / "metrics.jsonl").unlink(), None),
    "bad metrics": (lambda out: (out / "metrics.jsonl").write_text("?\n"), "no loss.png"),
    "binary metrics": (lambda out: (out / "metrics.jsonl").write_bytes(b"\xff\n"), "no loss.png"),
    "plot": (lambda out: replace_by_folder(out / "loss.png"), "no loss.png"),
    "samples": (lambda out: replace_by_folder(out / "samples.txt"), "samples are not written"),
    "dangling": (lambda out: dangle(out / "loss.png"), "no loss.png"),
    "no lock": (lambda out: (out / ".lock").unlink(), None),
    "no config": (lambda out: (out / "config.json").touch(), None),
    "stray checkpoint": (lambda out: (out / "checkpoints" / "9").touch(), None),
    "stray in checkpoint": (lambda out: (out / "checkpoints" / "x.txt").touch(), None),
}


@pytest.fixture
def after_step(monkeypatch):
    """Return a function that calls another with the folder of the run, after a step."""

    def schedule(step, function):
        report = Report.training

        def training(self, now, *others):
            report(self, now, *others)
            if now == step:
                function(self._metrics.parent)

        monkeypatch.setattr(Report, "training", training)

    return schedule


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_run_saves_its_checkpoints_warns_once_and_resumes(
    name, text, tmp_path, after_step
):
    disturb, message = DISTURBANCES[name]
    after_step(2, disturb)
    out = tmp_path / "run"
    result, seen = trained(out, text, steps=4, log_every=1)
    assert int(result.state.step) == 4
    assert {"3", "4"} <= set(os.listdir(out / "checkpoints"))
    assert seen.count(message or "checkpoint saved") == 1
    assert (": " in seen) or not message
    result, _ = trained(out, text, steps=5, init_from=str(out))
    assert int(result.state.step) == 5
    flaxgpt.load(out / "model")


BLOCKED = {
    "a folder": lambda out: replace_by_folder(out / "model" / "config.json"),
    "a link": lambda out: link_away(out / "model" / "config.json"),
    "a file": lambda out: (shutil.rmtree(out / "model"), (out / "model").touch()),
}


def link_away(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("name", BLOCKED)
def test_a_model_that_cannot_be_saved_is_saved_from_its_checkpoint_later(
    name, text, tmp_path, after_step
):
    out = tmp_path / "run"
    after_step(2, BLOCKED[name])
    with pytest.raises(OSError, match="training is complete, but its best model is not in"):
        trained(out, text, steps=4, log_every=1, val_fraction=0)
    assert {"3", "4"} <= set(os.listdir(out / "checkpoints"))
    (out / "model").rename(out / "moved")
    result, _ = trained(out, text, steps=4, val_fraction=0, init_from=str(out))
    params = flaxgpt.load(out / "model")[1]
    jax.tree.map(np.testing.assert_array_equal, params, result.state.params)


def test_a_resumed_run_saves_the_best_model_again_if_it_is_gone(text, tmp_path, monkeypatch):
    losses = iter([1.0, 3.0, 4.0])  # the first is the best
    monkeypatch.setattr(loop, "mean_loss", lambda *_, **__: next(losses))
    out = tmp_path / "run"
    trained(out, text)
    before = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    trained(out, text, steps=3, init_from=str(out))
    assert (out / "model" / "model.safetensors").read_bytes() == before


def fail(*_, **__):
    raise RuntimeError("out of order")


FAILING = {  # a function of `loop` or `report`, and what the run says
    "drawing": (reporting, "draw_loss", "no loss.png: out of order"),
    "sampling": (loop, "generate", "no sample: out of order"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_plot_or_sample_is_one_warning(name, text, tmp_path, monkeypatch):
    module, function, message = FAILING[name]
    monkeypatch.setattr(module, function, fail)
    result, seen = trained(tmp_path / "run", text)
    assert int(result.state.step) == 2
    assert seen.count(message) == 1


def test_a_failing_validation_ends_the_run_after_a_checkpoint(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "mean_loss", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        trained(tmp_path / "run", text)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["1"]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "EIO"), ValueError("I/O")])
def test_a_run_whose_terminal_is_closed_continues(error, text, tmp_path):
    class Closed(io.StringIO):
        def write(self, line):
            raise error

    recipe = dataclasses.replace(RECIPE, data=(str(text),))
    result = train(CFG, recipe, tmp_path / "run", console=Console(file=Closed()))
    assert int(result.state.step) == 2


def test_a_run_that_cannot_start_removes_only_its_own_files(text, tmp_path, monkeypatch):
    def fails(*_, **__):
        (tmp_path / "run" / "notes.txt").write_text("mine")
        fail()

    monkeypatch.setattr("flaxgpt.runs.start.tokenize_files", fails)
    with pytest.raises(RuntimeError, match="out of order"):
        trained(tmp_path / "run", text)
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


@pytest.mark.parametrize("name", [".notes.tmp", ".model.tmp", f".model.{'0' * 32}.tmp/mine.txt"])
def test_resuming_removes_no_file_of_others(name, text, tmp_path):
    out = tmp_path / "run"
    trained(out, text)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    trained(out, text, steps=3, init_from=str(out))
    assert (out / name).read_text() == "mine"


# Messages of libraries


FULL_DISK = """
import errno, sys
from pathlib import Path
import jax.numpy as jnp
from flaxgpt.runs import checkpoints

checkpoints._check_space = lambda folder, needed: None
try:
    with checkpoints.Checkpoints(Path(sys.argv[1]), 1) as opened:
        opened.save(1, {str(i): jnp.arange(100_000) for i in range(100)}, {}, {})
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_while_saving_prints_one_message(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount the small file system that this needs")
    try:
        arguments = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=QUICK, check=False)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert done.stdout.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_the_command_prints_the_folder_of_a_model_whose_name_is_not_utf8(text, tmp_path):
    out = str(tmp_path / os.fsdecode(b"a\xff"))
    sizes = ["--context-length=8", "--emb-dim=8", "--n-heads=2", "--n-layers=1", "--batch-size=2"]
    done = command(
        "train", f"--data={text}", f"--out={out}", *sizes, "--steps=1", "--warmup-steps=0"
    )
    assert done.returncode == 0
    assert done.stdout.decode().endswith("a\\udcff/model\n")
