"""What `flaxgpt params` prints, as tables."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flaxgpt.inspection.flop_count import FlopCount
from flaxgpt.inspection.memory_use import Fit, MemoryUse
from flaxgpt.inspection.parameters import ParamCount
from flaxgpt.inspection.tree import Difference, Row


def print_table(table: Table) -> None:
    """Prints a table as wide as it is: rich would take columns out of one that is too wide."""
    wide = Console(width=1000)
    width = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(width, Console().width)).print(table)


def parameter_table(shown: list[Row], count: ParamCount) -> Table:
    """Returns rows with their share of the count, indented where there are groups among them."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("parameters", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("dtype")
    for name in ("count", "share", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    numbers = any(row.statistics for row in shown)
    if numbers:
        for name in ("mean", "std", "norm"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
    is_tree = len({row.path[0] for row in shown if row.shape is None}) > 0
    for row in shown:
        label = "  " * (len(row.path) - 1) + row.path[-1] if is_tree else row.name
        cells = [
            label,
            "" if row.shape is None else " x ".join(map(str, row.shape)) or "scalar",
            row.dtype,
            f"{row.count:,}",
            f"{100 * row.count / count.total:.2f} %",
            _bytes(row.bytes),
        ]
        if row.statistics is not None:
            s = row.statistics
            cells += [f"{s.mean:.3g}", f"{s.std:.3g}", f"{s.norm:.4g}", ", ".join(s.faults)]
        style = "bold" if row.shape is None and len(row.path) == 1 else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def totals(count: ParamCount, stored: dict[str, int]) -> str:
    """Returns the lines below the table; `stored` is bytes by dtype in the model's files."""

    def by_dtype(sizes: dict[str, int]) -> str:
        return ", ".join(f"{_bytes(n)} {dtype}" for dtype, n in sizes.items())

    on_disk = "" if list(stored) in ([], ["float32"]) else f" (in the file {by_dtype(stored)})"
    return (
        f"\ntotal {count.total:,} parameters, {by_dtype(count.bytes_by_dtype)}{on_disk}\n"
        f"with a tied head {count.tied:,}, with a head of its own {count.untied:,}"
    )


def flops_table(flops: FlopCount, batch: int, length: int) -> Table:
    """Returns the operations by part, forward and both ways."""
    table = Table(
        title=f"\noperations, {batch} x {length} ids", title_justify="left", show_edge=False
    )
    table.add_column("part")
    table.add_column("forward", justify="right")
    table.add_column("forward and backward", justify="right")
    parts = {
        "attention projections": flops.projections,
        "attention scores": flops.scores,
        "feed-forward": flops.feed_forward,
        "head": flops.head,
        "all, without scores (the book's table)": flops.forward_without_scores,
        "all (nanoGPT's sizing)": flops.forward,
    }
    for name, value in parts.items():
        table.add_row(name, f"{value:.4g}", f"{3 * value:.4g}")
    return table


def memory_table(used: MemoryUse, batch: int, length: int) -> Table:
    """Returns the bytes by what takes them, a column for each purpose."""
    table = _by_purpose(f"\nmemory, {batch} x {length} ids", "for")
    lines: dict[str, tuple[int | None, int | None, int | None]] = {
        "weights": (used.weights, used.weights, used.weights),
        "KV cache": (used.kv_cache, None, None),
        "optimiser": (None, used.optimizer, used.optimizer),
        "activations": (used.prefill, used.activations, used.activations_with_remat),
        "or, later, gradients": (None, used.gradients, used.gradients),
        "peak": (used.generating, used.training, used.training_with_remat),
    }
    for name, cells in lines.items():
        table.add_row(name, *("" if cell is None else _bytes(cell) for cell in cells))
    return table


def difference_table(found: list[Difference], a: str, b: str) -> Table:
    """Returns what differs between the models named."""
    table = Table(title=Text(f"A is {a}, B is {b}"), title_justify="left", show_edge=False)
    table.add_column("parameters", no_wrap=True)
    for name in ("differs", "A", "B"):
        table.add_column(name, no_wrap=True)
    for name in ("numbers changed", "largest change", "relative"):
        table.add_column(name, justify="right")
    for item in found:
        cells = [item.name, item.kind, item.a or "", item.b or ""]
        if item.kind == "values":
            cells += [f"{item.changed:,}", f"{item.largest:.3g}", f"{item.relative:.3g}"]
        table.add_row(*map(Text, cells))
    return table


def fitting_table(answers: dict[str, Fit], lengths: dict[str, int], size: int) -> Table:
    """Returns the largest batches of models, of the length given for each, in `size` bytes."""
    table = _by_purpose(f"largest batch in {_bytes(size)}", "model", "length")
    for name, answer in answers.items():
        batches = (answer.generating, answer.training, answer.training_with_remat)
        table.add_row(
            Text(name), str(lengths[name]), *(f"{batch:,}" if batch else "-" for batch in batches)
        )
    return table


def _by_purpose(title: str, first: str, *others: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption="remat saves nothing on CPU, where XLA undoes it",
        caption_justify="left",
        show_edge=False,
    )
    table.add_column(first)
    for name in (*others, "generating", "training", "training, remat"):
        table.add_column(name, justify="right")
    return table


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
