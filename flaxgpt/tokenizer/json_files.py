"""JSON files whose errors say which file is at fault."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text holds, or raise ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"found a JSON {type(value).__name__}; expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise a ValueError that names the file."""
    with value_errors_naming(path):
        return parse_object(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def value_errors_naming(name: Path | str) -> Iterator[None]:
    """Prefix the message of a ValueError raised in the block with a file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
