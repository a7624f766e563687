"""Times flaxgpt, alone or in turn with a peer, and prints one JSON object.

    python scripts/bench.py decode --preset gpt2 --batch 1 --prompt-length 32 --new-tokens 128
    python scripts/bench.py decode --batch 8 --against "peers/bin/python peers.py decode --batch 8"

Weights are random; decoding is greedy and never stops early; the tokens counted are the new ones,
while the time includes the prompt's prefill. One call compiles and warms up and is reported apart.
With --against, this command and the peer run in turn, each in a fresh process; the peer prints
a JSON object with "tokens_per_s" as its last line, and the ratios are of neighbouring runs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decode:
    """Tokens a second of `generate` (or `stream`, for one row)."""

    preset: str = "gpt2"
    """A preset of GPTConfig."""
    batch: int = 1
    prompt_length: int = 32
    new_tokens: int = 128
    repeats: int = 5
    """Timed calls after the first."""
    temperature: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    driver: Literal["generate", "stream"] = "generate"
    against: str | None = None
    """Command of a peer, run in turn with this one."""
    rounds: int = 5
    """Turns, where there is a peer."""

    def run(self) -> Figures:
        """Times decoding in this process."""
        import jax
        import numpy as np

        import flaxgpt

        if self.driver == "stream" and self.batch != 1:
            raise SystemExit(f"--driver stream decodes one row, not --batch {self.batch}")
        cfg = flaxgpt.GPTConfig.preset(self.preset)
        params = jax.block_until_ready(flaxgpt.init(cfg, jax.random.key(0)))
        shape = (self.batch, self.prompt_length)
        prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, shape)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "key": jax.random.key(1),
            "dtype": self.dtype,
        }

        def call() -> None:
            if self.driver == "stream":
                rows = [list(flaxgpt.stream(cfg, params, prompts[0], self.new_tokens, **options))]
            else:
                rows = flaxgpt.generate(cfg, params, prompts, self.new_tokens, **options)
            assert [len(row) for row in rows] == [self.new_tokens] * self.batch

        figures = _timed(call, self.repeats, self.batch * self.new_tokens)
        return figures | {"ms_per_step": 1000 * self.batch / figures["tokens_per_s"]}


def _timed(call: Callable[[], None], repeats: int, tokens: int) -> Figures:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()  # returns Python values, so the device has finished
        seconds.append(time.perf_counter() - start)
    first, *rest = seconds
    median = statistics.median(rest)
    return {
        "tokens_per_s": tokens / median,
        "min": tokens / max(rest),
        "max": tokens / min(rest),
        "compile_s": first - median,
    }


def _machine() -> Figures:
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
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


def _in_turn(ours: list[str], peer: str, rounds: int) -> Figures:
    runs: dict[str, list[Figures]] = {"flaxgpt": [], "peer": []}
    for _ in range(rounds):
        for name, command in (("flaxgpt", ours), ("peer", shlex.split(peer))):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{name}: {runs[name][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    rates = {name: [run["tokens_per_s"] for run in done] for name, done in runs.items()}
    ratios = [a / b for a, b in zip(rates["flaxgpt"], rates["peer"], strict=True)]
    return {
        "ratio": _spread(ratios),
        "flaxgpt": _spread(rates["flaxgpt"]),
        "peer": _spread(rates["peer"]) | {"command": peer},
        "compile_s": _spread([run["compile_s"] for run in runs["flaxgpt"]]),
        "rounds": rounds,
    }


def _spread(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Parses the command line, times, and prints."""
    tasks: dict[str, Callable[..., Decode]] = {"decode": Decode}
    task = tyro.extras.subcommand_cli_from_dict(tasks, description=__doc__)
    if task.against is None:
        figures = task.run()
    else:
        alone = [sys.executable, __file__, "decode"]
        for name, value in dataclasses.asdict(task).items():
            if name not in ("against", "rounds"):
                alone += [f"--{name.replace('_', '-')}", str(value)]
        figures = _in_turn(alone, task.against, task.rounds)
    print(json.dumps({"task": "decode"} | dataclasses.asdict(task) | _machine() | figures))


if __name__ == "__main__":
    main()
