"""Checksums of the files in a checkpoint, by which damage is detected."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

CHECKSUMS = "checksums.json"  # CRC-32 of every other file, by its name relative to the folder


class DamagedError(Exception):
    """A file of a checkpoint is missing or is not what was written."""


def write_checksums(folder: Path, paths: Iterable[Path]) -> None:
    """Write `CHECKSUMS` for the files in `paths`, all of them inside the folder."""
    sums = {str(path.relative_to(folder)): _crc32(path) for path in paths if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums))


def check_files(folder: Path, prefix: str = "") -> None:
    """Raise DamagedError unless all files whose relative names have a prefix are as written.

    A file without read permission is not damaged and raises PermissionError.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name in sums:
            if name.startswith(prefix) and _crc32(folder / name) != sums[name]:
                raise DamagedError(f"{name} is not what was written")
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError) as error:
        raise DamagedError(str(error)) from error


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # read what is on disk, as far as the system permits
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum
