"""The `flaxgpt` command as a process, for tests, and without one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import flaxgpt
from flaxgpt.cli import main

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(flaxgpt.__file__).parent.parent),
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "PYTHONIOENCODING": "utf-8",
}
# Compiles in less time, as the fixture quick_compilation has it.
QUICK = ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
COMMAND = [sys.executable, "-m", "flaxgpt"]


def run(*arguments, stdin="", environment=QUICK):
    """Runs it to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        env=environment,
        timeout=120,
        check=False,
    )


def call(*arguments, stdin=""):
    """Runs it to its end in this process, which takes 2 seconds less than to start one."""
    printed, told = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(told),
        mock.patch("sys.stdin", io.StringIO(stdin)),
    ):
        code = main(list(map(str, arguments)))
    return subprocess.CompletedProcess(
        arguments, code, printed.getvalue().encode(), told.getvalue().encode()
    )


def assert_refused(process, message):
    """Asserts that bad input ended it: one line on standard error, exit code 2."""
    assert process.returncode == 2
    assert process.stdout == b""
    lines = process.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("flaxgpt: ")
    assert message in lines[0]
