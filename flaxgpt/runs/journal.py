"""The growing files of a run: told step by step, and cut back where a killed run had told more."""

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

# Unicode annex 9, sections 2.1 to 2.5.
_DIRECTING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def metrics_line(record: Mapping[str, float]) -> str:
    """Returns numbers as one line of JSON, which knows no NaN or infinity: they become null."""
    finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite) + "\n"


def sample_block(step: int, text: str) -> str:
    """Returns a heading and the text indented beneath, so that no text can pass for a heading."""
    return f"step {step}\n{textwrap.indent(visible(text), '  ')}\n\n"


def visible(text: str) -> str:
    r"""Returns text that no terminal takes for a command.

    Control characters but newline and tab, and those that turn the direction of writing, are
    spelled out as Python would: ESC becomes `\x1b`. What a model samples may hold any of them.
    """
    return "".join(
        char.encode("unicode_escape").decode() if _commanding(char) else char
        for char in text.replace("\r\n", "\n")
    )


def _commanding(char: str) -> bool:
    if char in "\n\t":
        return False
    # Controls, surrogates, and what separates lines and paragraphs.
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in _DIRECTING
    )


def append(path: Path, text: str) -> None:
    """Adds text to the end of a file, made if need be, and hands it to the system at once.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file in order, null as None.

    Raises:
        ValueError: a line is no record; says which.
        OSError: it cannot be read.
    """
    return [_record(path, number, line) for number, line in enumerate(_lines(path), start=1)]


def cut_back(metrics: Path, samples: Path, step: int) -> None:
    """Leaves in both files what was told up to a step, and no half-written line; at 0, nothing.

    Args:
        metrics: lines of `metrics_line`, each with a "step"; may be absent.
        samples: blocks of `sample_block`; may be absent.
        step: that of the checkpoint a run goes on from, 0 for none.

    Raises:
        ValueError: a line of the metrics is no record; nothing is touched.
        OSError: a file cannot be read or written; names it.
    """

    def of_record(number: int, line: str) -> int:
        return _record(metrics, number, line)["step"]

    def of_heading(number: int, line: str) -> int:
        heading = re.fullmatch(r"step (\d+)", line)
        return int(heading[1]) if heading else 0

    _cut_before(metrics, step, of_record)
    _cut_before(samples, step, of_heading)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError in the block name this file: a full disk by itself names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cut_before(path: Path, step: int, step_of: Callable[[int, str], int]) -> None:
    """Cuts a file off before the first line whose step is a later one."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(_lines(path), start=1):
        if step == 0 or step_of(number, line) > step:
            break
        kept.append(line + "\n")
    data = "".join(kept).encode()
    with naming(path):
        if data != path.read_bytes():
            write_file_atomically(path, data)


def _lines(path: Path) -> list[str]:
    with naming(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    # After the last newline comes nothing, or a line that a killed run left unfinished.
    return text.split("\n")[:-1]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["step"] + 0
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number}: {line[:60]!r} is not a JSON object with a step; repair the "
            "line, or move the file away to go on without it"
        ) from None
    return record
