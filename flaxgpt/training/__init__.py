"""The pure pieces of training: configuration, loss, optimizer, and the update step."""

from flaxgpt.training.config import TrainConfig, preset
from flaxgpt.training.losses import evaluate, loss
from flaxgpt.training.optimizer import make_optimizer
from flaxgpt.training.step import TrainState, init_state, train_step, train_steps

__all__ = [
    "TrainConfig",
    "TrainState",
    "evaluate",
    "init_state",
    "loss",
    "make_optimizer",
    "preset",
    "train_step",
    "train_steps",
]
