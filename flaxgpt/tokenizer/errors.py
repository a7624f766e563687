"""Errors of files and libraries, raised as a ValueError that says what is at fault."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def value_errors(prefix: Path | str, advice: str = "") -> Iterator[None]:
    """Raise ValueError for any error in the block except those of the system."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        # A Rust panic, which some libraries raise for invalid input, is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{prefix}: {error}{advice}") from error


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text holds."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"found a JSON {type(value).__name__}; expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file does not exist."""
    with value_errors(path):
        return parse_object(path.read_text(encoding="utf-8")) if path.exists() else {}
