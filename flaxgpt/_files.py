"""Writes that a crash cannot leave half done: a file, or a whole folder, is the old or the new."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxgpt._checks import listed

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # kernel or file system


def write_file_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is never seen half written, not even after a power cut.

    Args:
        path: the file, new or to be replaced; its folder must be there.
        data: the contents.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    path = path.resolve()  # a link keeps pointing where it did
    temporary = _beside(path)
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
    """Yields an empty folder that takes the place of `target` when the block ends well.

    It lies beside the target, hidden, is written to disk in full, and is then renamed. On Linux an
    existing target changes place with it in one step. Where the system has no such step the old
    folder is moved aside first: a crash in between leaves both, under hidden names, and no target.
    A process that is killed leaves the hidden folder behind; an exception does not.

    Args:
        target: the folder, new or to be replaced. Parents are made.
        replaceable: patterns of file names. A folder that holds anything else is not replaced.

    Raises:
        ValueError: `target` is a file, or a folder with foreign things in it; nothing is touched.
        OSError: it cannot be written; the target is as it was.
    """
    target = target.resolve()  # a link to a folder keeps pointing there
    if foreign := _foreign(target, replaceable):
        raise ValueError(
            f"{target} also holds {listed(foreign)}, which saving would delete: choose another "
            "folder, or move them away first"
        )
    temporary = _beside(target)
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
    if temporary.exists():
        _remove(temporary, replaceable, target)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def _foreign(target: Path, replaceable: Collection[str]) -> list[str]:
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"{target} is a file: give the name of a folder to save into")
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
    """Lets two folders change names, in one step where the system can."""
    renameat2 = _renameat2()
    if renameat2 is not None:
        names = os.fsencode(new), os.fsencode(old)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(old))
    aside = _beside(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        path, flags = ctypes.c_char_p, ctypes.c_uint
        function.argtypes = (ctypes.c_int, path, ctypes.c_int, path, flags)
    return function


def _remove(folder: Path, replaceable: Collection[str], target: Path) -> None:
    # Looked at once more: a file put there since the first look is not ours to delete.
    try:
        if foreign := _foreign(folder, replaceable):
            raise FileExistsError(f"it came to hold {', '.join(foreign)} meanwhile")
        shutil.rmtree(folder)
    except OSError as error:
        raise OSError(
            f"{target} is saved, but what it held before could not be removed and is now in "
            f"{folder}: {error}"
        ) from error
