"""The log files of a run, which are appended to at each step and truncated on resume."""

from __future__ import annotations

import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxgpt._files import write_file_atomically

# Bidirectional formatting characters: Unicode annex 9, sections 2.1 to 2.5.
_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def metrics_line(record: Mapping[str, float]) -> str:
    """Return a record as one line of JSON; NaN and infinity, which JSON lacks, become null."""
    finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite) + "\n"


def sample_block(step: int, text: str) -> str:
    """Return a heading and the text below it, indented so that no line looks like a heading."""
    return f"step {step}\n{textwrap.indent(escape_controls(text), '  ')}\n\n"


def escape_controls(text: str) -> str:
    r"""Escape characters that would control a terminal.

    Control characters except newline and tab, and bidirectional formatting characters, are escaped
    as in Python: ESC becomes `\x1b`. Sampled text may contain any of them.
    """
    return "".join(
        char.encode("unicode_escape").decode() if _is_control(char) else char
        for char in text.replace("\r\n", "\n")
    )


def _is_control(char: str) -> bool:
    if char in "\n\t":
        return False
    # Controls, surrogates, line and paragraph separators.
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in _DIRECTIONS
    )


def append(path: Path, text: str) -> None:
    """Append text to a file, which is created if missing.

    Raises:
        OSError: the file cannot be written; names the file.
    """
    with errors_naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in order, with null as None.

    Raises:
        ValueError: a line is not a record; the message has its number.
        OSError: the file cannot be read.
    """
    return [_record(path, number, line) for number, line in enumerate(_lines(path), start=1)]


def cut_back(metrics: Path, samples: Path, step: int) -> None:
    """Remove everything after a step, and incomplete lines, from both files.

    Args:
        metrics: lines of `metrics_line`, each with a "step"; may be missing.
        samples: blocks of `sample_block`; may be missing.
        step: step of the checkpoint that the run resumes from; 0 empties the files.

    Raises:
        ValueError: a line of the metrics is not a record. No file is changed.
        OSError: a file cannot be read or written; names the file.
    """

    def record_step(number: int, line: str) -> int:
        return _record(metrics, number, line)["step"]

    def heading_step(number: int, line: str) -> int:
        heading = re.fullmatch(r"step (\d+)", line)
        return int(heading[1]) if heading else 0

    _cut_after(metrics, step, record_step)
    _cut_after(samples, step, heading_step)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Add a file's name to every OSError in a `with` block: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cut_after(path: Path, step: int, step_of: Callable[[int, str], int]) -> None:
    """Cut a file off before the first line of a later step."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(_lines(path), start=1):
        if step == 0 or step_of(number, line) > step:
            break
        kept.append(line + "\n")
    data = "".join(kept).encode()
    with errors_naming(path):
        if data != path.read_bytes():
            write_file_atomically(path, data)


def _lines(path: Path) -> list[str]:
    with errors_naming(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    # The last newline is followed by nothing, or by a line that a killed run did not complete.
    return text.split("\n")[:-1]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["step"] + 0
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object with a step; repair the "
            "line, or move the file away to resume without it"
        ) from None
    return record
