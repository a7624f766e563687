"""Inputs from outside the laboratory: one table per kind, one line per input."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import flaxgpt
from command import QUICK
from command import run as command
from flaxgpt import GPTConfig
from flaxgpt.runs import checkpoints as checkpoint
from flaxgpt.runs import read_run, train
from flaxgpt.runs.checkpoints import Checkpoints
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
