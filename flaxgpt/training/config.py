"""How a model is trained, as opposed to what it is: `TrainConfig`, and the known recipes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from flaxgpt._checks import check_size
from flaxgpt.config import GPTConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run but for the architecture. Frozen and hashable.

    Attributes:
        data: text files, UTF-8.
        validation_data: text files to validate on; if none, the end of `data`.
        val_fraction: share of the characters of `data` kept for validation.
        errors: `strict` refuses bytes that are not UTF-8, `replace` reads them as U+FFFD.
        tokenizer: `gpt2`, `tales`, `characters` (those of `data`) or the folder of a model; if
            empty, that of the model it starts from; GPT-2's from scratch.
        init_from: `scratch`; `book` (the book's initial weights for seed 123); what
            `flaxgpt.load` takes, to fine-tune; or the run's own folder, to resume it.
        steps: optimiser updates.
        batch_size: windows an update, over all processes and pieces.
        windows: `shifted` cuts the text elsewhere in each epoch, `aligned` always at multiples of
            the context (the book's data loader with stride = context).
        optimizer: `adamw`, or `muon` for the blocks' matrices and AdamW for the rest (Jordan et
            al. 2024; scaled as Liu et al. 2025, so that AdamW's rates serve).
        learning_rate: the highest, reached after the warm-up.
        min_learning_rate: where the cosine ends.
        warmup_steps: updates of linear growth.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        eps: AdamW's guard against division by 0.
        weight_decay: AdamW's, on what `decay` names.
        decay: `matrices` (and embeddings, as nanoGPT) or `everything` (as PyTorch's default).
        grad_clip: largest global norm of the gradient; 0 leaves it as it is.
        accumulate: pieces that a batch goes through the model in, one after the other, to save
            memory; the update is that of the whole batch.
        dtype: what the model computes in; parameters and optimiser state stay float32.
        remat: compute each block's activations again in the backward pass instead of keeping them.
        seed: of initial parameters, order of the data, dropout and samples.
        steps_per_call: updates a jitted call, which small models on CPU gain much from.
        log_every: updates between two reports.
        eval_every: updates between two validations.
        eval_windows: windows a validation, evenly spread; 0 takes all.
        save_every: updates between two checkpoints; there is one at each validation besides.
        keep: latest checkpoints kept, besides the best.
        sample_every: updates between two samples of text; 0 takes none.
        sample_tokens: length of a sample.
        sample_prompt: what a sample starts from; the start of the validation text if empty.

    Raises:
        ValueError: a value that no run can have; the message says what to change.
    """

    data: tuple[str, ...] = ()
    validation_data: tuple[str, ...] = ()
    val_fraction: float = 0.1
    errors: Literal["strict", "replace"] = "strict"
    tokenizer: str = ""
    init_from: str = "scratch"

    steps: int = 2000
    batch_size: int = 12
    windows: Literal["shifted", "aligned"] = "shifted"
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "everything"] = "matrices"
    grad_clip: float = 1.0
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    seed: int = 0

    steps_per_call: int = 10
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int = 2000
    save_every: int = 250
    keep: int = 2
    sample_every: int = 500
    sample_tokens: int = 100
    sample_prompt: str = ""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int:
                floor = 0 if name in _MAY_BE_ZERO else 1
                object.__setattr__(self, name, check_size(name, value, floor))
            elif kind is float:
                object.__setattr__(self, name, _number(name, value))
            elif kind in (bool, str):
                if not isinstance(value, kind):
                    raise ValueError(f"{name}={value!r} must be a {kind.__name__}")
            elif options := get_args(kind):
                if name in ("data", "validation_data"):
                    object.__setattr__(self, name, _paths(name, value))
                elif value not in options:
                    raise ValueError(f"{name}={value!r} must be one of {', '.join(options)}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate=0.0 would leave the parameters as they are: try 1e-3")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above "
                f"learning_rate={self.learning_rate}, from which the cosine falls: lower it"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be fewer than steps={self.steps}"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}: the "
                "pieces must be equal for their mean to be the batch's"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to {2**32 - 1}")
        for name in ("beta1", "beta2", "val_fraction"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 up to, not incl., 1")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Reads what `to_dict` gives.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown training settings {unknown}: expected some of {known}")
        return cls(**values)


_MAY_BE_ZERO = ("warmup_steps", "seed", "eval_windows", "sample_every")


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number, 0 or more")
    return number


def _paths(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, os.PathLike)):
        value = os.fspath(value)
        raise ValueError(f"{name}={value!r} must be a tuple of files, even of one: ({value!r},)")
    return tuple(os.fspath(path) for path in value)


def preset(name: str) -> tuple[GPTConfig, TrainConfig]:
    """Returns a known recipe: the architecture, and how it is trained.

    Args:
        name: `shakespeare-char` (nanoGPT's README, "I only have a macbook", at four times its
            learning rate: validation loss 1.76), `tales` (the model that ships with flaxgpt;
            scripts/build_tales), `gpt2` (nanoGPT's config/train_gpt2.py), `verdict` (the book's
            chapter 5).

    Raises:
        ValueError: an unknown name; the message has the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no training preset {name!r}: {hint}There are {', '.join(PRESETS)}")
    return PRESETS[name]


# From a model's weights on. The rate is a tenth of what training from scratch takes; every step is
# told of, as one of GPT-2's takes seconds on CPU.
FINE_TUNING = TrainConfig(
    steps=200,
    batch_size=4,
    learning_rate=1e-4,
    min_learning_rate=0.0,
    warmup_steps=10,
    steps_per_call=1,
    log_every=1,
    eval_every=20,
    eval_windows=100,
    save_every=100,
    sample_every=100,
)

PRESETS: dict[str, tuple[GPTConfig, TrainConfig]] = {
    "shakespeare-char": (
        GPTConfig(
            vocab_size=65,
            context_length=64,
            emb_dim=128,
            n_heads=4,
            n_layers=4,
            drop_rate=0.0,
            tie_embeddings=True,
        ),
        # nanoGPT has 1e-3 and reports 1.88, of 240 windows; here that gives 1.91 of all 1,742
        # windows, 2e-3 1.80 and 4e-3 1.76.
        TrainConfig(tokenizer="characters", learning_rate=4e-3, min_learning_rate=4e-4),
    ),
    "tales": (
        GPTConfig(
            vocab_size=4096,
            context_length=256,
            emb_dim=256,
            n_heads=4,
            n_layers=6,
            drop_rate=0.0,
            tie_embeddings=True,
        ),
        TrainConfig(
            tokenizer="tales",
            steps=1800,
            batch_size=16,
            optimizer="muon",
            learning_rate=5e-3,
            min_learning_rate=0.0,
            warmup_steps=100,
            beta2=0.95,
            steps_per_call=5,
            eval_every=200,
            eval_windows=200,
            save_every=100,
            sample_every=400,
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
            min_learning_rate=6e-5,
            warmup_steps=2000,
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
            min_learning_rate=4e-4,
            warmup_steps=0,
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
