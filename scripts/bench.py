"""Measure the throughput of flaxgpt, alone or against a peer, and print one JSON object.

    python scripts/bench.py decode --preset gpt2 --batch 1 --prompt-length 32 --new-tokens 128
    python scripts/bench.py decode --batch 8 --against "peers/bin/python peers.py decode --batch 8"
    python scripts/bench.py train --recipe shakespeare-char --batch 12 --length 64 --steps 50
    python scripts/bench.py device

Weights and text are random. Decoding is greedy and never stops early. Its throughput counts only
new tokens, but the time includes the prefill of the prompt. Training takes its batches from a text
of 10 million ids; data_share is the fraction of the time spent on that, an upper bound on the time
lost, because the device works meanwhile. The first call compiles and warms up and is reported
separately. With --against, this command and the peer alternate, each in a new process. The peer
must print a JSON object with "tokens_per_s" as its last line. Each ratio compares two consecutive
runs.

The task `device` measures an accelerator in under 9 minutes and prints its table before the JSON
object; see scripts/device_table.py.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import tyro
from device_table import Device
from timing import Figures, in_turn, machine, peak_memory, timed


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

        _check(self, "batch", "prompt_length", "new_tokens", "repeats")
        if self.driver == "stream" and self.batch != 1:
            raise ValueError(f"--driver stream decodes one row: use --batch 1, not {self.batch}")
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

        figures = timed(call, self.repeats, self.batch * self.new_tokens)
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

        _check(self, "batch", "length", "steps", "steps_per_call", "repeats")
        calls, rest = divmod(self.steps, self.steps_per_call)
        if rest:
            raise ValueError(f"--steps {self.steps} must be a multiple of {self.steps_per_call}")
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
        figures = timed(call, self.repeats, tokens)
        ms = 1000 * self.batch * self.length / figures["tokens_per_s"]
        share = statistics.median(seconds) / self.steps_per_call / (ms / 1000)
        return figures | {"ms_per_step": ms, "data_share": share, "peak_memory_mb": peak_memory()}


def main() -> None:
    """Parse the command line, run the benchmark and print the result."""
    tasks: dict[str, Callable[..., Decode | Train | Device]] = {
        "decode": Decode,
        "train": Train,
        "device": Device,
    }
    task = tyro.extras.subcommand_cli_from_dict(tasks, description=__doc__)
    try:
        _check(task, "rounds")
        if isinstance(task, Device):
            task.run()
        else:
            _measure(task)
    except ValueError as error:
        raise SystemExit(f"bench.py: {error}") from None


def _measure(task: Decode | Train) -> None:
    """Run a benchmark, alone or in turn with a peer, and print the result."""
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
        figures = in_turn(alone, task.against, task.rounds)
    print(json.dumps({"task": name} | dataclasses.asdict(task) | machine() | figures))


def _check(task: Decode | Train | Device, *names: str) -> None:
    """Raise ValueError unless these options are whole numbers, 1 or more."""
    from flaxgpt._checks import check_size

    for name in names:
        check_size(f"--{name.replace('_', '-')}", getattr(task, name))


if __name__ == "__main__":
    main()
