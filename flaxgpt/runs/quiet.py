"""Messages of libraries that say nothing to the user of a run, or say it a second time."""

from __future__ import annotations

import logging
import sys
from typing import Any


class QuietLibraries:
    """Hides messages of orbax, tensorstore and matplotlib until `close` is called.

    Orbax logs every error that it raises, with a traceback. After a failed write, each array that
    was still being written ends with a traceback of its own: "Event loop is closed" or "Task
    exception was never retrieved". Matplotlib warns while it builds its cache of fonts. Errors that
    are raised are not affected.
    """

    def __init__(self) -> None:
        previous = self._previous = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                previous(unraisable)

        self._hook = sys.unraisablehook = hook
        # New functions for each object, so that it removes only its own.
        self._filters = {
            "absl": lambda record: "orbax" not in record.pathname,
            "asyncio": lambda record: not _is_lost_error(record.getMessage()),
            "matplotlib": lambda record: record.levelno >= logging.ERROR,
            "matplotlib.font_manager": lambda record: record.levelno >= logging.ERROR,
        }
        for name, keep in self._filters.items():
            logging.getLogger(name).addFilter(keep)

    def close(self) -> None:
        """Show messages again."""
        if sys.unraisablehook is self._hook:
            sys.unraisablehook = self._previous
        for name, keep in self._filters.items():
            logging.getLogger(name).removeFilter(keep)


def _is_lost_error(message: str) -> bool:
    return "never retrieved" in message and "orbax" in message
