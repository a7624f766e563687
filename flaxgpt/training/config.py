"""`TrainConfig`: how a model is trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from flaxgpt._checks import below_one, check_float32, check_keys, check_nonnegative, check_size


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything about a training run except the architecture. Frozen and hashable.

    Attributes:
        data: text files to train on, UTF-8 or JSON Lines (.jsonl), may be compressed (.gz); a
            folder stands for all files in it that are not hidden.
        validation_data: text to validate on, likewise; if empty, the end of `data` is held out.
        val_fraction: fraction of the characters of `data` held out for validation.
        errors: `strict` rejects bytes that are not UTF-8, `replace` reads them as U+FFFD.
        text_field: the field of the text in JSON Lines.
        document_separator: text that separates documents in a file, such as `<|endoftext|>`; if
            empty, each file or line of JSON Lines is one document.
        tokenizer: `gpt2`, `tales`, `characters` (those in `data`) or the folder of a model; if
            empty, that of `init_from`, or GPT-2's from scratch.
        init_from: `scratch`, `book` (the book's initial weights for seed 123), a model to fine-tune
            (anything that `flaxgpt.load` accepts), or the run's own folder, to resume it.
        steps: optimizer steps.
        batch_size: sequences per optimizer step, across all processes and accumulation steps.
        windows: `shifted` cuts the text at a new offset in each epoch, `aligned` always at
            multiples of the context length (the book's data loader with stride = context length).
        optimizer: `adamw`, or `muon` (Jordan et al. 2024) for the matrices of the blocks and AdamW
            for the rest, scaled for AdamW's learning rates (Liu et al. 2025).
        learning_rate: peak learning rate, reached at the end of the warm-up.
        min_learning_rate_fraction: final learning rate of the cosine, as a fraction of the peak.
        min_learning_rate: absolute final learning rate of the cosine; overrides the fraction.
        warmup_fraction: length of the linear warm-up, as a fraction of the steps.
        warmup_steps: warm-up steps; overrides the fraction.
        beta1: AdamW's decay rate for the mean of the gradient.
        beta2: AdamW's decay rate for the mean of the squared gradient.
        eps: AdamW's epsilon, added to the denominator.
        weight_decay: weight decay of the parameters selected by `decay`.
        decay: `matrices` (including embeddings, as in nanoGPT) or `everything` (PyTorch's default).
        grad_clip: maximum global norm of the gradient; 0 disables clipping.
        accumulate: pieces into which a batch is split to save memory; without dropout, the gradient
            is the same up to rounding.
        dtype: dtype to compute in; parameters and optimizer state are always float32.
        remat: recompute each block's activations in the backward pass to save memory.
        seed: seed of the initial parameters, data order, dropout and samples.
        steps_per_call: optimizer steps per jitted call; more than 1 speeds up small models on CPU.
        log_every: steps between log lines.
        eval_every: steps between validations.
        eval_windows: sequences per validation, evenly spaced; 0 uses all.
        save_every: steps between checkpoints; every validation saves one too.
        keep: number of most recent checkpoints to keep, besides the best one.
        sample_every: steps between text samples; 0 disables them.
        sample_tokens: tokens per sample.
        sample_prompt: prompt of the samples; if empty, the beginning of the validation text.

    Raises:
        ValueError: a value is invalid. The message says what to change.
    """

    data: tuple[str, ...] = ()
    validation_data: tuple[str, ...] = ()
    val_fraction: float = 0.1
    errors: Literal["strict", "replace"] = "strict"
    text_field: str = "text"
    document_separator: str = ""
    tokenizer: str = ""
    init_from: str = "scratch"

    steps: int = 2000
    batch_size: int = 12
    windows: Literal["shifted", "aligned"] = "shifted"
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate_fraction: float = 0.1
    min_learning_rate: float | None = None
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None
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
            if value is not None or type(None) not in get_args(kind):
                object.__setattr__(self, name, _checked(name, kind, value))
        for name in ("beta1", "beta2", "val_fraction", "warmup_fraction"):
            if not below_one(value := getattr(self, name)):
                rounded = " in float32" if value < 1 else ""
                raise ValueError(f"{name}={value} must be at least 0 and below 1{rounded}")
        if (fraction := self.min_learning_rate_fraction) > 1:
            raise ValueError(f"min_learning_rate_fraction={fraction} must be from 0 to 1")
        if self.learning_rate == 0:
            raise ValueError("learning_rate=0.0 would not change the parameters: try 1e-3")
        if self.eps == 0:
            raise ValueError("eps=0.0 would divide 0 by 0 where a gradient is 0: try 1e-8")
        if self.resolved_min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} must not exceed "
                f"learning_rate={self.learning_rate}, the peak of the schedule"
            )
        if self.resolved_warmup_steps >= (steps := self.steps):
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={steps}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size} into "
                "pieces of the same size"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to {2**32 - 1}")

    @property
    def resolved_min_learning_rate(self) -> float:
        """Learning rate at the end of the schedule."""
        relative = self.min_learning_rate_fraction * self.learning_rate
        return relative if self.min_learning_rate is None else self.min_learning_rate

    @property
    def resolved_warmup_steps(self) -> int:
        """Number of warm-up steps."""
        relative = min(round(self.warmup_fraction * self.steps), self.steps - 1)
        return relative if self.warmup_steps is None else self.warmup_steps

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read the output of `to_dict`; an unknown key raises ValueError."""
        check_keys("training settings", values, cls)
        return cls(**values)


_MAY_BE_ZERO = ("warmup_steps", "seed", "eval_windows", "sample_every")


def _checked(name: str, kind: Any, value: Any) -> Any:
    """Return a field's value as its type, or raise ValueError."""
    if kind in (int, int | None):
        return check_size(name, value, 0 if name in _MAY_BE_ZERO else 1)
    if kind in (float, float | None):
        # Fractions are multiplied on the host, in float64.
        return (check_nonnegative if name.endswith("_fraction") else check_float32)(name, value)
    if kind == tuple[str, ...]:
        if isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            raise ValueError(f"{name}={path!r} must be a tuple of files; for one file, ({path!r},)")
        return tuple(os.fspath(path) for path in value)
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be a {kind.__name__}")
    elif value not in get_args(kind):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(get_args(kind))}")
    return value
