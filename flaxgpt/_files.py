"""Atomic writes: after a crash, a file (on Linux, a folder too) has its old contents or the new."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxgpt._checks import listed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # kernel or file system


def write_file_atomically(path: Path, data: bytes) -> None:
    """Write or replace a file so that it is never seen half written, even after a power failure."""
    path = path.resolve()  # replace the target of a link, not the link
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def replacing_folder(target: Path, replaceable: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` when the block ends without an exception.

    The new folder is hidden, next to the target; a killed process leaves it behind. It is synced to
    disk and then renamed. Linux swaps it with an existing target in one step. Other systems move
    the old folder aside first, and a crash between the two steps leaves both under hidden names.

    Args:
        target: a new folder, or one to replace. Missing parents are created.
        replaceable: patterns of file names. A folder that holds anything else is not replaced.

    Raises:
        ValueError: `target` is a file, or a folder with other contents.
        OSError: the folder cannot be written. The target is unchanged.
    """
    target = target.resolve()  # replace the target of a link, not the link
    if foreign := _foreign(target, replaceable):
        raise ValueError(
            f"{target} also holds {listed(foreign)}, which saving would delete: choose another "
            "folder, or move these files first"
        )
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if target.exists():
            shutil.copymode(target, temporary)
            _exchange(temporary, target)
        else:
            os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{target} cannot be written: {error}") from error
        raise
    sync(target.parent)
    try:
        # Check again: a file added since the first check must not be deleted.
        if foreign := _foreign(temporary, replaceable):
            raise FileExistsError(f"{listed(foreign)} was added meanwhile")
        if temporary.exists():
            shutil.rmtree(temporary)
    except OSError as error:
        raise OSError(
            f"{target} is saved, but its previous contents could not be removed and are now in "
            f"{temporary}: {error}"
        ) from error


def temporary_beside(path: Path) -> Path:
    """Return a new hidden name next to a path, not longer than file systems allow."""
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # limits are in bytes
    return path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")


def _foreign(target: Path, replaceable: Collection[str]) -> list[str]:
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"{target} is a file: give the path of a folder")
    return sorted(
        entry.name
        for entry in os.scandir(target)
        if not entry.is_file(follow_symlinks=False)
        or not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in replaceable)
    )


def sync(path: Path) -> None:
    """Flush a file or folder from the system's cache to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step if the system supports it."""
    if (renameat2 := _renameat2()) is not None:
        names = os.fsencode(new), os.fsencode(old)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if (code := ctypes.get_errno()) not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(old))
    aside = temporary_beside(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        path, flags = ctypes.c_char_p, ctypes.c_uint
        function.argtypes = (ctypes.c_int, path, ctypes.c_int, path, flags)
    return function
