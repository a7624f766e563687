"""The `flaxgpt` command as a process, for tests."""

import os
import subprocess
import sys
from pathlib import Path

import flaxgpt

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(flaxgpt.__file__).parent.parent),
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "PYTHONIOENCODING": "utf-8",
}
# Compiles in a third of the time, as the fixture quick_compilation does.
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


def assert_refused(process, message):
    """Asserts that bad input ended it: one line on standard error, exit code 2."""
    assert process.returncode == 2
    assert process.stdout == b""
    lines = process.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("flaxgpt: ")
    assert message in lines[0]
