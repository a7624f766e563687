"""The pure parts of training: configuration, recipes, losses, optimizer and training step."""

from flaxgpt.training.config import TrainConfig
from flaxgpt.training.losses import Batch, LossFn, loss, mean_loss, token_loss
from flaxgpt.training.optimizer import make_optimizer
from flaxgpt.training.recipes import recipe
from flaxgpt.training.step import TrainState, abstract_state, init_state, train_step, train_steps

__all__ = [
    "Batch",
    "LossFn",
    "TrainConfig",
    "TrainState",
    "abstract_state",
    "init_state",
    "loss",
    "make_optimizer",
    "mean_loss",
    "recipe",
    "token_loss",
    "train_step",
    "train_steps",
]
