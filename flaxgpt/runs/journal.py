"""The log files of a run, which are appended to at each step and truncated on resume."""

from __future__ import annotations

import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxgpt._files import write_file_atomically

# Control characters except tab and newline, surrogates, separators of lines and paragraphs, and
# formatting that changes the direction of text (Unicode annex 9, sections 2.1 to 2.5).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")


def metrics_line(record: Mapping[str, float]) -> str:
    """Return a record as one line of JSON; NaN and infinity, which JSON lacks, become null."""
    finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite) + "\n"


def sample_block(step: int, text: str) -> str:
    """Return a heading and the text below it, indented so that no line looks like a heading."""
    return f"step {step}\n{textwrap.indent(escape_controls(text), '  ')}\n\n"


def escape_controls(text: str) -> str:
    r"""Escape characters that would control a terminal, as in Python: ESC becomes `\x1b`."""
    text = text.replace("\r\n", "\n")
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def append(path: Path, text: str) -> None:
    """Append text to a file, which is created if missing."""
    with errors_naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in order, with null as None.

    Raises ValueError with the number of a line that is not a record.
    """
    return [_record(path, number, line) for number, line in _lines(path)]


def cut_back(metrics: Path, samples: Path, step: int) -> None:
    """Remove everything after a step, and incomplete lines, from both files.

    Step 0 empties the files, either of which may be missing. No file is changed if a line of the
    metrics is not a record, which raises ValueError.
    """

    def heading_step(number: int, line: str) -> int:
        heading = re.fullmatch(r"step (\d+)", line)
        return int(heading[1]) if heading else 0

    _cut_after(metrics, step, lambda number, line: _record(metrics, number, line)["step"])
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
    if path.exists():
        lines = itertools.takewhile(lambda x: step > 0 and step_of(*x) <= step, _lines(path))
        data = "".join(line + "\n" for _, line in lines).encode()
        with errors_naming(path):
            if data != path.read_bytes():
                write_file_atomically(path, data)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with errors_naming(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    # The last newline is followed by nothing, or by a line that a killed run did not complete.
    return enumerate(text.split("\n")[:-1], start=1)


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
