"""What drafts save: the tasks `drafts` and `draft-model` of scripts/bench.py.

For `drafts`, the weights are random, but the texts are not: a hook makes the model write a given
text, so drafts are accepted as they would be by a model that writes it. The texts are tokens of
GPT-2:

    ordinary   a story
    quote      the same story, which repeats a passage of the prompt
    list       lines that differ in a few tokens
    code       a module of flaxgpt

For each, `generate` with and without drafts takes turns, all in one process. The peer is Hugging
Face's `generate` with and without `prompt_lookup_num_tokens`, in a process of its own, in the same
turns (scripts/drafts_peer.py, which needs torch and transformers).

For `draft-model`, the first blocks of a random model draft for all of them, and what the other
blocks add to the states is scaled down: at 0 every draft is right, and the larger the scale, the
fewer are.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from timing import Figures, spread

_ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("ordinary", "quote", "list", "code")


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Tokens per second of `generate` with and without `lookup`, on texts of several kinds."""

    preset: str = "gpt2"
    """Name of a `GPTConfig` preset with GPT-2's vocabulary."""
    lookup: int = 8
    """Ids in a draft."""
    batch: int = 1
    prompt_length: int = 192
    new_tokens: int = 128
    rounds: int = 5
    """Timed calls of each kind, after one that compiles."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    int8: bool = False
    """Whether weights are int8, by `flaxgpt.quantize`."""
    peer: str | None = None
    """Python with torch and transformers, to time Hugging Face's prompt lookup too."""

    def run(self) -> Figures:
        """Measure, one kind of text after another."""
        import jax

        import flaxgpt
        from flaxgpt._checks import check_size

        for name in ("lookup", "batch", "prompt_length", "new_tokens"):
            check_size(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.peer and self.batch > 1:
            raise ValueError(f"--peer looks up drafts for one row: use --batch 1, not {self.batch}")
        cfg = flaxgpt.GPTConfig.preset(self.preset)
        params = flaxgpt.init(cfg, jax.random.key(0))
        params = jax.block_until_ready(flaxgpt.quantize(params) if self.int8 else params)
        return {"texts": {name: self._measure(cfg, params, _text(name, self)) for name in TEXTS}}

    def _measure(self, cfg: Any, params: Any, ids: list[int]) -> Figures:
        import numpy as np
        from jax.tree_util import Partial

        import flaxgpt
        from flaxgpt.generation import Sampling
        from flaxgpt.generation.drafting import Drafting
        from flaxgpt.generation.prompts import prepare

        prompts = [ids[: self.prompt_length]] * self.batch
        hook = Partial(_write, np.array(ids, np.int32))

        def call(lookup: int | None) -> None:
            rows = flaxgpt.generate(
                cfg,
                params,
                prompts,
                self.new_tokens,
                logits_fn=hook,
                lookup=lookup,
                dtype=self.dtype,
            )
            assert rows == [ids[self.prompt_length :]] * self.batch

        calls: dict[str, Callable[[], object]] = {
            "plain": partial(call, None),
            "lookup": partial(call, self.lookup),
        }
        peer = _Peer(self, cfg, ids) if self.peer else None
        if peer:
            calls |= {"peer plain": partial(peer, 0), "peer lookup": partial(peer, self.lookup)}
        rates = _in_turn(calls, self.rounds, self.batch * self.new_tokens)
        if peer:
            peer.close()

        sampling = Sampling(logits_fn=hook)
        prepared = prepare(cfg, params, prompts, self.new_tokens, sampling, self.dtype)
        _, counts = Drafting(lookup=self.lookup).add_to(prepared).decode()
        figures = {name: spread(values) for name, values in rates.items()}
        pairs = [("lookup", "plain")] + [("lookup", "peer lookup")] * bool(peer)
        for ours, other in pairs:
            ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
            figures[f"{ours} / {other}"] = spread(ratios)
        return figures | _steps(counts, self.new_tokens)


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Tokens per second of `generate` with and without `draft`, a model's own first blocks."""

    preset: str = "gpt2"
    """Name of a `GPTConfig` preset."""
    blocks: int = 2
    """How many blocks of the model draft for it."""
    scale: float = 0.0
    """Factor of what the other blocks add; 0 makes every draft right."""
    draft_length: int = 4
    batch: int = 1
    prompt_length: int = 192
    new_tokens: int = 128
    rounds: int = 5
    """Timed calls of each kind, after one that compiles."""
    temperature: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    int8: bool = False
    """Whether the weights of both are int8, by `flaxgpt.quantize`."""

    def run(self) -> Figures:
        """Measure `generate` with and without drafts in turn."""
        import jax
        import numpy as np

        import flaxgpt
        from flaxgpt._checks import check_size
        from flaxgpt.generation import Sampling
        from flaxgpt.generation.drafting import Drafting
        from flaxgpt.generation.prompts import prepare

        for name in ("blocks", "draft_length", "batch", "prompt_length", "new_tokens"):
            check_size(f"--{name.replace('_', '-')}", getattr(self, name))
        cfg = flaxgpt.GPTConfig.preset(self.preset)
        if self.blocks > cfg.n_layers:
            raise ValueError(
                f"--blocks {self.blocks} is more than the {cfg.n_layers} blocks of {self.preset}"
            )
        params, key = flaxgpt.init(cfg, jax.random.key(0)), jax.random.key(1)
        others = cfg.block_names[self.blocks :]
        small = {name: part for name, part in params.items() if name not in others}
        params |= {name: _scaled(params[name], self.scale) for name in others}
        if self.int8:
            params, small = flaxgpt.quantize(params), flaxgpt.quantize(small)
        draft = (dataclasses.replace(cfg, n_layers=self.blocks), small)

        shape = (self.batch, self.prompt_length)
        prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, shape)
        call = partial(
            flaxgpt.generate,
            cfg,
            params,
            prompts,
            self.new_tokens,
            temperature=self.temperature,
            key=key,
            dtype=self.dtype,
        )
        calls: dict[str, Callable[[], object]] = {
            "plain": call,
            "draft": partial(call, draft=draft, draft_length=self.draft_length),
        }
        rates = _in_turn(calls, self.rounds, self.batch * self.new_tokens)
        ratios = [a / b for a, b in zip(rates["draft"], rates["plain"], strict=True)]

        sampling = Sampling(self.temperature, key=key)
        prepared = prepare(cfg, params, list(prompts), self.new_tokens, sampling, self.dtype)
        drafting = Drafting(draft=draft, draft_length=self.draft_length)
        _, counts = drafting.add_to(prepared).decode()
        return {
            "size_of_draft": flaxgpt.count_params(small).bytes / flaxgpt.count_params(params).bytes,
            **{name: spread(values) for name, values in rates.items()},
            "ratio": spread(ratios),
            **_steps(counts, self.new_tokens),
        }


def _steps(counts: Any, new_tokens: int) -> Figures:
    """Return what the steps after the prompts were."""
    import numpy as np

    verifying, accepted = int(counts.verifying), float(np.mean(counts.accepted))
    return {
        "plain_steps": int(counts.plain),
        "verifying_steps": verifying,
        "accepted_per_verifying_step": accepted / max(1, verifying),
        "ids_per_step": (new_tokens - 1) / max(1, int(counts.plain) + verifying),
    }


def _scaled(block: Any, scale: float) -> Any:
    """Return the parameters of a block that adds `scale` times as much to the states."""
    import jax

    def scaled(linear: Any) -> Any:
        return jax.tree.map(lambda x: x * scale, linear)

    att, ff = block["att"], block["ff"]
    return block | {
        "att": att | {"out_proj": scaled(att["out_proj"])},
        "ff": ff | {"layers_2": scaled(ff["layers_2"])},
    }


def _write(text: Any, ids: Any, length: Any, logits: Any) -> Any:
    """Make the next id of a text the most likely one, whatever the model says."""
    import jax.numpy as jnp

    right = text[jnp.minimum(length, len(text) - 1)]
    return jnp.where(jnp.arange(logits.shape[1])[None] == right[:, None], 1e9, logits)


def _in_turn(
    calls: dict[str, Callable[[], object]], rounds: int, tokens: int
) -> dict[str, list[float]]:
    """Return the tokens per second of each call in each round, after one round that compiles."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            seconds = call()
            seconds = seconds if isinstance(seconds, float) else time.perf_counter() - start
            rates[name].append(tokens / seconds)
    return {name: values[1:] for name, values in rates.items()}


class _Peer:
    """Hugging Face's `generate` in another process; a call returns how many seconds it took."""

    def __init__(self, task: Drafts, cfg: Any, ids: list[int]) -> None:
        command = [str(task.peer), str(Path(__file__).with_name("drafts_peer.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = {"cfg": cfg.to_dict(), "ids": ids, "new_tokens": task.new_tokens}
        self._send(first | {"batch": task.batch, "dtype": task.dtype})

    def __call__(self, lookup: int) -> float:
        self._send({"lookup": lookup})
        assert self._process.stdout
        return float(self._process.stdout.readline())

    def _send(self, message: Figures) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _text(name: str, task: Drafts) -> list[int]:
    """Return the ids of a text: the prompt and what the model is to write."""
    import flaxgpt

    total = task.prompt_length + task.new_tokens
    encode = flaxgpt.load_tokenizer("gpt2").encode
    story = encode((_ROOT / "tests/data/verdict/the-verdict.txt").read_text())
    match name:
        case "quote":
            passage, lead = story[: task.prompt_length - 8], encode("\n\nHe read it again:\n\n")
            before = (passage + lead)[-task.prompt_length :]
            ids = before + passage * (1 + task.new_tokens // len(passage))
        case "list":
            prices = ((i * 37) % 90 + 10 for i in range(total))
            ids = encode(
                "".join(f"- item {i}: {price} dollars\n" for i, price in enumerate(prices))
            )
        case "code":
            ids = encode((_ROOT / "flaxgpt/cache.py").read_text())
        case _:
            ids = story
    if len(ids) < total:
        raise ValueError(
            f"the text has {len(ids)} tokens, but --prompt-length and --new-tokens ask for {total}"
        )
    return ids[:total]
