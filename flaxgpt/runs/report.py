"""The output of a training run: progress, metrics, a plot of the loss, and samples."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from flaxgpt._files import write_file_atomically
from flaxgpt.runs import journal
from flaxgpt.runs.curves import draw_loss


class Report:
    """Reports a run on standard error and in its folder, inside a `with` block.

    A terminal shows a progress bar at the bottom and scrolls everything else above it; a notebook
    shows the bar at the top; elsewhere, every call prints a line. The folder gets metrics.jsonl,
    samples.txt and loss.png. Entering the block cuts the first two back to `start_step`, so that
    steps which a killed run had already reported do not appear twice: a step is reported before
    its checkpoint is written.

    A report that cannot be written or shown does not stop the run: a file that fails is named in
    one warning, and a console that has been closed shows nothing. With `writes=False`, no file is
    written: another process writes them.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.txt"
        self._picture = folder / "loss.png"
        self._warned: set[str] = set()
        self._total, self._start = total_steps, start_step
        self._reported = start_step
        self._recent_steps = self._recent_seconds = 0.0
        self._console = ErrorConsole() if console is None else console
        # In a notebook, rich shows the bar as a widget.
        has_widgets = self._console.is_jupyter and importlib.util.find_spec("ipywidgets")
        self._live = self._console.is_interactive or has_widgets
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            # Text printed on the same terminal must not break the bar; redirected text stays out.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(
            self._place(start_step), completed=start_step, total=total_steps, figures="compiling"
        )

    def __enter__(self) -> Report:
        if self._writes:
            with self.tolerating("earlier reports are not removed"):
                journal.cut_back(self._metrics, self._samples, self._start)
        if self._live:
            self._bar.start()
            self._console.show_cursor(True)  # or a killed run would leave it hidden
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            with _console_errors_ignored():
                self._bar.stop()

    @contextlib.contextmanager
    def tolerating(self, lost: str) -> Iterator[None]:
        """Turn an exception in a `with` block into a warning that says what is lost, shown once."""
        try:
            yield
        except Exception as error:
            self.warn(lost, str(error) or type(error).__name__)

    def warn(self, what: str, why: str) -> None:
        """Show a warning, but only the first one about the same thing."""
        if what not in self._warned:
            self._warned.add(what)
            self.note(f"{what}: {why}")

    def training(
        self, step: int, loss: float, rate: float, norm: float, tokens: int, seconds: float
    ) -> None:
        """Report the steps since the last call.

        The loss is their mean, in nats per token; learning rate and gradient norm, before clipping,
        are those of the last step; the seconds are without compilation and evaluation.
        """
        speed = tokens / seconds
        record = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm}
        record |= {"tokens_per_s": speed, "seconds": seconds}
        self._record(record)

        # An exponential mean with a half-life of about seven calls: steady, but it follows changes.
        self._recent_steps = 0.9 * self._recent_steps + (step - self._reported)
        self._recent_seconds = 0.9 * self._recent_seconds + seconds
        self._reported = step
        left = (self._total - step) * self._recent_seconds / self._recent_steps
        figures = f"loss {loss:.4f}  lr {rate:.1e}  {speed:,.0f} tokens/s  {_clock(left)} left"
        place = self._place(step)
        self._bar.update(self._task, completed=step, description=place, figures=figures)
        if not self._live:
            self._say(f"{place}  {figures}")

    def validation(self, step: int, loss: float, best: bool) -> None:
        """Report the validation loss, in nats per token."""
        self._record({"step": step, "validation_loss": loss, "best": best})
        line = f"{self._place(step)}  validation {loss:.4f}"
        self._say(f"{line} (best)" if best else line, "green" if best else "")

    def draw(self) -> None:
        """Redraw loss.png."""
        if not self._writes:
            return
        with self.tolerating("no loss.png"):
            picture = draw_loss(journal.read_metrics(self._metrics))
            with journal.errors_naming(self._picture):
                write_file_atomically(self._picture, picture)

    def saved(self, step: int) -> None:
        """Report that a checkpoint is on disk."""
        self._say(f"{self._place(step)}  checkpoint saved", "dim")

    def sample(self, step: int, text: str) -> None:
        """Show sampled text, with control characters escaped, and append it to samples.txt."""
        block = journal.sample_block(step, text)
        self._append(self._samples, block, "samples are not written")
        self._say(f"{self._place(step)}  sample")
        if self._live:
            text = journal.escape_controls(text)
            show(self._console, Padding(Text(text, "dim"), (0, 2)))
        else:
            self._say(block.partition("\n")[2].rstrip("\n"))

    def note(self, text: str) -> None:
        """Show a message on a line of its own."""
        self._say(journal.escape_controls(text))

    def _record(self, record: dict[str, float]) -> None:
        self._append(self._metrics, journal.metrics_line(record), "metrics are not written")

    def _append(self, path: Path, text: str, lost: str) -> None:
        if self._writes:
            with self.tolerating(lost):
                journal.append(path, text)

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total}"

    def _say(self, line: str, style: str = "") -> None:
        show(self._console, Text(line, style), soft_wrap=True)


class ErrorConsole(Console):
    """A console on standard error, whose closed pipe does not affect standard output."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Raise an error, where rich would redirect standard output and end the process."""
        raise BrokenPipeError


def show(console: Console, renderable: RenderableType, *, soft_wrap: bool = False) -> None:
    """Print on a console, unless its terminal or pipe has been closed."""
    with _console_errors_ignored():
        console.print(renderable, soft_wrap=soft_wrap)


@contextlib.contextmanager
def _console_errors_ignored() -> Iterator[None]:
    # Rich raises SystemExit when a pipe is closed, and Python ValueError when a file is.
    with contextlib.suppress(OSError, ValueError, SystemExit):
        yield


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
