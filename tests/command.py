"""The `flaxgpt` command for tests, as a process and in this process."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import flaxgpt
from flaxgpt.cli import main

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(flaxgpt.__file__).parent.parent),
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "PYTHONIOENCODING": "utf-8",
}
# As in the fixture quick_compilation.
QUICK = ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
COMMAND = [sys.executable, "-m", "flaxgpt"]


def run(*arguments, stdin="", environment=QUICK):
    """Run the command as a process."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        env=environment,
        timeout=120,
        check=False,
    )


def call(*arguments, stdin=""):
    """Run the command in this process, which saves the seconds that starting one takes."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch("sys.stdin", io.StringIO(stdin)),
    ):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:  # of tyro, after --help
            code = stop.code or 0
    return subprocess.CompletedProcess(
        arguments, code, output.getvalue().encode(), errors.getvalue().encode()
    )


# Runs a test in this process and, in the slow set, as a process too.
both_ways = pytest.mark.parametrize("start", [call, pytest.param(run, marks=pytest.mark.slow)])


def assert_refused(process, message):
    """Assert that the command failed with exit code 2 and one line on standard error."""
    assert process.returncode == 2
    assert process.stdout == b""
    lines = process.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("flaxgpt: ")
    assert message in lines[0]
