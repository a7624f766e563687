"""A folder's files on disk, and whether they are still what was written."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from flaxgpt._files import sync

_NAME = "checksums.json"


class DamagedError(Exception):
    """A file is missing or is not what was written."""


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of every file in a folder to checksums.json, and sync it all to disk."""
    paths = sorted(folder.rglob("*"))
    sums = {str(path.relative_to(folder)): _crc32(path) for path in paths if path.is_file()}
    (folder / _NAME).write_text(json.dumps(sums))
    for path in (*paths, folder / _NAME, folder):
        sync(path)


def check_files(folder: Path, prefix: str = "") -> None:
    """Raise DamagedError unless all files whose relative names have a prefix are as written.

    A file without read permission is not damaged and raises PermissionError.
    """
    try:
        sums = json.loads((folder / _NAME).read_bytes())
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
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum
