"""The tables that `flaxgpt plan` prints."""

from __future__ import annotations

import collections
import math

from flaxgpt.cli.common import say
from flaxgpt.cli.tables import format_bytes, print_collectives, print_table
from flaxgpt.planning import CHIPS, GenerateTask, Operation, Plan, TrainTask
from flaxgpt.planning.chips import chip_count

_ROWS = 10
_METHOD = """\
Estimated, not measured: the time of an operation is the larger of the compiler's compute cycles and
its HBM traffic. The time that data takes between chips is not included in the step.
"""


def print_plan(found: Plan, is_largest: bool = False) -> None:
    """Print what the TPU compiler says of a program, of the largest batch if that was searched."""
    task = found.task
    is_train = isinstance(task, TrainTask)
    mesh = " x ".join(f"{name}={size}" for name, size in found.mesh if size > 1)
    place = f"{found.topology}, {mesh}" if mesh else found.topology
    kind = "train" if is_train else "generate"
    hbm = found.hbm
    used, chips = math.prod(size for _, size in found.mesh), chip_count(found.topology)
    size = ("largest " if hbm.fits else "smallest ") * is_largest
    unknown = "unknown"
    rows = [
        *([("chips used", f"{used} of {chips}")] if used < chips else []),
        (f"{size}batch", f"{task.batch:,}"),
        ("compiling, here", f"{found.compile_s:.1f} s"),
        ("HBM, arguments", format_bytes(hbm.arguments)),
        ("HBM, temporaries", unknown if hbm.temporaries is None else format_bytes(hbm.temporaries)),
        ("HBM, usable", format_bytes(hbm.limit)),
        ("fits", "yes" if hbm.fits else "no"),
    ]
    if found.step is not None:
        chip = CHIPS[found.topology.partition(":")[0]]
        cycles = found.step.cycles
        what = "ids trained on" if is_train else "new ids"
        rows += [
            ("estimated step", _seconds(found.step.seconds)),
            ("  compute", f"{cycles:,} cycles, {_seconds(cycles / chip.clock)}"),
            ("  HBM traffic", _seconds(found.step.hbm_seconds)),
        ]
        if transfer := found.step.transfer_seconds:
            least = f"at least {_seconds(transfer)}, beside the step"
            rows.append(("estimated transfer between chips", least))
        rows += [
            (f"estimated {what} per second", f"{found.tokens_per_s:,.0f}"),
            ("estimated share of peak FLOPs (MFU)", f"{found.mfu:.1%}"),
            ("estimated share of HBM bandwidth", f"{found.bandwidth_share:.1%}"),
        ]
    if found.prefill is not None:
        rows.append(("estimated prefill, once", _seconds(found.prefill.seconds)))
    weights = ", int8 weights" if isinstance(task, GenerateTask) and task.int8 else ""
    print_table([f"{kind} on {place}, {task.dtype}{weights}", "per chip"], rows)
    if found.operations:
        say("\n")
        _print_parts(found.operations)
        say("\n")
        _print_operations(found.operations[:_ROWS])
    for what, sent in (("step", found.collectives), ("prefill", found.prefill_collectives)):
        if sent:
            say("\n")
            print_collectives(sent, what)
    say(f"\n{_METHOD}" if found.step is not None else f"\n{_advice(found, is_largest)}\n")


def _advice(found: Plan, is_largest: bool) -> str:
    """Return what would need less memory, of what has not been done."""
    task, sizes = found.task, dict(found.mesh)
    rows = task.batch // (sizes.get("data", 1) * sizes.get("fsdp", 1))  # on each chip
    options = []
    if rows > 1 and not is_largest:
        options.append("a smaller --batch")
    if task.dtype == "float32":
        options.append("--dtype bfloat16")
    if isinstance(task, GenerateTask) and not task.int8:
        options.append("--int8")
    if isinstance(task, TrainTask):
        if not task.remat:
            options.append("--remat")
        if rows > task.accumulate:
            more = "a larger --accumulate" if task.accumulate > 1 else "--accumulate"
            options.append(more)
        if sizes.get("fsdp", 1) == 1:
            options.append("--mesh with fsdp")
    options.append("more chips")
    listed = ", ".join(options[:-1]) + " or " * (len(options) > 1) + options[-1]
    failed = "Not even the smallest batch fits" if is_largest else "Does not fit"
    return f"{failed}. To need less memory per chip, use {listed}."


def _print_parts(operations: tuple[Operation, ...]) -> None:
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in operations:
        for place, value in enumerate((one.seconds, one.cycles, one.bytes)):
            parts[one.part][place] += value
    total = sum(seconds for seconds, _, _ in parts.values())
    rows = [
        (part, _seconds(seconds), f"{seconds / total:.1%}", f"{cycles:,.0f}", format_bytes(int(n)))
        for part, (seconds, cycles, n) in sorted(parts.items(), key=lambda item: -item[1][0])
    ]
    columns = ["part of the model", "estimated time", "share", "cycles", "HBM traffic"]
    print_table(columns, rows)


def _print_operations(operations: tuple[Operation, ...]) -> None:
    rows = [
        (
            one.part,
            one.name,
            f"{one.count:,}",
            _seconds(one.seconds),
            f"{one.cycles:,}",
            format_bytes(one.bytes),
        )
        for one in operations
    ]
    columns = ["longest operations", "", "count", "estimated time", "cycles", "HBM traffic"]
    print_table(columns, rows, left=(0, 1))


def _seconds(seconds: float) -> str:
    """Return a time with a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
