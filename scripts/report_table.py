"""The figures of scripts/device_table.py as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timing import Figures

Cell = Callable[[Any], str]


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _spread(value: Figures, form: str = ".3g") -> str:
    median, least, most = (format(value[name], form) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


_rates = partial(_spread, form=",.0f")


def _scaled(unit: float, form: str) -> Cell:
    return lambda value: format(value / unit, form)


_LABELS = ("program", "implementation", "batch", "length", "dtype", "remat")
_COLUMNS: dict[str, tuple[str, Cell]] = {
    **{name: (name, _plain) for name in _LABELS},
    "flaxgpt": ("flaxgpt, tokens/s", _rates),
    "peer": ("peer, tokens/s", _rates),
    "ratio": ("ratio", _spread),
    "ms": ("ms", _spread),
    "ms_with_gradient": ("ms with gradient", _spread),
    "tokens_per_s": ("tokens/s", _scaled(1, ",.0f")),
    "flops_per_s": ("TFLOP/s", _scaled(1e12, ".3g")),
    "flops_share": ("share of peak FLOP/s", _scaled(1, ".1%")),
    "mfu": ("MFU", _scaled(1, ".1%")),
    "bytes_per_s": ("GB/s", _scaled(1e9, ",.0f")),
    "bandwidth_share": ("share of bandwidth", _scaled(1, ".1%")),
    "allocated_bytes": ("allocated, GiB", _scaled(2**30, ".2f")),
    "compile_s": ("compilation, s", _scaled(1, ".1f")),
    "status": ("", _plain),
}
_TITLES = {
    "peer": "flaxgpt and a peer, in turn",
    "roofline": "Roofline: matrix products and memory traffic",
    "decode": "Decoding, per step",
    "train": "Training, per optimizer step",
    "prefill": "Prefill, from prompts to the first new ids",
    "attention": "Causal attention, 1 block",
}


def report(about: Figures, sections: dict[str, list[Figures]]) -> str:
    """Return the table of each section, below what it was measured on."""
    peak = about["peak"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("jax", "flax") if name in about)
    lines = [
        f"{about.get('device', 'no device')}, {versions}, {about['seconds']:.0f} s in total",
        f"Peak: {peak['bfloat16'] / 1e12:.3g} TFLOP/s in bfloat16, "
        f"{peak['float32'] / 1e12:.3g} in float32, {peak['bandwidth'] / 1e9:,.0f} GB/s; "
        f"{peak['source']}.",
        "Times are medians of 5, with the smallest and largest in parentheses.",
    ]
    for name, title in _TITLES.items():
        if rows := sections.get(name):
            lines += ["", f"{title}:", "", *_table(_sorted(rows))]
    return "\n".join(lines) + "\n"


def _sorted(rows: list[Figures]) -> list[Figures]:
    """Return the rows by dtype and size, whatever the order of their measurement."""

    def place(row: Figures) -> tuple[Any, ...]:
        return (row.get("dtype", ""), row.get("remat", False), row.get("length", 0))

    if any("program" in row for row in rows):
        return rows
    if any("implementation" in row for row in rows):
        return sorted(rows, key=place)
    return sorted(rows, key=lambda row: (*place(row), row.get("batch", 0)))


def _table(rows: list[Figures]) -> list[str]:
    """Return the lines of a Markdown table with the columns that some row has."""
    rows = [
        {**row, "status": None if row["status"] == "measured" else row["status"]} for row in rows
    ]
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [[_COLUMNS[key][0] for key in columns], ["---"] * len(columns)]
    for row in rows:
        cells = ["" if row.get(key) is None else _COLUMNS[key][1](row[key]) for key in columns]
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]
