"""Inputs from outside the laboratory: one table per kind, one line per input."""

import dataclasses
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import flaxgpt
from command import COMMAND, QUICK, call
from command import run as command
from flaxgpt import GPTConfig
from flaxgpt.data import documents, scan_texts
from flaxgpt.data.token_file import encode_range
from flaxgpt.runs import durable_folder, loop, read_run, train
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:1] + NAMES[-1:], ids=ascii)
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


@pytest.mark.slow
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


def test_a_tilde_is_the_home_folder_of_data_and_run(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(text, tmp_path / "input.txt")
    result, _ = trained("~/run", "~/input.txt")
    assert result.model == tmp_path / "run" / "model"
    trained("~/run", "~/input.txt", steps=3, init_from="~/run")


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
    finalize = durable_folder.DurableFolder.finalize

    async def finalize_elsewhere(self):
        for path in Path(self.get()).glob("arrays/d/*"):
            path.unlink()
        await finalize(self)

    monkeypatch.setattr(durable_folder.DurableFolder, "finalize", finalize_elsewhere)


def test_a_folder_whose_checkpoints_cannot_be_restored_is_refused_before_training(
    text, tmp_path, monkeypatch
):
    lose_the_arrays(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=r"run cannot hold checkpoints \(.*choose another folder"):
        trained(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_on_disk_as_written_is_a_failed_write(tmp_path, monkeypatch):
    state = {"array": jnp.arange(3)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()
        monkeypatch.setattr(
            durable_folder, "sync", lambda path: path.is_file() and path.write_text("")
        )
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("stray", "samples", "plot") else pytest.param(name, marks=pytest.mark.slow)
        for name in DISTURBANCES
    ],
)
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


# BrokenPipeError is not among them: rich would redirect standard output of the whole test process.
@pytest.mark.parametrize("error", [OSError(errno.EIO, "EIO"), ValueError("I/O")])
def test_a_run_whose_terminal_is_closed_continues(error, text, tmp_path):
    class Closed(io.StringIO):
        def write(self, line):
            raise error

    recipe = dataclasses.replace(RECIPE, data=(str(text),))
    result = train(CFG, recipe, tmp_path / "run", console=Console(file=Closed()))
    assert int(result.state.step) == 2


@pytest.mark.slow
def test_the_command_prints_its_result_although_its_progress_is_no_longer_read(text, tmp_path):
    sizes = ["--context-length=8", "--emb-dim=8", "--n-heads=2", "--n-layers=1", "--batch-size=2"]
    sizes += ["--steps=3", "--warmup-steps=0", "--steps-per-call=1", "--log-every=1"]
    command_line = [*COMMAND, "train", f"--data={text}", f"--out={tmp_path / 'run'}", *sizes]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command_line, env=QUICK, text=True, **pipes) as process:
        process.stderr.readline()
        process.stderr.close()
        assert process.stdout.read() == f"{tmp_path / 'run' / 'model'}\n"
    assert process.returncode == 0


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


@pytest.mark.slow
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


# Forms of text

GPT2 = flaxgpt.load_tokenizer("gpt2")
END = GPT2.special_tokens["<|endoftext|>"]


def decoded(paths, **options):
    """Return the documents that GPT-2's ids of some files decode to."""
    source = scan_texts(paths, **options)
    ids = [id for ids in encode_range(source, GPT2, 0, source.n_characters) for id in ids]
    documents = [list(group) for end, group in itertools.groupby(ids, END.__eq__) if not end]
    assert ids.count(END) == len(documents) - 1
    return [GPT2.decode(document) for document in documents]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


TWO = lines({"text": "one fish"}, {"text": "two\nfish", "id": 1})
FORMS = {  # name of a file: its contents, and the documents in it
    "plain.txt": (b"one fish", ["one fish"]),
    "no-suffix": (b"one fish", ["one fish"]),
    "bom.txt": (b"\xef\xbb\xbfone", ["one"]),
    "inner-bom.txt": ("a\ufeffb".encode(), ["a\ufeffb"]),
    "dos.txt": (b"one\r\ntwo\r\n", ["one\r\ntwo\r\n"]),
    "nul.txt": (b"one\0two", ["one\0two"]),
    "a.txt.gz": (gzip.compress(b"one fish"), ["one fish"]),
    "A.TXT.GZ": (gzip.compress(b"one fish"), ["one fish"]),
    "members.gz": (gzip.compress(b"one ") + gzip.compress(b"fish"), ["one fish"]),
    "padded.gz": (gzip.compress(b"one") + b"\0" * 8, ["one"]),
    "hidden-gzip.txt": (gzip.compress(b"one fish"), ["one fish"]),
    "bom.txt.gz": (gzip.compress(b"\xef\xbb\xbfone"), ["one"]),
    "two.jsonl": (TWO, ["one fish", "two\nfish"]),
    "two.ndjson": (TWO, ["one fish", "two\nfish"]),
    "TWO.JSONL": (TWO, ["one fish", "two\nfish"]),
    "two.jsonl.gz": (gzip.compress(TWO), ["one fish", "two\nfish"]),
    "dos.jsonl": (TWO.replace(b"\n", b"\r\n"), ["one fish", "two\nfish"]),
    "bom.jsonl": (b"\xef\xbb\xbf" + TWO, ["one fish", "two\nfish"]),
    "unended.jsonl": (TWO.rstrip(), ["one fish", "two\nfish"]),
    "blank.jsonl": (b"\n" + TWO.replace(b"\n", b"\n \n"), ["one fish", "two\nfish"]),
    "empty.jsonl": (lines({"text": ""}) + TWO, ["one fish", "two\nfish"]),
    "separators.jsonl": ('{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    "raw.json": (b'{"text": 1}', ['{"text": 1}']),
}


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize("name", FORMS)
def test_text_is_read_in_the_forms_in_which_people_have_it(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", block)
    content, expected = FORMS[name]
    (tmp_path / name).write_bytes(content)
    source = scan_texts([tmp_path / name])
    assert decoded([tmp_path / name]) == expected
    assert source.n_characters == sum(map(len, expected))
    assert source.alphabet == "".join(sorted(set("".join(expected))))
    assert source.sha256 == hashlib.sha256(content).hexdigest()


DAMAGED = {  # name of a file: its contents, and the message
    "utf16.txt": ("hi".encode("utf-16"), "utf16.txt is UTF-16, .*: iconv -f UTF-16"),
    "utf16be.txt": (b"\xfe\xff\0h\0i", "utf16be.txt is UTF-16"),
    "utf32.txt": ("hi".encode("utf-32"), "utf32.txt is UTF-32, .*: iconv -f UTF-32"),
    "utf16.txt.gz": (gzip.compress("hi".encode("utf-16")), "utf16.txt.gz is UTF-16"),
    "latin1.txt": (b"caf\xe9 ", "latin1.txt is not UTF-8: byte 0xe9 at position 3"),
    "bom-latin1.txt": (b"\xef\xbb\xbfcaf\xe9 ", "byte 0xe9 at position 6"),
    "cut.gz": (gzip.compress(b"one fish" * 99)[:-9], "cut.gz is a damaged gzip .*too early"),
    "start.gz": (gzip.compress(b"one")[:3], "start.gz is a damaged gzip file"),
    "flipped.gz": (gzip.compress(b"one")[:-8] + b"\1" * 8, "flipped.gz is a damaged gzip file"),
    "garbage.gz": (gzip.compress(b"one") + b"garbage", "garbage.gz is a damaged gzip file"),
    "text.gz": (b"one fish", "text.gz is a damaged gzip file .*Not a gzipped file"),
    "nothing.gz": (gzip.compress(b""), "nothing.gz contains no text"),
    "only-bom.txt": (b"\xef\xbb\xbf", "only-bom.txt contains no text"),
    "empty.txt": (b"", "empty.txt is empty"),
    "a.zip": (b"PK\3\4rest", "a.zip is a zip archive, .*: unpack it"),
    "a.parquet": (b"PAR1rest", "a.parquet is a Parquet file"),
    "a.zst": (b"\x28\xb5\x2f\xfdrest", "a.zst is compressed with zstd"),
    "a.pdf": (b"%PDF-1.7", "a.pdf is a PDF"),
    "field.jsonl": (
        TWO + lines({"content": "x", "id": 3}),
        "field.jsonl, line 3, has no field 'text' but 'content', 'id': .*--text-field",
    ),
    "null.jsonl": (lines({"text": None}), "line 1: field 'text' is None, not a string"),
    "list.jsonl": (lines(["text"]), "line 1, is not a JSON object"),
    "broken.jsonl": (TWO + b'{"text": "x', "broken.jsonl, line 3, is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1, is not JSON"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "line 1: field 'text' has a lone surrogate"),
    "blank.jsonl": (b"\n\n", "blank.jsonl contains no text"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_text_in_a_form_that_cannot_be_read_is_refused_by_name(name, tmp_path):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        scan_texts([tmp_path / name])


def test_the_field_of_the_text_can_be_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"content": "one", "text": 3}))
    assert decoded([path], text_field="content") == ["one"]


def test_a_lone_surrogate_in_json_can_be_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert decoded([path], errors="replace") == ["a\ufffdb 😀"]


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


FOLDER = {
    "b.txt": b"\xef\xbb\xbfbee",
    "a/z.md": b"zed",
    "a/two.jsonl.gz": gzip.compress(TWO),
    "a.txt": b"ay",
    ".hidden": b"\xff",
    ".git/config": b"\xff",
    "a/__init__.py": b"",
}


def test_a_folder_stands_for_its_text_files_sorted_by_name(tmp_path):
    folder = fill(tmp_path / "corpus[1]", FOLDER)
    (folder / "loop").symlink_to(folder)
    assert decoded([folder]) == ["one fish", "two\nfish", "zed", "ay", "bee"]
    assert decoded([folder / "b.txt", folder / "a"]) == ["bee", "one fish", "two\nfish", "zed"]
    assert scan_texts([folder]).notes == ["reading 4 text files"]


BAD_FOLDERS = {  # contents of a folder, and the message
    "empty": ({".hidden": b"x", "a/none.txt": b""}, "is a folder without text files"),
    "pictures": ({"a.txt": b"x", "b/c.png": b"\x89PNG\0"}, "not text in UTF-8: b/c.png; move"),
    "utf16": ({"a.txt": "hi".encode("utf-16")}, "not text in UTF-8: a.txt"),
    "latin1": ({"a.txt": b"caf\xe9 "}, "a.txt is not UTF-8"),
    "damaged": ({"a.gz": b"\x1f\x8bx"}, "a.gz is a damaged gzip file"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_cannot_be_read_as_text_is_refused_with_the_files(name, tmp_path):
    files, message = BAD_FOLDERS[name]
    with pytest.raises(ValueError, match=message):
        scan_texts([fill(tmp_path / "corpus", files)])


def test_a_run_on_a_folder_holds_out_the_end_and_resumes(tmp_path):
    files = {f"{i}.txt.gz": gzip.compress(b"hello world, " * 20) for i in range(3)}
    folder = fill(tmp_path / "corpus", files)
    _, seen = trained(tmp_path / "run", folder)
    assert "reading 3 text files" in seen
    val = flaxgpt.data.read_ids(tmp_path / "run" / "data" / "val.npy")
    assert (val.start, val.stop) == (702, 780)
    assert (
        int(
            trained(tmp_path / "run", folder, steps=3, init_from=str(tmp_path / "run"))[
                0
            ].state.step
        )
        == 3
    )
    (folder / "4.txt").write_text("more")
    with pytest.raises(ValueError, match="the text has changed since the run"):
        trained(tmp_path / "run", folder, steps=4, init_from=str(tmp_path / "run"))


def test_a_run_in_its_own_data_folder_is_refused(tmp_path):
    folder = fill(tmp_path / "corpus", FOLDER)
    with pytest.raises(ValueError, match=r"corpus/run is in the data folder .*choose a folder out"):
        trained(folder / "run", folder)
    assert not (folder / "run").exists()


def test_a_changed_compressed_file_is_noticed_while_reading(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one fish"))
    source = scan_texts([path])
    path.write_bytes(gzip.compress(b"two"))
    with pytest.raises(ValueError, match="has changed since it was scanned"):
        list(encode_range(source, GPT2, 0, source.n_characters))


@pytest.mark.slow
def test_a_compressed_file_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"hello world, " * 80_000)  # 312 MB in all, 2 MB compressed
    tracemalloc.start()
    scan_texts([path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


# Separators written in the text

WRITTEN = [  # text, and its documents if it is separated at the token
    ("one<|endoftext|>two", ["one", "two"]),
    ("<|endoftext|>one<|endoftext|>", ["one"]),
    ("one<|endoftext|><|endoftext|>two", ["one", "two"]),
    ("one\n<|endoftext|>\ntwo\n", ["one\n", "\ntwo\n"]),
    ("one <|endoftext", ["one <|endoftext"]),
    ("<|endof<|endoftext|>text|>", ["<|endof", "text|>"]),
    ("<<|endoftext|>|endoftext|>", ["<", "|endoftext|>"]),
]


@pytest.mark.parametrize("block", [1, 5, 2**20])
@pytest.mark.parametrize(("content", "expected"), WRITTEN)
def test_a_written_separator_ends_a_document_if_asked_for(
    content, expected, block, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "_BLOCK", block)
    (tmp_path / "a.txt").write_text(content)
    source = scan_texts([tmp_path / "a.txt"], document_separator="<|endoftext|>")
    assert (source.n_end_of_text, source.notes) == (0, [])
    assert source.n_characters == sum(map(len, expected))
    assert decoded([tmp_path / "a.txt"], document_separator="<|endoftext|>") == expected
    plain = scan_texts([tmp_path / "a.txt"])
    assert plain.n_end_of_text == content.count("<|endoftext|>")
    assert plain.n_characters == len(content)


@given(
    st.lists(st.sampled_from(["<", "<|end", "<|endoftext|>", "oftext|>", "a", "\n"])),
    st.integers(1, 9),
)
def test_splitting_at_a_separator_does_not_depend_on_the_blocks(parts, size):
    text = "".join(parts)
    blocks = [[text[i : i + size]] for i in range(0, len(text), size)]
    found = [""]
    for first, *others in documents._split(blocks, "<|endoftext|>"):
        found[-1] += first
        found += others
    assert found == text.split("<|endoftext|>")


def test_a_separator_splits_lines_of_json_but_does_not_span_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a--b-"}, {"text": "-c"}))
    assert decoded([path], document_separator="--") == ["a", "b-", "-c"]


@pytest.mark.slow
def test_a_run_warns_once_of_written_separators_and_can_split_there(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("hello world, <|endoftext|>" * 60)
    cfg = dataclasses.replace(CFG, vocab_size=50)
    _, seen = trained(tmp_path / "a", path, cfg)
    assert seen.count("contains <|endoftext|> 60 times as ordinary characters") == 1
    recipe = {"document_separator": "<|endoftext|>"}
    _, seen = trained(tmp_path / "b", path, cfg, **recipe)
    assert "ordinary characters" not in seen
    assert flaxgpt.load(tmp_path / "b")[2].characters == " ,dehlorw"
    with pytest.raises(ValueError, match="cannot resume with document_separator=''"):
        trained(tmp_path / "b", path, cfg, steps=3, init_from=str(tmp_path / "b"))


def test_evaluation_reads_the_same_forms_of_text(tmp_path):
    folder = fill(
        tmp_path / "corpus", {"a.jsonl.gz": gzip.compress(lines({"body": "Once upon a time."}))}
    )
    done = call("eval", "--data", folder, "--text-field", "body", "--stride", "64")
    assert done.returncode == 0, done.stderr
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfOnce<|endoftext|> upon a time.")
    done = call("eval", "--data", tmp_path / "bom.txt", "--document-separator", "<|endoftext|>")
    assert done.returncode == 0, done.stderr
    done = call("eval", "--data", tmp_path / "bom.txt")
    assert b"contains <|endoftext|> 1 times" in done.stderr


SHORT = ["a", "ab", "hello"]


@pytest.mark.parametrize("content", SHORT)
def test_a_text_too_short_to_train_on_is_refused_with_what_to_do(content, tmp_path):
    (tmp_path / "input.txt").write_text(content)
    with pytest.raises(ValueError, match=r"provide more text|too short"):
        trained(tmp_path / "run", tmp_path / "input.txt")
    assert not (tmp_path / "run").exists()


def test_one_character_is_too_short_to_hold_out_a_part_of_it(tmp_path):
    (tmp_path / "input.txt").write_text("a")
    with pytest.raises(ValueError, match=r"text of 1 character is too short to hold out"):
        trained(tmp_path / "run", tmp_path / "input.txt")


@pytest.mark.parametrize("name", ["config.json", "data/train.json", "metrics.jsonl"])
def test_a_run_resumes_after_an_editor_added_a_byte_order_mark(name, text, tmp_path):
    out = tmp_path / "run"
    trained(out, text)
    (out / name).write_bytes(b"\xef\xbb\xbf" + (out / name).read_bytes())
    assert int(trained(out, text, steps=3, init_from=str(out))[0].state.step) == 3
