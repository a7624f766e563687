"""Atomic writes of files and folders."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flaxgpt import _files
from flaxgpt._files import replacing_folder, write_file_atomically

OURS = ("a.txt", "b-*.txt")


def fill(folder: Path, text: str) -> None:
    for name in ("a.txt", "b-1.txt"):
        (folder / name).write_text(text)


def save(target: Path, text: str) -> None:
    with replacing_folder(target, OURS) as folder:
        fill(folder, text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = {"a.txt": "old", "b-1.txt": "old"}
NEW = {"a.txt": "new", "b-1.txt": "new"}


def test_a_new_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    save(tmp_path / "x" / "y" / "model", "new")
    assert contents(tmp_path / "x" / "y" / "model") == NEW


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    (tmp_path / "model" / "b-2.txt").write_text("old")
    save(tmp_path / "model", "new")
    assert contents(tmp_path / "model") == NEW
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_is_replaced_without_support_for_swapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_renameat2", lambda: None)
    save(tmp_path / "model", "old")
    save(tmp_path / "model", "new")
    assert contents(tmp_path / "model") == NEW
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_second_rename_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model", "old")
    monkeypatch.setattr(_files, "_renameat2", lambda: None)
    rename, calls = os.rename, []

    def fails_the_second_time(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise OSError(errno.EIO, "device on fire")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails_the_second_time)
    with pytest.raises(OSError, match=r"model cannot be written: .*device on fire"):
        save(tmp_path / "model", "new")
    assert contents(tmp_path / "model") == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_system_that_cannot_swap_gets_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> int:
        _files.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(_files, "_renameat2", lambda: refuses)
    save(tmp_path / "model", "old")
    save(tmp_path / "model", "new")
    assert contents(tmp_path / "model") == NEW


@pytest.mark.parametrize("failing", range(3))  # two files, then their folder
def test_a_failing_fsync_leaves_the_old_folder(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model", "old")
    fsync, calls = os.fsync, []

    def fails_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match=r"model cannot be written: .*No space left") as caught:
        save(tmp_path / "model", "new")
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path / "model") == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    def recorded_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc for the names of synced files")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path / "model", "new")
    assert events == [".txt", ".txt", ".tmp", "rename", ""]  # files, folder, rename, parent


def test_an_exception_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "model", OURS) as folder:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path / "model") == OLD
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_with_other_files_is_unchanged(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    (tmp_path / "model" / "photos").mkdir()
    with pytest.raises(ValueError, match=r"also holds photos, thesis.tex, which saving would del"):
        save(tmp_path / "model", "new")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "model" / "a.txt").read_text() == "old"


def test_a_folder_with_a_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "model" / "a.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"also holds a\.txt"):
        save(tmp_path / "model", "new")


def test_a_message_lists_at_most_eight_files(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.jpg").touch()
    with pytest.raises(ValueError, match=r"06\.jpg, 07\.jpg, and 4 more, which"):
        save(tmp_path, "new")


def test_a_file_added_while_saving_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    with replacing_folder(tmp_path / "model", OURS) as folder:
        fill(folder, "new")
        (tmp_path / "model" / "late.tex").write_text("work")
    assert contents(tmp_path / "model") == NEW | {"late.tex": "work"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_put_in_place_of_a_file_while_saving_is_kept_beside(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    message = r"model is saved, but its previous contents could not be removed .* a\.txt was added"
    with (
        pytest.raises(OSError, match=message),
        replacing_folder(tmp_path / "model", OURS) as folder,
    ):
        fill(folder, "new")
        (tmp_path / "model" / "a.txt").unlink()
        (tmp_path / "model" / "a.txt").symlink_to("b-1.txt")
    assert contents(tmp_path / "model") == NEW
    (aside,) = tmp_path.glob(".model.*.tmp")
    assert (aside / "a.txt").is_symlink()


def test_replacing_a_file_with_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match="model is a file: give the path of a folder"):
        save(tmp_path / "model", "new")
    assert (tmp_path / "model").read_text() == "a file"


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/model cannot be written: .*File exists: '.*/file'"):
        save(tmp_path / "file" / "model", "new")


def test_replacing_a_linked_folder_keeps_the_link(tmp_path: Path) -> None:
    save(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == NEW


def test_replacing_a_folder_keeps_its_permissions(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    (tmp_path / "model").chmod(0o750)
    save(tmp_path / "model", "new")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can swap folders")
def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "model", "old")
    done, misses, looks = threading.Event(), [], []

    def look() -> None:
        while not done.is_set():
            looks.append(1)
            if not (tmp_path / "model").is_dir():
                misses.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(30):
        save(tmp_path / "model", "new")
    done.set()
    reader.join()
    assert len(looks) > 30
    assert not misses


ENDLESS = """
import importlib.util, pathlib, sys, types
checks = sys.modules["flaxgpt._checks"] = types.ModuleType("checks")  # importing JAX takes seconds
checks.listed = sys.modules["flaxgpt"] = types.ModuleType("flaxgpt")
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
target = pathlib.Path(sys.argv[2])
for number in range(10**9):
    with files.replacing_folder(target, ("a.txt", "b-1.txt")) as folder:
        (folder / "a.txt").write_text(str(number) * 10000)
        (folder / "b-1.txt").write_text(str(number) * 10000)
    if number == 0:
        print("going", flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_a_process_killed_at_any_point_leaves_the_old_folder_or_the_new(
    kills: int, tmp_path: Path
) -> None:
    for attempt in range(kills):
        target = tmp_path / str(attempt) / "model"
        command = [sys.executable, "-c", ENDLESS, str(_files.__file__), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            time.sleep(0.04 * (attempt + 1) / kills)
            process.send_signal(signal.SIGKILL)
        first, second = (target / name for name in ("a.txt", "b-1.txt"))
        assert first.read_text() == second.read_text() != ""
        assert len(os.listdir(target)) == 2


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    write_file_atomically(tmp_path / "x.json", b"old")
    write_file_atomically(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_is_unchanged(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file_atomically(tmp_path / "x.json", b"old")

    def fails(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(OSError, match="No space left"):
        write_file_atomically(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_writing_a_linked_file_keeps_the_link_and_the_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_file_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
