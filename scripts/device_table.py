"""`scripts/bench.py device`: one table of what this accelerator does, in under 9 minutes.

    python scripts/bench.py device
    python scripts/bench.py device --against "peers/bin/python peers.py --device cuda --compile"
    python scripts/bench.py device --quick

The sections are matrix products and memory traffic (the roofline of this device), decoding with the
share of the memory bandwidth, training and prefill with the share of the peak of matrix products
(MFU), and the attention implementations. Everything runs on one device, on GPT-2's 124M
architecture with random weights. Shares are of the published peak (scripts/peaks.py); of a device
that is not in that table, they are of the best that the first section measured.

A row that does not fit in memory says so, and so does one that the time budget leaves out. The
table is Markdown; the last line is a JSON object with every figure.

A peer gets the options of this script's decode and train, such as
`decode --preset gpt2 --batch 8 --prompt-length 128 --new-tokens 128 --dtype bfloat16`, and must
print a JSON object with "tokens_per_s" as its last line. Each runs in a process of its own before
this process takes the device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peaks import Peak, published_peak
from report_table import report
from timing import Figures, in_turn, machine

if TYPE_CHECKING:
    import flaxgpt

_GRACE = 45  # seconds after the budget in which a row that has begun may end


class Row(NamedTuple):
    """A row to measure."""

    section: str
    labels: Figures
    measure: Callable[[], Figures]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    preset: str | None = "gpt2"
    matrices: tuple[int, ...] = (2048, 4096, 8192)
    matrix_products: int = 16
    read_matrix: int = 16384  # 512 MiB in bfloat16, more than any cache
    traffic_bytes: int = 2**30
    traffic_passes: int = 8
    batches: tuple[int, ...] = (1, 8, 64, 2, 4, 16, 32, 128, 256)  # the most telling ones first
    batches_float32: tuple[int, ...] = (1, 8, 64, 256)
    prompt: int = 128
    new: int = 128
    prefills: tuple[tuple[int, int], ...] = ((1, 128), (1, 1024), (8, 1024), (32, 1024))
    train_length: int = 1024
    train_batches: tuple[int, ...] = (8, 32)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)

    def config(self) -> flaxgpt.GPTConfig:
        """Return the architecture: the preset, or a tiny one."""
        import flaxgpt

        if self.preset is not None:
            return flaxgpt.GPTConfig.preset(self.preset)
        return flaxgpt.GPTConfig(
            vocab_size=256,
            context_length=64,
            emb_dim=64,
            n_heads=2,
            n_layers=2,
            tie_embeddings=True,
        )


QUICK = Sizes(
    preset=None,
    matrices=(256,),
    read_matrix=512,
    traffic_bytes=2**22,
    batches=(1, 2),
    batches_float32=(1,),
    prompt=16,
    new=16,
    prefills=((2, 48),),
    train_length=32,
    train_batches=(2,),
    lengths=(64,),
)


@dataclasses.dataclass(frozen=True)
class Device:
    """A table of what this accelerator does: roofline, decoding, training, prefill, attention."""

    quick: bool = False
    """Measure a tiny model, in about a minute on CPU. For tests; the figures mean nothing."""
    budget: float = 480.0
    """Seconds after which no row begins."""
    against: str | None = None
    """Command of a peer, without task and options; see scripts/device_table.py."""
    rounds: int = 1
    """Runs of flaxgpt and the peer in turn, if there is a peer."""

    def run(self) -> None:
        """Measure, and print the table and the JSON object."""
        from flaxgpt._checks import check_positive

        check_positive("--budget", self.budget)
        table = _Table(dataclasses.asdict(self), time.monotonic() + self.budget)
        deadline = threading.Timer(self.budget + _GRACE, table.stop)
        deadline.daemon = True
        deadline.start()
        sizes = QUICK if self.quick else Sizes()
        if self.against is not None:
            # While a process holds a GPU with JAX, another one finds no memory on it.
            end = time.monotonic() + self.budget / 2
            for row in _peer_rows(self.against, self.rounds, self.quick, end):
                table.add(row)
        _without_compilation_cache()
        table.machine = machine()
        for row in _rows(sizes):
            table.add(row)
        deadline.cancel()
        table.print()


def _without_compilation_cache() -> None:
    """Make JAX compile every program, whatever an earlier process has kept."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


class _Table:
    """The rows measured so far."""

    def __init__(self, settings: Figures, end: float) -> None:
        self.settings, self.end, self.begun = settings, end, time.monotonic()
        self.machine: Figures = {}
        self.sections: dict[str, list[Figures]] = {}
        self.longest: dict[str, float] = {}  # seconds of the longest row of a section
        self.printing = threading.Lock()

    def add(self, row: Row) -> None:
        """Measure a row, unless it would probably outlast the budget."""
        left = self.end - time.monotonic()
        if left < self.longest.get(row.section, 0):
            figures: Figures = {"status": "not run: out of time"}
        else:
            begun = time.monotonic()
            figures = _attempt(row.measure)
            seconds = time.monotonic() - begun
            self.longest[row.section] = max(seconds, self.longest.get(row.section, 0))
            what = ", ".join(f"{name}={value}" for name, value in row.labels.items())
            print(f"{row.section}: {what}: {seconds:.0f} s", file=sys.stderr, flush=True)
        self.sections.setdefault(row.section, []).append(row.labels | figures)

    def print(self) -> None:
        """Print the table, then everything as JSON."""
        with self.printing:
            sections = {name: list(rows) for name, rows in self.sections.items()}
            peak, source = _peak(self.machine.get("kind", ""), sections)
            _add_shares(sections, peak)
            about = self.machine | {
                "peak": dataclasses.asdict(peak) | {"source": source},
                "seconds": round(time.monotonic() - self.begun, 1),
            }
            print(report(about, sections))
            print(json.dumps({"task": "device"} | self.settings | about | sections), flush=True)

    def stop(self) -> None:
        """Print what there is and end the process, whatever it is waiting for."""
        self.print()
        os._exit(0)


def _attempt(measure: Callable[[], Figures]) -> Figures:
    """Return the figures of a row, or why there are none, so that the other rows still run."""
    try:
        return {"status": "measured"} | measure()
    except subprocess.TimeoutExpired:
        return {"status": "not run: out of time"}
    except Exception as error:  # whatever a compiler or a device may say
        message = str(error)
        if any(words in message for words in ("RESOURCE_EXHAUSTED", "out of memory", "Ran out of")):
            return {"status": "does not fit in memory"}
        first = message.strip().splitlines()[0][:200] if message.strip() else ""
        return {"status": f"failed: {type(error).__name__}: {first}"}


def _rows(sizes: Sizes) -> Iterator[Row]:
    """Return all rows; the ones that matter most come first, in case the time does not suffice."""
    import device_programs as programs

    from flaxgpt.model.attend import IMPLEMENTATIONS

    cfg = sizes.config()

    def roofline(program: str, dtype: str, measure: Callable[[], Figures]) -> Row:
        return Row("roofline", {"program": program, "dtype": dtype}, measure)

    def product(rows: int, size: int, dtype: str) -> Row:
        measure = partial(programs.matmul, rows, size, dtype, sizes.matrix_products)
        return roofline(f"[{rows}, {size}] @ [{size}, {size}]", dtype, measure)

    def traffic(kind: str) -> Row:
        size, passes = sizes.traffic_bytes, sizes.traffic_passes
        measure = partial(programs.memory_traffic, kind, size, passes)
        return roofline(f"{kind} {size / 2**20:.0f} MiB", "float32", measure)

    def decode(batch: int, dtype: str) -> Row:
        measure = partial(programs.decode, cfg, batch, dtype, sizes.prompt, sizes.new)
        return Row("decode", {"batch": batch, "dtype": dtype}, measure)

    def train(batch: int, dtype: str, remat: bool) -> Row:
        length = sizes.train_length
        labels = {"batch": batch, "length": length, "dtype": dtype, "remat": remat}
        return Row("train", labels, partial(programs.train, cfg, batch, length, dtype, remat))

    def prefill(batch: int, length: int, dtype: str) -> Row:
        labels = {"batch": batch, "length": length, "dtype": dtype}
        return Row("prefill", labels, partial(programs.prefill, cfg, batch, length, dtype))

    def attention(name: str, length: int, dtype: str) -> Row:
        batch = max(1, sizes.lengths[-1] // length)  # the same number of ids at every length
        labels = {"implementation": name, "batch": batch, "length": length, "dtype": dtype}
        shape = (batch, cfg.n_heads, length, cfg.head_dim)
        return Row("attention", labels, partial(programs.attention, name, shape, dtype))

    yield from (product(size, size, "bfloat16") for size in sizes.matrices)
    yield product(sizes.matrices[-1], sizes.matrices[-1], "float32")
    yield product(8, sizes.read_matrix, "bfloat16")
    yield from (traffic("read"), traffic("update"))
    yield from (decode(batch, "bfloat16") for batch in sizes.batches[:3])
    smallest, *larger = sizes.train_batches
    yield train(smallest, "bfloat16", remat=False)
    yield from (prefill(batch, length, "bfloat16") for batch, length in sizes.prefills)
    for length in sizes.lengths:
        yield from (attention(name, length, "bfloat16") for name in IMPLEMENTATIONS)
    yield from (decode(batch, "float32") for batch in sizes.batches_float32)
    yield from (decode(batch, "bfloat16") for batch in sizes.batches[3:])
    yield from (train(batch, "bfloat16", remat=False) for batch in larger)
    yield train(sizes.train_batches[-1], "bfloat16", remat=True)
    yield train(smallest, "float32", remat=False)


def _peer_rows(peer: str, rounds: int, quick: bool, end: float) -> Iterator[Row]:
    """Return rows that compare with a peer, each in new processes that must end in time."""
    decode = "--preset gpt2 --batch {} --prompt-length 128 --new-tokens 128 --dtype bfloat16"
    train = "gpt2 --batch 8 --length 1024 --steps 10 --dtype bfloat16"
    tasks = [("decode", decode.format(1)), ("decode", decode.format(64)), ("train", train)]
    if quick:
        tasks = [("train", "shakespeare-char --batch 2 --length 16 --steps 10")]
    script = Path(__file__).with_name("bench.py")
    for task, options in tasks:
        ours = options if task == "decode" else f"--recipe {options}"
        theirs = options if task == "decode" else f"--preset {options}"

        def measure(task: str = task, ours: str = ours, theirs: str = theirs) -> Figures:
            command = [sys.executable, str(script), task, *ours.split()]
            figures = in_turn(command, f"{peer} {task} {theirs}", rounds, end=end)
            return {name: figures[name] for name in ("ratio", "flaxgpt", "peer")}

        yield Row("peer", {"program": f"{task} {options.removeprefix('--preset ')}"}, measure)


def _peak(kind: str, sections: dict[str, list[Figures]]) -> tuple[Peak, str]:
    """Return the published peak, or else the best that was measured, and where it is from."""
    if (peak := published_peak(kind)) is not None:
        return peak, peak.source
    rows = sections.get("roofline", [])

    def best(key: str, dtype: str | None = None) -> float:
        found = (row.get(key, 0.0) for row in rows if dtype in (None, row["dtype"]))
        return max(found, default=0.0)

    products = best("flops_per_s", "bfloat16"), best("flops_per_s", "float32")
    source = "measured here, as no peak of this kind of device is known"
    return Peak(*products, best("bytes_per_s"), source), source


def _add_shares(sections: dict[str, list[Figures]], peak: Peak) -> None:
    """Add what part of the peak each row reaches."""
    for section, rows in sections.items():
        of_peak = "flops_share" if section == "roofline" else "mfu"
        for row in rows:
            limit = peak.flops(row["dtype"]) if "dtype" in row else 0
            if "flops_per_s" in row and limit:
                row[of_peak] = row["flops_per_s"] / limit
            if "bytes_per_s" in row and peak.bandwidth:
                row["bandwidth_share"] = row["bytes_per_s"] / peak.bandwidth
