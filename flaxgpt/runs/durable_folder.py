"""The folder of a checkpoint, which gets its name once its files are on disk.

Orbax 0.12 names a checkpoint without having flushed its files, so a crash could leave one that is
named and incomplete.
"""

from __future__ import annotations

import os
from pathlib import Path

import orbax.checkpoint as ocp

from flaxgpt._files import sync
from flaxgpt.runs.checksums import CHECKSUMS, check_files, write_checksums


class DurableFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A temporary folder that becomes a checkpoint once its files and checksums are on disk."""

    async def finalize(self) -> None:
        folder, final = Path(self.get()), Path(self.get_final())
        if not final.name.isdecimal():  # a part of the checkpoint
            await super().finalize()
            return
        self._checkpoint_metadata_store.wait_until_finished()
        paths = sorted(folder.rglob("*"))
        write_checksums(folder, paths)
        for path in (*paths, folder / CHECKSUMS, folder):
            sync(path)
        check_files(folder)
        os.rename(folder, final)
        sync(final.parent)
