"""Paths that orbax and tensorstore cannot misread.

Orbax 0.12 looks for its own files with glob, to which `a[1]` is a pattern. Tensorstore reads a
backslash as a slash and `gs://` as a bucket, wherever they are in a path, and refuses names that
are not UTF-8. Such a folder is reached through a symbolic link with a plain name instead.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_PLAIN = re.compile(r"(/[\w.+=@,~ -]+)+")  # letters and digits of any script


class PlainPath:
    """A plain path of a folder: its own, or a link in a temporary folder, removed by `close`."""

    def __init__(self, folder: Path) -> None:
        """Raise ValueError if the folder has no plain path, and no folder for links has one."""
        self._folder = folder.resolve()
        self.path = self._folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if _PLAIN.fullmatch(str(self._folder)):
            return
        for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
            if _PLAIN.fullmatch(os.path.abspath(parent)) and os.access(parent, os.W_OK | os.X_OK):
                self._temporary = tempfile.TemporaryDirectory(prefix="flaxgpt-link-", dir=parent)
                self.path = Path(os.path.abspath(self._temporary.name)) / "folder"
                self.renew()
                return
        raise ValueError(
            f"{folder} cannot hold checkpoints: its path has characters other than letters, "
            "digits, spaces and . _ + = @ , ~ -, and there is no temporary folder for a link to "
            "it: choose another path, or set TMPDIR to a folder"
        )

    def renew(self) -> None:
        """Create the link again if it is gone: systems remove temporary files after some days."""
        if self._temporary is not None and not self.path.is_symlink():
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self.path.symlink_to(self._folder, target_is_directory=True)

    def close(self) -> None:
        """Remove the link."""
        if self._temporary is not None:
            self._temporary.cleanup()
