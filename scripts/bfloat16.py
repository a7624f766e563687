"""Compare bfloat16 and int8 with float32, and print the tables of docs/precision.md in Markdown.

    python scripts/bfloat16.py models --text val.txt
    python scripts/bfloat16.py training --text shakespeare.txt --steps 1000

`models` measures `tales` and the small golden models of the tests. The reference is float32, with
matrix products at the highest precision. `training` trains `shakespeare-char` in both dtypes from
the same seed, and compares the smoothed losses.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxgpt
from flaxgpt.data import batches
from flaxgpt.evaluation import evaluate_text
from flaxgpt.training import init_state, recipe, train_steps

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
NEW_TOKENS = 200
PROMPTS = 8


class Measured(NamedTuple):
    """How one way of computing differs from float32."""

    error: float  # the largest difference of a logit, relative to the largest logit
    cached_error: float  # the same between logits with a cache and without one
    same_choice: float  # share of ids after which the most likely next id is the same
    same_ids: float  # ids before the first difference of greedy text, mean over prompts
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Models:
    """Logits, greedy ids and perplexity of finished models."""

    text: Path
    """Held-out text for `tales`."""

    characters: int = 200_000
    """Characters of it that are read."""

    def run(self) -> None:
        """Print a table."""
        names = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
        names += [("float32", "int8"), ("bfloat16", "int8")]
        header = "computed in | weights | logit error | cache error | same next id | same ids of "
        print(f"| model | {header}{NEW_TOKENS} | perplexity |\n|{' --- |' * 8}")
        for name, cfg, params, ids in self._models():
            reference = _reference(cfg, params, ids)
            for dtype, stored in names:
                weights = _stored_as(stored, params)
                found = _measure(cfg, weights, ids, dtype, reference)
                print(
                    f"| `{name}` | {dtype} | {stored} | {found.error:.1e} | "
                    f"{found.cached_error:.1e} | {found.same_choice:.1%} | {found.same_ids:.0f} | "
                    f"{found.perplexity:.3f} |",
                    flush=True,
                )

    def _models(self) -> Iterator[tuple[str, flaxgpt.GPTConfig, Any, np.ndarray]]:
        cfg, params, tokenizer = flaxgpt.load("tales")
        assert tokenizer is not None
        text = self.text.read_text(encoding="utf-8")[: self.characters]
        yield "tales", cfg, params, np.asarray(tokenizer.encode(text))
        for folder in sorted(GOLDEN.glob("*/expected.npz")):
            cfg, params, _ = flaxgpt.load(folder.parent)
            with np.load(folder) as file:
                yield folder.parent.name, cfg, params, file["input_ids"].ravel()


def _stored_as(dtype: str, params: Any) -> Any:
    if dtype == "int8":
        return flaxgpt.quantize(params)
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _reference(cfg: flaxgpt.GPTConfig, params: Any, ids: np.ndarray) -> dict[str, Any]:
    with jax.default_matmul_precision("highest"):
        rows = _rows(cfg, ids)
        return {
            "logits": np.asarray(flaxgpt.forward(cfg, params, rows)),
            "new": flaxgpt.generate(cfg, params, _prompts(cfg, ids), NEW_TOKENS),
        }


def _measure(
    cfg: flaxgpt.GPTConfig, params: Any, ids: np.ndarray, dtype: str, reference: dict[str, Any]
) -> Measured:
    rows = _rows(cfg, ids)
    logits = np.asarray(flaxgpt.forward(cfg, params, rows, dtype=dtype))
    largest = np.abs(reference["logits"]).max()
    cache = flaxgpt.init_cache(cfg, len(rows), rows.shape[1], dtype)
    step = jax.jit(lambda params, ids, cache: flaxgpt.extend(cfg, params, ids, cache))
    by_steps = []
    for position in range(rows.shape[1]):
        new, cache = step(params, rows[:, position : position + 1], cache)
        by_steps.append(new)
    cached = np.asarray(jnp.concatenate(by_steps, axis=1))
    new = flaxgpt.generate(cfg, params, _prompts(cfg, ids), NEW_TOKENS, dtype=dtype)
    same = [
        next((i for i, pair in enumerate(zip(a, b, strict=True)) if len({*pair}) > 1), NEW_TOKENS)
        for a, b in zip(reference["new"], new, strict=True)
    ]
    return Measured(
        error=np.abs(logits - reference["logits"]).max() / largest,
        cached_error=np.abs(cached - logits).max() / largest,
        same_choice=float(np.mean(logits.argmax(-1) == reference["logits"].argmax(-1))),
        same_ids=float(np.mean(same)),
        perplexity=evaluate_text(cfg, params, ids, dtype=dtype).perplexity,
    )


def _rows(cfg: flaxgpt.GPTConfig, ids: np.ndarray) -> np.ndarray:
    length = min(cfg.context_length, 256, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)[:PROMPTS]


def _prompts(cfg: flaxgpt.GPTConfig, ids: np.ndarray) -> list[list[int]]:
    return [row[: min(16, cfg.context_length // 2)].tolist() for row in _rows(cfg, ids)]


@dataclasses.dataclass(frozen=True)
class Training:
    """The loss of `shakespeare-char` in float32 and in bfloat16."""

    text: Path
    """Text to train on."""

    steps: int = 2000
    seed: int = 0

    def run(self) -> None:
        """Print the smoothed losses at ten places, and their largest relative difference."""
        curves = {dtype: self._losses(dtype) for dtype in ("float32", "bfloat16")}
        window = max(1, self.steps // 20)
        smooth = {
            dtype: np.convolve(losses, np.full(window, 1 / window), "valid")
            for dtype, losses in curves.items()
        }
        change = smooth["bfloat16"] / smooth["float32"] - 1
        print("| step | float32 | bfloat16 | difference |\n| --- | --- | --- | --- |")
        for place in np.linspace(0, len(change) - 1, 10).astype(int):
            values = " | ".join(f"{smooth[dtype][place]:.4f}" for dtype in smooth)
            print(f"| {place + window} | {values} | {change[place]:+.2%} |")
        print(f"\nLargest difference of the mean over {window} steps: {np.abs(change).max():.2%}.")

    def _losses(self, dtype: Any) -> np.ndarray:
        cfg, train_cfg = recipe("shakespeare-char")
        train_cfg = dataclasses.replace(train_cfg, steps=self.steps, dtype=dtype, seed=self.seed)
        text = self.text.read_text(encoding="utf-8")
        letters = sorted(set(text))
        ids = np.array([letters.index(c) for c in text], np.uint16)
        cfg = dataclasses.replace(cfg, vocab_size=len(letters))
        windows = batches(
            ids, length=cfg.context_length, batch_size=train_cfg.batch_size, seed=self.seed
        )
        state, losses = init_state(cfg, train_cfg), []
        for _ in range(self.steps // 10):
            state, metrics = train_steps(state, np.stack([next(windows) for _ in range(10)]))
            losses += metrics["loss"].tolist()
            print(f"{dtype}: step {len(losses)}, loss {losses[-1]:.3f}", end="\r", file=sys.stderr)
        return np.array(losses)


if __name__ == "__main__":
    commands: dict[str, Any] = {"models": Models, "training": Training}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__).run()
