"""Ctrl-C while the `flaxgpt` command is importing its libraries."""

from __future__ import annotations

import os
import signal
import sys
import threading


def exit_quietly_until_ready() -> None:
    """Let Ctrl-C end the process without a traceback, if the process is the command.

    The imports take a second, and no code of the command can catch KeyboardInterrupt before they
    are done. `catch_again` restores Python's handler. Other programs that import flaxgpt are not
    affected.
    """
    if _is_command(sys.orig_argv) and _replaceable(signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def catch_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if _is_command(sys.orig_argv) and _replaceable(signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command(arguments: list[str]) -> bool:
    """Whether Python was started as `python ... -m flaxgpt` or by the script `flaxgpt`."""
    options = arguments[1:]
    for i, argument in enumerate(options):
        if argument == "-m":
            return options[i + 1 : i + 2] == ["flaxgpt"]
        if not argument.startswith("-"):
            return os.path.basename(argument) == "flaxgpt"
    return False


def _replaceable(handler: object) -> bool:
    # A background job of a shell ignores the signal, and only the main thread may set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) == handler
