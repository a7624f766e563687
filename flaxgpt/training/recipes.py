"""Published training recipes: an architecture together with how it is trained."""

from __future__ import annotations

import dataclasses
from functools import partial

from flaxgpt._checks import unknown_name
from flaxgpt.config import GPTConfig
from flaxgpt.training.config import TrainConfig


def recipe(name: str) -> tuple[GPTConfig, TrainConfig]:
    """Return a published recipe: the architecture and the training configuration.

    Args:
        name: `shakespeare-char` (nanoGPT's README at four times its learning rate), `tales` (the
            model included in flaxgpt; see scripts/build_tales), `gpt2` (nanoGPT's
            config/train_gpt2.py) or `verdict` (chapter 5 of the book).

    Raises:
        ValueError: the name is unknown. The message suggests the closest ones.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]


# For fine-tuning an existing model: a tenth of the learning rate used from scratch, and a log line
# for each step, because a step of GPT-2 takes seconds on CPU.
FINE_TUNING = TrainConfig(
    steps=200,
    batch_size=4,
    learning_rate=1e-4,
    min_learning_rate_fraction=0.0,
    steps_per_call=1,
    log_every=1,
    eval_every=20,
    eval_windows=100,
    save_every=100,
    sample_every=100,
)

_tied = partial(GPTConfig, drop_rate=0.0, tie_embeddings=True)

RECIPES: dict[str, tuple[GPTConfig, TrainConfig]] = {
    "shakespeare-char": (
        _tied(vocab_size=65, context_length=64, emb_dim=128, n_heads=4, n_layers=4),
        # Validation loss over all 1,742 windows: 1.91 with nanoGPT's 1e-3 (its README reports 1.88
        # over 240 windows), 1.80 with 2e-3, 1.76 with 4e-3.
        TrainConfig(tokenizer="characters", learning_rate=4e-3),
    ),
    "tales": (
        # 29 epochs: 1.292 bits per byte. 1.295 with 20 epochs and dropout 0.1.
        _tied(
            vocab_size=4096, context_length=256, emb_dim=256, n_heads=4, n_layers=6, drop_rate=0.15
        ),
        TrainConfig(
            tokenizer="tales",
            steps=8000,
            batch_size=64,
            optimizer="muon",
            learning_rate=5e-3,
            min_learning_rate_fraction=0.0,
            warmup_fraction=1 / 18,
            beta2=0.95,
            dtype="bfloat16",
            log_every=50,
            eval_every=500,
            eval_windows=200,
            save_every=500,
            sample_every=2000,
            sample_tokens=150,
            sample_prompt="Once upon a time",
        ),
    ),
    "gpt2": (
        dataclasses.replace(GPTConfig.preset("gpt2"), drop_rate=0.0),
        TrainConfig(
            tokenizer="gpt2",
            steps=600_000,
            batch_size=480,
            accumulate=40,
            learning_rate=6e-4,
            warmup_fraction=2000 / 600_000,
            beta2=0.95,
            val_fraction=0.0005,
            dtype="bfloat16",
            steps_per_call=1,
            eval_every=1000,
            save_every=1000,
            sample_every=1000,
        ),
    ),
    "verdict": (
        GPTConfig(context_length=256),
        TrainConfig(
            tokenizer="gpt2",
            init_from="book",
            steps=90,  # 10 epochs of 9 batches
            batch_size=2,
            windows="aligned",
            learning_rate=4e-4,
            min_learning_rate_fraction=1.0,
            warmup_fraction=0.0,
            beta2=0.999,
            decay="everything",
            grad_clip=0.0,
            steps_per_call=1,
            log_every=1,
            eval_every=9,
            save_every=45,
            keep=1,
            sample_every=9,
            sample_tokens=50,
            sample_prompt="Every effort moves you",
        ),
    ),
}
