"""Measure the throughput of flaxgpt, alone or against a peer, and print one JSON object.

    python scripts/bench.py decode --preset gpt2 --batch 1 --prompt-length 32 --new-tokens 128
    python scripts/bench.py decode --batch 8 --against "peers/bin/python peers.py decode --batch 8"
    python scripts/bench.py train --recipe shakespeare-char --batch 12 --length 64 --steps 50

Weights and text are random. Decoding is greedy and never stops early. Its throughput counts only
new tokens, but the time includes the prefill of the prompt. Training takes its batches from a text
of 10 million ids; data_share is the fraction of the time spent on that, an upper bound on the time
lost, because the device works meanwhile. The first call compiles and warms up and is reported
separately. With --against, this command and the peer alternate, each in a new process. The peer
must print a JSON object with "tokens_per_s" as its last line. Each ratio compares two consecutive
runs.
"""

from __future__ import annotations

import dataclasses
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
from typing import Any, Literal

import tyro

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decode:
    """Tokens per second of `generate`, or of `stream` with one row."""

    preset: str = "gpt2"
    """Name of a `GPTConfig` preset."""
    batch: int = 1
    prompt_length: int = 32
    new_tokens: int = 128
    repeats: int = 5
    """Timed calls, after one that compiles."""
    temperature: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    driver: Literal["generate", "stream"] = "generate"
    against: str | None = None
    """Command of a peer to alternate with."""
    rounds: int = 5
    """Runs of each, if there is a peer."""

    def run(self) -> Figures:
        """Measure decoding in this process."""
        import jax
        import numpy as np

        import flaxgpt

        if self.driver == "stream" and self.batch != 1:
            raise SystemExit(f"--driver stream decodes one row: use --batch 1, not {self.batch}")
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


@dataclasses.dataclass(frozen=True)
class Train:
    """Tokens per second of `train_steps`, with batches from `data.batches`."""

    recipe: Literal["shakespeare-char", "tales", "gpt2", "verdict"] = "shakespeare-char"
    """A recipe of flaxgpt train, without dropout and gradient accumulation; the options below
    replace its values."""
    batch: int = 12
    length: int = 64
    steps: int = 10
    """Optimizer steps per timed call."""
    steps_per_call: int = 10
    """Optimizer steps per jitted call; must divide --steps."""
    repeats: int = 5
    """Timed calls, after one that compiles."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    against: str | None = None
    """Command of a peer to alternate with."""
    rounds: int = 5
    """Runs of each, if there is a peer."""

    def run(self) -> Figures:
        """Time training in this process."""
        import jax
        import numpy as np

        from flaxgpt.data import batches
        from flaxgpt.training import init_state, recipe, train_steps

        calls, rest = divmod(self.steps, self.steps_per_call)
        if rest:
            raise SystemExit(f"--steps {self.steps} must be a multiple of {self.steps_per_call}")
        cfg, train_cfg = recipe(self.recipe)
        cfg = dataclasses.replace(
            cfg, context_length=max(self.length, cfg.context_length), drop_rate=0.0
        )
        train_cfg = dataclasses.replace(
            train_cfg,
            batch_size=self.batch,
            accumulate=1,
            dtype=self.dtype,
            remat=self.remat,
            optimizer=self.optimizer,
        )
        text = np.random.default_rng(0).integers(0, cfg.vocab_size, 10_000_000, np.uint16)
        windows = batches(text, length=self.length, batch_size=self.batch, seed=0)
        state = init_state(cfg, train_cfg)
        seconds = []  # spent on each chunk of batches

        def next_chunk() -> np.ndarray:
            start = time.perf_counter()
            chunk = np.stack([next(windows) for _ in range(self.steps_per_call)])
            seconds.append(time.perf_counter() - start)
            return chunk

        chunk = next_chunk()

        def call() -> None:
            nonlocal state, chunk
            for _ in range(calls):
                state, metrics = train_steps(state, chunk)
                chunk = next_chunk()
                losses = jax.device_get(metrics["loss"])
            assert np.isfinite(losses).all()

        tokens = self.steps * self.batch * self.length
        figures = _timed(call, self.repeats, tokens)
        ms = 1000 * self.batch * self.length / figures["tokens_per_s"]
        share = statistics.median(seconds) / self.steps_per_call / (ms / 1000)
        return figures | {"ms_per_step": ms, "data_share": share, "peak_memory_mb": _peak_memory()}


def _peak_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


def _timed(call: Callable[[], None], repeats: int, tokens: int) -> Figures:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()  # ends with values on the host, so the device has finished
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
        **{
            name: _spread([run[name] for run in runs["flaxgpt"]])
            for name in ("compile_s", "data_share", "peak_memory_mb")
            if name in runs["flaxgpt"][0]
        },
        "rounds": rounds,
    }


def _spread(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Parse the command line, run the benchmark and print the result."""
    tasks: dict[str, Callable[..., Decode | Train]] = {"decode": Decode, "train": Train}
    task = tyro.extras.subcommand_cli_from_dict(tasks, description=__doc__)
    name = type(task).__name__.lower()
    if task.against is None:
        figures = task.run()
    else:
        alone = [sys.executable, __file__, name]
        for option, value in dataclasses.asdict(task).items():
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                alone.append(f"--{flag}" if value else f"--no-{flag}")
            elif option not in ("against", "rounds"):
                alone += [f"--{flag}", str(value)]
        figures = _in_turn(alone, task.against, task.rounds)
    print(json.dumps({"task": name} | dataclasses.asdict(task) | _machine() | figures))


if __name__ == "__main__":
    main()
