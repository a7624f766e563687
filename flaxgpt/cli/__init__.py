"""The `flaxgpt` command: a thin layer over the library, with only results on standard output."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any, Union

import jax
import tyro
from jax.errors import JaxRuntimeError

import flaxgpt
from flaxgpt import _interrupt
from flaxgpt.cli.advice import explain
from flaxgpt.cli.compilation_cache import enable_compilation_cache
from flaxgpt.cli.evaluate import EvalCommand
from flaxgpt.cli.generate import GenerateCommand
from flaxgpt.cli.params import ParamsCommand
from flaxgpt.cli.plan import PlanCommand
from flaxgpt.cli.plot import PlotCommand
from flaxgpt.cli.shard import ShardCommand
from flaxgpt.cli.streams import plain_warnings, prepare_streams
from flaxgpt.cli.train import TrainCommand, defaults

_COMMANDS: dict[str, type] = {
    "generate": GenerateCommand,
    "train": TrainCommand,
    "eval": EvalCommand,
    "params": ParamsCommand,
    "shard": ShardCommand,
    "plan": PlanCommand,
    "plot": PlotCommand,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    0 on success, 1 if the device fails or training diverges, 2 for invalid input, 130 after Ctrl-C.
    """
    _interrupt.catch_again()
    code = 0
    try:
        prepare_streams()
        with plain_warnings():
            _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        _discard_output()
    except Exception as error:
        code = _report(error)
    if code and jax.distributed.is_initialized():
        # At a normal exit, JAX would wait for the other processes, which may never end.
        sys.stderr.flush()
        os._exit(code)
    return code


def _report(error: Exception) -> int:
    """Print one line that explains an error, and return the exit code."""
    if (found := _explained(error)) is None:
        if not jax.distributed.is_initialized():
            raise error
        traceback.print_exception(error)
        return 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        _discard_output()
    message, code = found
    print(f"flaxgpt: {message}", file=sys.stderr)
    return code


def _explained(error: Exception) -> tuple[str, int] | None:
    """Return one line and the exit code for an error, or None if it is a fault of flaxgpt."""
    if isinstance(error, RuntimeError | AssertionError) and (reason := _backend_fault()):
        return reason, 2
    message = " ".join(str(error).split())
    if isinstance(error, JaxRuntimeError):
        return (
            f"the device failed ({message[:200]}): if it is out of memory, use a smaller model, "
            "--dtype bfloat16, a shorter text or, in training, a smaller --batch-size or a larger "
            "--accumulate"
        ), 1
    from flaxgpt.runs.processes import LostProcessError  # slow to import, and seldom needed

    if isinstance(error, ArithmeticError | LostProcessError):
        return message, 1
    return (message, 2) if isinstance(error, ValueError | OSError | ImportError) else None


def _run(argv: list[str]) -> None:
    if argv == ["--version"]:
        print(f"flaxgpt {flaxgpt.__version__}", flush=True)
        return
    try:
        command = _parse(argv)
        if not isinstance(command, PlanCommand):  # what is compiled for others cannot be read again
            enable_compilation_cache()
        command.run()
    except SystemExit:  # of tyro, after --help
        sys.stdout.flush()
        raise


def _discard_output() -> None:
    """Keep Python from failing again when it flushes standard output at exit."""
    with contextlib.suppress(io.UnsupportedOperation):  # in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _backend_fault() -> str:
    """Return why JAX has no device to run on, or "" if it has one."""
    try:
        jax.devices()
    except Exception as error:
        # JAX has no message for a platform whose plugin is not installed.
        reason = str(error).partition("(set JAX_PLATFORMS")[0].strip() or "no such device"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if not platforms:
            return f"JAX has no device: {' '.join(reason.split())[:300]}"
        return (
            f"JAX cannot use JAX_PLATFORMS={platforms} ({' '.join(reason.split())[:300]}): unset "
            "JAX_PLATFORMS to use the devices of this machine"
        )
    return ""


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
        with contextlib.redirect_stderr(panel), _columns_for_help():
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


@contextlib.contextmanager
def _columns_for_help() -> Iterator[None]:
    """Report at least 40 columns: in fewer, tyro breaks words or does not return."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        else:
            os.environ.pop("COLUMNS", None)
