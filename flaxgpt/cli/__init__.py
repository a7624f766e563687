"""The `flaxgpt` command: arguments to one library call, results alone on standard output."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from typing import Annotated

import jax
import tyro

import flaxgpt
from flaxgpt.cli.evaluate import Eval
from flaxgpt.cli.generate import Generate
from flaxgpt.cli.params import Params
from flaxgpt.cli.plot import Plot
from flaxgpt.cli.train import TrainCommand, defaults

Command = Generate | TrainCommand | Eval | Params | Plot


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 on success, 1 where the device fails or training diverges, 2 on bad input, 130 on Ctrl-C.
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
        # Whoever read us has enough. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"flaxgpt: {_one_line(error)}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"flaxgpt: {_one_line(error)}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        print(
            f"flaxgpt: the device could not do it ({_one_line(error)[:200]}): a smaller model, "
            "--dtype bfloat16, a shorter text or, in training, a smaller --batch-size or a higher "
            "--accumulate needs less memory",
            file=sys.stderr,
        )
        return 1
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse(argv: list[str]) -> Command:
    """Returns the command; on bad arguments raises ValueError with tyro's words in one line."""
    train = defaults(argv[1:]) if argv[:1] == ["train"] else TrainCommand()
    # The docstrings by hand: what tyro takes of them by itself ends before their examples.
    about = inspect.getdoc
    commands = (
        Annotated[Generate, tyro.conf.subcommand("generate", description=about(Generate))]
        | Annotated[
            TrainCommand,
            tyro.conf.subcommand("train", default=train, description=about(TrainCommand)),
        ]
        | Annotated[Eval, tyro.conf.subcommand("eval", description=about(Eval))]
        | Annotated[Params, tyro.conf.subcommand("params", description=about(Params))]
        | Annotated[Plot, tyro.conf.subcommand("plot", description=about(Plot))]
    )
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(commands, prog="flaxgpt", description=flaxgpt.__doc__, args=argv)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        lines = [line.strip("│ ") for line in panel.getvalue().splitlines()]
        reason = " ".join(line for line in lines if re.match(r"[^╭─╰]", line))
        reason = reason.partition(" For full helptext")[0].removesuffix(".")
        raise ValueError(f"{reason}; flaxgpt --help lists what there is") from None
