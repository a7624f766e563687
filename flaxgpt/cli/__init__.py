"""The `flaxgpt` command: a thin layer over the library, with only results on standard output."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from typing import Annotated, Any, Union

import tyro
from jax.errors import JaxRuntimeError

import flaxgpt
from flaxgpt.cli.advice import explain
from flaxgpt.cli.evaluate import EvalCommand
from flaxgpt.cli.generate import GenerateCommand
from flaxgpt.cli.params import ParamsCommand
from flaxgpt.cli.plot import PlotCommand
from flaxgpt.cli.train import TrainCommand, defaults

_COMMANDS: dict[str, type] = {
    "generate": GenerateCommand,
    "train": TrainCommand,
    "eval": EvalCommand,
    "params": ParamsCommand,
    "plot": PlotCommand,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    0 on success, 1 if the device fails or training diverges, 2 for invalid input, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"flaxgpt {flaxgpt.__version__}")
        return 0
    try:
        _parse(argv).run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader closed the pipe. Flushing the buffered output at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, ArithmeticError, JaxRuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, JaxRuntimeError):
            message = (
                f"the device failed ({message[:200]}): if it is out of memory, use a smaller "
                "model, --dtype bfloat16, a shorter text or, in training, a smaller --batch-size "
                "or a larger --accumulate"
            )
        print(f"flaxgpt: {message}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError | JaxRuntimeError) else 2
    return 0


def _parse(argv: list[str]) -> Any:
    """Return the command, or raise ValueError that says what is wrong with the arguments."""
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
        if argv[0] not in (*_COMMANDS, "--help"):
            raise ValueError(f"{explain(argv, _COMMANDS)}; see flaxgpt --help")
    kinds = []
    for name, command in _COMMANDS.items():
        default: Any = tyro.MISSING_NONPROP
        if command is TrainCommand:
            default = defaults(argv[1:] if argv[:1] == ["train"] else [])
        # By itself, tyro uses the docstring only up to the examples.
        about = inspect.getdoc(command)
        subcommand = tyro.conf.subcommand(name, description=about, default=default)
        kinds.append(Annotated[command, subcommand])
    union: Any = Union[tuple(kinds)]  # noqa: UP007 (built at run time)
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(
                union, prog="flaxgpt", description=flaxgpt.__doc__, args=argv or ["--help"]
            )
    except SystemExit as stopped:
        if not argv:
            # Nothing was asked for, so a script that lost its arguments fails, as with git and uv.
            raise SystemExit(2) from None
        if not stopped.code:
            raise
        reason = explain(argv, _COMMANDS) or _text_of(panel.getvalue())
        name = f" {argv[0]}" if argv[0] in _COMMANDS else ""
        raise ValueError(f"{reason}; see flaxgpt{name} --help") from None


def _text_of(panel: str) -> str:
    """Return the message in the frame that tyro draws around it."""
    lines = [line.strip("│| ") for line in panel.splitlines()]
    text = " ".join(line for line in lines if re.match(r"[^╭─╰+-]|--?\w", line))
    return text.partition(" For full helptext")[0].removesuffix(".")
