"""What a person sees of a training run: progress, metrics, a picture of the loss, samples."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from flaxgpt._files import write_file_atomically
from flaxgpt.runs.curves import draw_loss
from flaxgpt.runs.journal import (
    append,
    cut_back,
    metrics_line,
    naming,
    read_metrics,
    sample_block,
    visible,
)


class Report:
    """Tells of a run on standard error and in its folder, from entering to leaving a `with`.

    On a terminal a bar moves at the bottom and all else scrolls past above it; in a notebook the
    bar stays on top; elsewhere every call is a line. The folder gets metrics.jsonl, samples.txt and
    loss.png. On entering, the first two are cut back to `start_step`, so that a step that a killed
    run had told of is there once: what concerns a step is told before its checkpoint is written.

    Every method may raise OSError where a file cannot be written; it names the file.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        """Takes the run's folder, which must be there, and where to begin.

        Args:
            folder: of the run.
            total_steps: the step at which the run ends.
            start_step: the step of the checkpoint to go on from; 0 begins anew, and what the
                folder tells of an earlier run is dropped.
            console: where to show progress, standard error if not given.
        """
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.txt"
        self._picture = folder / "loss.png"
        self._draws = True
        self._total, self._start = total_steps, start_step
        self._told = start_step
        self._recent_steps = self._recent_seconds = 0.0
        self._console = Console(stderr=True) if console is None else console
        # In a notebook rich's bar is a widget.
        self._live = self._console.is_interactive or (
            self._console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        )
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            # Prints on the same terminal must not tear the bar; those into a file stay there.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(
            self._place(start_step), completed=start_step, total=total_steps, figures="compiling"
        )

    def __enter__(self) -> Report:
        cut_back(self._metrics, self._samples, self._start)
        if self._live:
            self._bar.start()
            self._console.show_cursor(True)  # a killed run would leave the terminal without one
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.stop()

    def training(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """Tells of the steps since the last such call.

        Args:
            step: the last one done, counted from 1.
            loss: of them, in nats per token.
            learning_rate: of the last one.
            grad_norm: the gradient's norm before it was clipped.
            tokens: trained on in them.
            seconds: spent in them, compiling and evaluating left out; above 0.
        """
        tokens_per_s = tokens / seconds
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_s": tokens_per_s,
            "seconds": seconds,
        }
        append(self._metrics, metrics_line(record))

        # A mean whose weights halve about every seven calls: steady, yet it follows a change.
        self._recent_steps = 0.9 * self._recent_steps + (step - self._told)
        self._recent_seconds = 0.9 * self._recent_seconds + seconds
        self._told = step
        left = (self._total - step) * self._recent_seconds / self._recent_steps
        figures = (
            f"loss {loss:.4f}  lr {learning_rate:.1e}  {tokens_per_s:,.0f} tokens/s  "
            f"{_clock(left)} left"
        )
        place = self._place(step)
        self._bar.update(self._task, completed=step, description=place, figures=figures)
        if not self._live:
            self._say(f"{place}  {figures}")

    def validation(self, step: int, loss: float, best: bool) -> None:
        """Tells the loss on the validation text, in nats per token, and draws loss.png anew."""
        record = {"step": step, "validation_loss": loss, "best": best}
        append(self._metrics, metrics_line(record))
        said = f"{self._place(step)}  validation {loss:.4f}"
        self._say(f"{said} (best)" if best else said, "green" if best else "")
        if self._draws:
            self._draw()

    def saved(self, step: int) -> None:
        """Tells that a checkpoint is safely on disk."""
        self._say(f"{self._place(step)}  checkpoint saved", "dim")

    def sample(self, step: int, text: str) -> None:
        """Shows text of the model, whatever is in it, and adds it to samples.txt."""
        block = sample_block(step, text)
        append(self._samples, block)
        self._say(f"{self._place(step)}  sample")
        if self._live:
            self._console.print(Padding(Text(visible(text), "dim"), (0, 2)))
        else:
            self._say(block.partition("\n")[2].rstrip("\n"))

    def note(self, text: str) -> None:
        """Says anything else, in a line of its own."""
        self._say(visible(text))

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total}"

    def _say(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style), soft_wrap=True)

    def _draw(self) -> None:
        try:
            picture = draw_loss(read_metrics(self._metrics))
        except ImportError as error:
            self._draws = False
            self.note(f"no loss.png: {error}")
            return
        with naming(self._picture):
            write_file_atomically(self._picture, picture)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
