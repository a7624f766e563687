"""JSON files beside a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flaxgpt._checks import value_errors


def parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object, or raise ValueError."""
    if not isinstance(value := json.loads(text), dict):
        raise ValueError(f"found a JSON {type(value).__name__}; expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file does not exist."""
    with value_errors(path):
        return parse_object(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
