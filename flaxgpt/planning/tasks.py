"""What to plan: generation or a training step, and its sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
from jax.sharding import AbstractMesh, Mesh

from flaxgpt._checks import check_context, check_dtype, check_rate, check_size, unknown_name
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.abstract import abstract_arguments
from flaxgpt.generation.programs import compiled_decode
from flaxgpt.inspection import flops
from flaxgpt.model import param_shapes
from flaxgpt.planning.step_cost import abstract_step
from flaxgpt.platform import PLATFORMS, Platform
from flaxgpt.sharding import batch_parts, shard_rules
from flaxgpt.weights import quantize

if TYPE_CHECKING:
    from flaxgpt.training import TrainConfig

Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]


@dataclasses.dataclass(frozen=True)
class GenerateTask:
    """A call of `flaxgpt.generate`. A step is one new id for each row.

    Attributes:
        batch: number of prompts (B).
        prompt_length: ids per prompt.
        new_tokens: new ids per prompt.
        dtype: dtype to compute in and of the cache.
        int8: whether the weights are int8, as `flaxgpt.quantize` returns them.

    Raises:
        ValueError: a value is out of range.
    """

    batch: int = 1
    prompt_length: int = 128
    new_tokens: int = 128
    dtype: Dtype = "float32"
    int8: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_length", "new_tokens"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        object.__setattr__(self, "dtype", _check_dtype(self.dtype))
        if not isinstance(self.int8, bool):
            raise ValueError(f"int8={self.int8!r} must be True or False")

    def check(self, cfg: GPTConfig, mesh: Mesh) -> None:
        """Raise ValueError if the ids do not fit the context of a model."""
        if self.prompt_length > cfg.context_length:
            raise ValueError(
                f"prompt_length={self.prompt_length} exceeds context_length={cfg.context_length}, "
                "the longest sequence the model supports: use shorter prompts"
            )
        total = self.prompt_length + self.new_tokens
        if total > cfg.context_length + 1:  # the last id is never read
            raise ValueError(
                f"prompt_length={self.prompt_length} and new_tokens={self.new_tokens} exceed "
                f"context_length={cfg.context_length}, beyond which each id costs a full pass: "
                f"use new_tokens={cfg.context_length + 1 - self.prompt_length}, or shorter "
                "prompts"
            )

    def unit(self, mesh: Mesh) -> int:
        """Return the number of rows that the batch must be a multiple of."""
        return batch_parts(mesh)

    def tokens(self, cfg: GPTConfig) -> int:
        """Return the number of new ids in a step."""
        return self.batch

    def flops(self, cfg: GPTConfig) -> float:
        """Return the operations of the model's products in a step, halfway through generation."""
        count = flops(cfg, self.batch, 1)
        read = self.prompt_length + self.new_tokens / 2
        return count.forward_without_scores + count.scores * read

    def program(self, cfg: GPTConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """Return the program of `generate`, and its arguments on the devices of a mesh."""
        platform = PLATFORMS.get("tpu", Platform())
        shapes = param_shapes(cfg)
        arguments = abstract_arguments(
            *(cfg, self.batch, self.prompt_length, self.new_tokens, self.dtype),
            platform=platform,
            mesh=mesh,
            params=jax.eval_shape(quantize, shapes) if self.int8 else shapes,
        )
        return compiled_decode(platform.decode_options), arguments


@dataclasses.dataclass(frozen=True)
class TrainTask:
    """A step of training, `flaxgpt.training.train_step`.

    Attributes:
        batch: sequences per step, on all chips together (B).
        length: ids per sequence (T); None for the context length.
        dtype: dtype to compute in; weights and optimizer state are float32.
        remat: whether to recompute each block's activations in the backward pass.
        accumulate: pieces into which the batch is split to save memory.
        optimizer: "adamw" or "muon".
        drop_rate: rate of all dropout, instead of the configuration's rates. With dropout,
            compiling takes several times as long.

    Raises:
        ValueError: a value is out of range.
    """

    batch: int = 8
    length: int | None = None
    dtype: Dtype = "float32"
    remat: bool = False
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", check_size("batch", self.batch))
        object.__setattr__(self, "accumulate", check_size("accumulate", self.accumulate))
        if self.optimizer not in get_args(Optimizer):
            raise unknown_name("optimizer", self.optimizer, get_args(Optimizer))
        if self.length is not None:
            object.__setattr__(self, "length", check_size("length", self.length))
        object.__setattr__(self, "dtype", _check_dtype(self.dtype))
        if not isinstance(self.remat, bool):
            raise ValueError(f"remat={self.remat!r} must be True or False")
        object.__setattr__(self, "drop_rate", check_rate("drop_rate", self.drop_rate))

    def check(self, cfg: GPTConfig, mesh: Mesh | AbstractMesh) -> None:
        """Raise ValueError if the length does not fit a model, or the batch a mesh."""
        check_context(cfg.context_length, self._length(cfg))
        if self.batch % self.unit(mesh):
            raise ValueError(
                f"batch={self.batch} must be a multiple of {self.unit(mesh)}, the number of parts "
                "into which data, fsdp and accumulate split it: use "
                f"batch={self.unit(mesh) * math.ceil(self.batch / self.unit(mesh))}"
            )

    def unit(self, mesh: Mesh | AbstractMesh) -> int:
        """Return the number of rows that the batch must be a multiple of."""
        return batch_parts(mesh) * self.accumulate

    def tokens(self, cfg: GPTConfig) -> int:
        """Return the number of ids in a step."""
        return self.batch * self._length(cfg)

    def flops(self, cfg: GPTConfig) -> float:
        """Return the operations of the model's products in a step; recomputed ones do not count."""
        return flops(cfg, self.batch, self._length(cfg)).training

    def program(self, cfg: GPTConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """Return the step, and its arguments on the devices of a mesh."""
        from flaxgpt.training import train_step  # slow to import

        cfg = dataclasses.replace(
            cfg,
            drop_rate=self.drop_rate,
            drop_rate_emb=None,
            drop_rate_attn=None,
            drop_rate_shortcut=None,
        )
        rules, length = shard_rules(cfg), self._length(cfg)
        return train_step, abstract_step(cfg, self.train_config(), mesh, rules, length)

    def train_config(self) -> TrainConfig:
        """Return the training configuration of the step."""
        from flaxgpt.training import TrainConfig  # slow to import

        return TrainConfig(
            batch_size=self.batch,
            accumulate=self.accumulate,
            optimizer=self.optimizer,
            dtype=self.dtype,
            remat=self.remat,
        )

    def _length(self, cfg: GPTConfig) -> int:
        return cfg.context_length if self.length is None else self.length


def check_inputs(cfg: GPTConfig, task: GenerateTask | TrainTask) -> None:
    """Raise ValueError unless these are a configuration and a task."""
    check_config(cfg)
    if not isinstance(task, GenerateTask | TrainTask):
        raise ValueError(f"task={task!r} must be a flaxgpt.GenerateTask or a flaxgpt.TrainTask")


def _check_dtype(dtype: Any) -> str:
    """Return the name of a dtype that TPUs compute in, or raise ValueError."""
    name = check_dtype(dtype).name
    if name not in get_args(Dtype):
        raise ValueError(f"dtype={dtype!r} must be {' or '.join(get_args(Dtype))} for a TPU")
    return name
