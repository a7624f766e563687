"""Training runs: a folder on disk that can be stopped at any point and resumed."""

from typing import TYPE_CHECKING, Any

from flaxgpt.runs.folder import read_run

if TYPE_CHECKING:
    from flaxgpt.runs.loop import DivergedError, TrainResult, train

__all__ = ["DivergedError", "TrainResult", "read_run", "train"]


def __getattr__(name: str) -> Any:
    # The loop imports orbax, which takes as long as loading a small model.
    if name in ("DivergedError", "TrainResult", "train"):
        from flaxgpt.runs import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
