"""Ctrl-C and termination signals, held back until a training run has saved a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def catch_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Yield a list that receives the first SIGINT or SIGTERM; a second raises KeyboardInterrupt.

    Outside the main thread, and for signals that the process ignores, nothing is caught.
    """
    signals: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say("saving a checkpoint after this step; interrupt again to stop without saving")

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background jobs
                handlers[number] = signal.signal(number, handle)
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
