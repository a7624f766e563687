"""Timing for the benchmarks: medians with their spread, the machine, and peers in turn."""

from __future__ import annotations

import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def peak_memory() -> float:
    """Return the most memory that this process has used on the host, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    """Return how long each of `1 + repeats` calls takes; the first one compiles and warms up.

    The call must wait for the device: by `jax.block_until_ready`, or by values on the host.
    """
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def timed(call: Callable[[], object], repeats: int, tokens: int) -> Figures:
    """Return the throughput of a call that processes a number of tokens."""
    first, *rest = seconds_of(call, repeats)
    median = statistics.median(rest)
    return {
        "tokens_per_s": tokens / median,
        "min": tokens / max(rest),
        "max": tokens / min(rest),
        "compile_s": first - median,
    }


def spread(values: list[float]) -> Figures:
    """Return the median and the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> Figures:
    """Return the device, the processor and the versions."""
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "kind": device.device_kind,
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.partition(":")[::2] for line in lines)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx2", "avx512f", "amx_tile")
    flags = [flag for flag in wanted if flag in names.get("flags", "").split()]
    return f"{names.get('model name', '?')} ({', '.join(flags)})"


def in_turn(ours: list[str], peer: str, rounds: int, *, end: float | None = None) -> Figures:
    """Run a command of ours and a peer's alternately, each in a new process, and compare them.

    Args:
        ours: the arguments of a command that prints a JSON object with "tokens_per_s" last.
        peer: the peer's command line.
        rounds: runs of each.
        end: the value of `time.monotonic()` after which they are stopped, by
            `subprocess.TimeoutExpired`; None for never.
    """
    runs: dict[str, list[Figures]] = {"flaxgpt": [], "peer": []}
    for _ in range(rounds):
        for name, command in (("flaxgpt", ours), ("peer", shlex.split(peer))):
            left = None if end is None else max(0, end - time.monotonic())
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, timeout=left
            )
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{name}: {runs[name][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    rates = {name: [run["tokens_per_s"] for run in done] for name, done in runs.items()}
    ratios = [a / b for a, b in zip(rates["flaxgpt"], rates["peer"], strict=True)]
    return {
        "ratio": spread(ratios),
        "flaxgpt": spread(rates["flaxgpt"]),
        "peer": spread(rates["peer"]) | {"command": peer},
        **{
            name: spread([run[name] for run in runs["flaxgpt"]])
            for name in ("compile_s", "data_share", "peak_memory_mb")
            if name in runs["flaxgpt"][0]
        },
        "rounds": rounds,
    }
