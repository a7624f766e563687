"""Training: from text files to a model, and the pure pieces that it is made of."""

from typing import TYPE_CHECKING, Any

from flaxgpt.training.config import TrainConfig, preset
from flaxgpt.training.loss import evaluate, loss
from flaxgpt.training.optimizer import make_optimizer
from flaxgpt.training.run import read_run
from flaxgpt.training.step import TrainState, init_state, train_step, train_steps

if TYPE_CHECKING:
    from flaxgpt.training.loop import DivergedError, Outcome, train

__all__ = [
    "DivergedError",
    "Outcome",
    "TrainConfig",
    "TrainState",
    "evaluate",
    "init_state",
    "loss",
    "make_optimizer",
    "preset",
    "read_run",
    "train",
    "train_step",
    "train_steps",
]


def __getattr__(name: str) -> Any:
    # The loop needs orbax, whose import takes as long as loading a small model.
    if name in ("DivergedError", "Outcome", "train"):
        from flaxgpt.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
