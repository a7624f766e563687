"""Measure the throughput of flaxgpt, alone or against a peer, and print one JSON object.

    python scripts/bench.py decode --preset gpt2 --batch 1 --prompt-length 32 --new-tokens 128
    python scripts/bench.py decode --batch 8 --against "peers/bin/python peers.py decode --batch 8"
    python scripts/bench.py decode --int8 --against "python scripts/bench.py decode"
    python scripts/bench.py train --recipe shakespeare-char --batch 12 --length 64 --steps 50
    python scripts/bench.py prefix --prefix-length 896 --batch 4
    python scripts/bench.py drafts --preset gpt2 --lookup 8 --peer peers/bin/python
    python scripts/bench.py draft-model --preset gpt2-large --blocks 2 --scale 0.1
    python scripts/bench.py device

Weights and text are random. Decoding is greedy and never stops early. Its throughput counts only
new tokens, but the time includes the prefill of the prompt. Training takes its batches from a text
of 10 million ids; data_share is the fraction of the time spent on that, an upper bound on the time
lost, because the device works meanwhile. The first call compiles and warms up and is reported
separately. With --against, this command and the peer alternate, each in a new process. The peer
must print a JSON object with "tokens_per_s" as its last line. Each ratio compares two consecutive
runs.

The task `prefix` measures the time to the first new id of prompts that begin with the same ids:
read whole, after `prefill`, and with a prefix that a `PrefixStore` has. The calls alternate, and
each ratio compares two consecutive ones.

The task `drafts` compares `generate` with and without prompt lookup on texts of several kinds, and
`draft-model` with and without a small model that drafts; see scripts/drafts.py.

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
from drafts import DraftModel, Drafts
from timing import Figures, in_turn, machine, peak_memory, spread, timed


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
    int8: bool = False
    """Whether weights are int8, by `flaxgpt.quantize`."""
    driver: Literal["generate", "stream"] = "generate"
    beams: int = 1
    """Beams of `generate`; 2 or more for beam search, where only the best beam's tokens count."""
    against: str | None = None
    """Command of a peer to alternate with."""
    rounds: int = 5
    """Runs of each, if there is a peer."""

    def run(self) -> Figures:
        """Measure decoding in this process."""
        import jax
        import numpy as np

        import flaxgpt

        _check(self, "batch", "prompt_length", "new_tokens", "repeats", "beams")
        if self.driver == "stream" and (self.batch, self.beams) != (1, 1):
            raise ValueError("--driver stream decodes one row: leave out --batch and --beams")
        cfg = flaxgpt.GPTConfig.preset(self.preset)
        params = flaxgpt.init(cfg, jax.random.key(0))
        params = jax.block_until_ready(flaxgpt.quantize(params) if self.int8 else params)
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
                rows = flaxgpt.generate(
                    cfg, params, prompts, self.new_tokens, beams=self.beams, **options
                )
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


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Milliseconds to the first new id, of prompts read whole and after a shared prefix."""

    preset: str = "gpt2"
    """Name of a `GPTConfig` preset."""
    batch: int = 1
    prefix_length: int = 512
    prompt_length: int = 16
    """Ids that follow the prefix in each prompt."""
    repeats: int = 5
    """Timed calls of each kind, after one that compiles."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def run(self) -> Figures:
        """Measure the three ways in turn in this process."""
        import jax
        import numpy as np

        import flaxgpt

        _check(self, "batch", "prefix_length", "prompt_length", "repeats")
        cfg = flaxgpt.GPTConfig.preset(self.preset)
        length = self.prefix_length + self.prompt_length
        if length > cfg.context_length:
            raise ValueError(
                f"--prefix-length {self.prefix_length} and --prompt-length {self.prompt_length} "
                f"are more than context_length={cfg.context_length} of {self.preset}"
            )
        params = jax.block_until_ready(flaxgpt.init(cfg, jax.random.key(0)))
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, cfg.vocab_size, (self.batch, length))
        shared = prompts[0, : self.prefix_length].tolist()
        prompts[:, : self.prefix_length] = shared
        prefix = flaxgpt.prefill(cfg, params, shared, dtype=self.dtype)
        store = flaxgpt.PrefixStore(cfg, params, max_bytes=prefix.nbytes, dtype=self.dtype)
        store.prefill(shared)

        def first_ids(prefix: flaxgpt.Prefix | None = None) -> list[list[int]]:
            return flaxgpt.generate(cfg, params, prompts, 1, prefix=prefix, dtype=self.dtype)

        calls: dict[str, Callable[[], object]] = {
            "whole": first_ids,
            "prefix": lambda: first_ids(prefix),
            "stored": lambda: first_ids(store.prefill(shared)),
            "prefill": lambda: jax.block_until_ready(
                flaxgpt.prefill(cfg, params, shared, dtype=self.dtype)
            ),
        }
        ms: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(1 + self.repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                ms[name].append(1000 * (time.perf_counter() - start))
        timed_ms = {name: values[1:] for name, values in ms.items()}
        ratios = [a / b for a, b in zip(timed_ms["whole"], timed_ms["prefix"], strict=True)]
        return {
            "ms": {name: spread(values) for name, values in timed_ms.items()},
            "ratio": spread(ratios),
        }


Task = Decode | Train | Prefix | Drafts | DraftModel | Device
TASKS: dict[str, Callable[..., Task]] = {
    "decode": Decode,
    "train": Train,
    "prefix": Prefix,
    "drafts": Drafts,
    "draft-model": DraftModel,
    "device": Device,
}


def main() -> None:
    """Parse the command line, run the benchmark and print the result."""
    task = tyro.extras.subcommand_cli_from_dict(TASKS, description=__doc__)
    try:
        if isinstance(task, Prefix):
            _print(task, task.run())
            return
        _check(task, "rounds")
        if isinstance(task, Device):
            task.run()
        elif isinstance(task, Drafts | DraftModel):
            _print(task, task.run())
        else:
            _measure(task)
    except ValueError as error:
        raise SystemExit(f"bench.py: {error}") from None


def _measure(task: Decode | Train) -> None:
    """Run a benchmark, alone or in turn with a peer, and print the result."""
    if task.against is None:
        figures = task.run()
    else:
        alone = [sys.executable, __file__, _name(task)]
        for option, value in dataclasses.asdict(task).items():
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                alone.append(f"--{flag}" if value else f"--no-{flag}")
            elif option not in ("against", "rounds"):
                alone += [f"--{flag}", str(value)]
        figures = in_turn(alone, task.against, task.rounds)
    _print(task, figures)


def _name(task: Task) -> str:
    return next(name for name, kind in TASKS.items() if kind is type(task))


def _print(task: Task, figures: Figures) -> None:
    print(json.dumps({"task": _name(task)} | dataclasses.asdict(task) | machine() | figures))


def _check(task: Task, *names: str) -> None:
    """Raise ValueError unless these options are whole numbers, 1 or more."""
    from flaxgpt._checks import check_size

    for name in names:
        check_size(f"--{name.replace('_', '-')}", getattr(task, name))


if __name__ == "__main__":
    main()
