"""Atomic writes: after a crash, a file (on Linux, a folder too) has its old contents or the new."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flaxgpt._checks import listed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # kernel or file system


class ForeignFilesError(ValueError):
    """A folder is not replaced because it also holds the files in `names`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(
            f"{folder} also holds {listed(names)}, which saving would delete: choose another "
            "folder, or move these files first"
        )
        self.names = tuple(names)


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
        ForeignFilesError: `target` is a folder that also holds other files.
        ValueError: `target` is a file.
        OSError: the folder cannot be written. The target is unchanged.
    """
    target = target.resolve()  # replace the target of a link, not the link
    if foreign := foreign_files(target, replaceable):
        raise ForeignFilesError(target, foreign)
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
        # A file added since the first check must not be deleted.
        for name in foreign_files(temporary, replaceable):
            if os.path.lexists(target / name):
                raise FileExistsError(f"{name} was added meanwhile")
            os.rename(temporary / name, target / name)
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


def foreign_files(target: Path, replaceable: Collection[str]) -> list[str]:
    """Return the names in a folder that no pattern matches or that are folders or links."""
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


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of a temporary file or folder of this module."""
    return re.fullmatch(r"(?s)\..*\.[0-9a-f]{32}\.tmp", path.name) is not None


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to a path, removed when the block ends."""
    folder = temporary_beside(beside)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
