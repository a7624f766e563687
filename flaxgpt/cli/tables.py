"""The tables that `flaxgpt params` prints."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flaxgpt.cli.common import say
from flaxgpt.inspection import Difference, FlopCount, LargestBatch, MemoryUse, ParamCount, TreeRow

_PURPOSES = ("generation", "training", "training, remat")
_NO_REMAT = "remat saves no memory on CPU, where XLA undoes it"


def print_parameters(rows: list[TreeRow], count: ParamCount, stored: dict[str, int]) -> None:
    """Print arrays and groups, with indented members; `stored` is as from `read_stored_bytes`."""
    columns = ["parameters", "shape", "dtype", "count", "share", "size"]
    columns += ["mean", "std", "norm", ""] if any(row.statistics for row in rows) else []
    is_tree = any(row.shape is None for row in rows)
    lines = []
    for row in rows:
        cells = [
            "  " * (len(row.path) - 1) + row.path[-1] if is_tree else row.name,
            "" if row.shape is None else " x ".join(map(str, row.shape)) or "scalar",
            row.dtype,
            f"{row.count:,}",
            f"{100 * row.count / count.total:.2f} %",
            _bytes(row.bytes),
        ]
        if s := row.statistics:
            cells += [f"{s.mean:.3g}", f"{s.std:.3g}", f"{s.norm:.4g}", ", ".join(s.faults)]
        is_part = row.shape is None and len(row.path) == 1
        lines.append([Text(cell, "bold" if is_part else "") for cell in cells])
    _print_table(columns, lines, left=(0, 2, 9))

    def by_dtype(sizes: dict[str, int]) -> str:
        return ", ".join(f"{_bytes(n)} {dtype}" for dtype, n in sizes.items())

    in_file = "" if list(stored) in ([], ["float32"]) else f" ({by_dtype(stored)} in the file)"
    say(
        f"\ntotal {count.total:,} parameters, {by_dtype(count.bytes_by_dtype)}{in_file}\n"
        f"with a tied head {count.tied:,}, with a separate head {count.untied:,}\n"
    )


def print_flops(flops: FlopCount, batch: int, length: int) -> None:
    """Print operations by part."""
    parts = {
        "attention projections": flops.projections,
        "attention scores": flops.scores,
        "feed-forward": flops.feed_forward,
        "head": flops.head,
        "total without scores (as in the book)": flops.forward_without_scores,
        "total (as in nanoGPT)": flops.forward,
    }
    rows = [(name, f"{value:.4g}", f"{3 * value:.4g}") for name, value in parts.items()]
    _print_table([f"FLOPs, {batch} x {length} ids", "forward", "forward and backward"], rows)


def print_memory(used: MemoryUse, batch: int, length: int) -> None:
    """Print memory by purpose."""
    rows: tuple[tuple[str, int | None, int | None, int | None], ...] = (
        ("weights", used.weights, used.weights, used.weights),
        ("KV cache", used.kv_cache, None, None),
        ("optimizer state", None, used.optimizer, used.optimizer),
        ("activations", used.prefill, used.activations, used.activations_with_remat),
        ("or gradients, later", None, used.gradients, used.gradients),
        ("peak", used.generating, used.training, used.training_with_remat),
    )
    lines = [(name, *("" if n is None else _bytes(n) for n in sizes)) for name, *sizes in rows]
    _print_table([f"memory, {batch} x {length} ids", *_PURPOSES], lines, caption=_NO_REMAT)


def print_differences(differences: list[Difference]) -> None:
    """Print the differences between two models, A and B."""
    columns = ["parameters", "difference", "A", "B", "values changed", "largest change", "relative"]
    rows = [[item.name, item.kind, item.a or "", item.b or ""] for item in differences]
    for row, item in zip(rows, differences, strict=True):
        if item.kind == "values":
            row += [f"{item.changed:,}", f"{item.largest:.3g}", f"{item.relative:.3g}"]
    _print_table(columns, rows, left=(0, 1, 2, 3))


def print_largest_batches(
    batches: dict[str, LargestBatch], lengths: dict[str, int], size: int
) -> None:
    """Print the largest batches in `size` bytes, by model and purpose."""
    rows = []
    for name, found in batches.items():
        sizes = (found.generating, found.training, found.training_with_remat)
        rows.append([name, str(lengths[name]), *(f"{n:,}" if n else "-" for n in sizes)])
    columns = [f"largest batch in {_bytes(size)}", "length", *_PURPOSES]
    _print_table(columns, rows, caption=_NO_REMAT)


def _bytes(count: int) -> str:
    """Return a size with a binary unit."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _print_table(
    columns: list[str],
    rows: Iterable[Sequence[str | Text]],
    left: Collection[int] = (0,),
    caption: str | None = None,
) -> None:
    """Print rows under columns, which are right-aligned except for those in `left`."""
    table = Table(caption=caption, caption_justify="left", show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)
    # Not narrower than the table: rich would drop columns that do not fit the terminal.
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(width, console.width)
    console.print(table)
