"""The tables that `flaxgpt params` and `flaxgpt shard` print."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flaxgpt.cli.common import say
from flaxgpt.config import block_index, block_name
from flaxgpt.inspection import Difference, FlopCount, LargestBatch, MemoryUse, ParamCount, TreeRow
from flaxgpt.planning import Collective, StepCost

_PURPOSES = ("generation", "training", "training, remat")
_NO_REMAT = "remat saves no memory on CPU, where XLA undoes it"
_ON_CPU = """\
XLA for CPU computes bfloat16 in float32, undoes most of remat, and sums with an all-reduce where
XLA for TPU uses a reduce-scatter, which receives half as much
"""


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
            format_bytes(row.bytes),
        ]
        if s := row.statistics:
            cells += [f"{s.mean:.3g}", f"{s.std:.3g}", f"{s.norm:.4g}", ", ".join(s.faults)]
        is_part = row.shape is None and len(row.path) == 1
        lines.append([Text(cell, "bold" if is_part else "") for cell in cells])
    print_table(columns, lines, left=(0, 2, 9))

    def by_dtype(sizes: dict[str, int]) -> str:
        return ", ".join(f"{format_bytes(n)} {dtype}" for dtype, n in sizes.items())

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
    print_table([f"FLOPs, {batch} x {length} ids", "forward", "forward and backward"], rows)


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
    lines = [
        (name, *("" if n is None else format_bytes(n) for n in sizes)) for name, *sizes in rows
    ]
    print_table([f"memory, {batch} x {length} ids", *_PURPOSES], lines, caption=_NO_REMAT)


def print_differences(differences: list[Difference]) -> None:
    """Print the differences between two models, A and B."""
    columns = ["parameters", "difference", "A", "B", "values changed", "largest change", "relative"]
    rows = [[item.name, item.kind, item.a or "", item.b or ""] for item in differences]
    for row, item in zip(rows, differences, strict=True):
        if item.kind == "values":
            row += [f"{item.changed:,}", f"{item.largest:.3g}", f"{item.relative:.3g}"]
    print_table(columns, rows, left=(0, 1, 2, 3))


def print_largest_batches(
    batches: dict[str, LargestBatch], lengths: dict[str, int], size: int
) -> None:
    """Print the largest batches in `size` bytes, by model and purpose."""
    rows = []
    for name, found in batches.items():
        sizes = (found.generating, found.training, found.training_with_remat)
        rows.append([name, str(lengths[name]), *(f"{n:,}" if n else "-" for n in sizes)])
    columns = [f"largest batch in {format_bytes(size)}", "length", *_PURPOSES]
    print_table(columns, rows, caption=_NO_REMAT)


def print_step_cost(cost: StepCost, batch: int, length: int) -> None:
    """Print what a training step costs on each device of a mesh."""
    mesh = " x ".join(f"{name}={size}" for name, size in cost.mesh if size > 1) or "no mesh"
    sizes = {
        "weights": cost.weights,
        "optimizer state": cost.optimizer,
        "activations and other temporaries": cost.temporaries,
        "  gradients among them": cost.gradients,
        "peak": cost.peak,
    }
    lines = [(name, format_bytes(size)) for name, size in sizes.items()]
    print_table([f"memory per device, {mesh}, {batch} x {length} ids", "size"], lines)
    say("\n")
    print_collectives(cost.collectives, "step")
    if cost.unsplit:
        say("\n")
        reasons = _by_block([(item.path, item.axis, item.reason) for item in cost.unsplit])
        print_table(["not split", "by axis", "because"], reasons, left=(0, 1, 2))
    is_simulated = cost.platform == "cpu"
    kind = "simulated CPU" if is_simulated else cost.platform
    count = math.prod(size for _, size in cost.mesh)
    say(f"\ncompiled for {count} {kind} device{'s' * (count > 1)}\n{_ON_CPU * is_simulated}")


def print_collectives(found: Sequence[Collective], of: str) -> None:
    """Print what each device of a mesh receives from others in one run of a program."""
    total = sum(item.received for item in found)
    columns = [f"collectives of a {of}", "axes", "operations", "arrays", "result", "received"]
    rows = [
        (
            item.kind,
            " ".join(item.axes),
            f"{item.operations:,}",
            f"{item.arrays:,}",
            format_bytes(item.bytes),
            format_bytes(item.received),
        )
        for item in found
    ]
    rows.append(("total per device", "", "", "", "", format_bytes(total)))
    print_table(columns, rows, left=(0, 1))


def _by_block(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return rows that begin with a path, once for all blocks."""
    indices = [block_index(row[0].partition("/")[0]) for row in rows]
    last = max((i for i in indices if i is not None), default=0)
    first, every = block_name(0), block_name(f"0 to {last}") if last else block_name(0)
    return [
        (row[0].replace(f"{first}/", f"{every}/"), *row[1:])
        for i, row in zip(indices, rows, strict=True)
        if i in (None, 0)
    ]


def format_bytes(count: int) -> str:
    """Return a size with a binary unit."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def print_table(
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
