"""`train`: a whole run, from text files to a model, that can be killed at any moment and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from rich.console import Console

from flaxgpt.config import GPTConfig
from flaxgpt.data import BatchIterator, batches
from flaxgpt.generation.batch import generate
from flaxgpt.runs.checkpoints import Checkpoints
from flaxgpt.runs.report import Report
from flaxgpt.runs.run import Run, prepare, resumes, sole
from flaxgpt.training.config import TrainConfig
from flaxgpt.training.losses import mean_loss
from flaxgpt.training.step import TrainState, init_state, train_steps
from flaxgpt.typing import Params
from flaxgpt.weights import save


class DivergedError(ArithmeticError):
    """A loss or gradient is no longer a finite number."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        state: after the last update.
        validation_loss: the lowest one, None without validation.
        best_step: the step it was at.
        model: folder of the model with that loss (without validation, of the last one), as
            `flaxgpt.load` reads it.
    """

    state: TrainState
    validation_loss: float | None
    best_step: int | None
    model: Path


def train(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: str | os.PathLike[str],
    *,
    console: Console | None = None,
) -> Outcome:
    """Trains a model on text files; see `TrainConfig` for all that can be set.

    The run's folder holds everything to go on from: after Ctrl-C, a crash or `kill -9`, the same
    call with `init_from=out` ends, on CPU, with the very parameters that the undisturbed run would
    have had, bit for bit. `read_run(out)` gives back the two configurations for it.

    Args:
        cfg: the architecture. Its vocabulary must be the tokenizer's at least; fine-tuning
            (`init_from`) needs that of the model it starts from, dropout rates apart.
        train_cfg: the recipe.
        out: the run's folder, new or empty unless the run in it is to go on.
        console: where to show progress, standard error if not given.

    Raises:
        ValueError, OSError: bad input, found before anything is computed or written; or a file that
            cannot be written later on, earlier checkpoints staying as they are.
        DivergedError: the loss is no longer a number; says when, and what to try.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint was saved first.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"train runs in one process, and there are {jax.process_count()}: build a loop of "
            "train_step and data.batches(process_index=..., process_count=...) over a mesh"
        )
    console = Console(stderr=True) if console is None else console
    out = Path(out).expanduser()

    def say(line: str) -> None:
        console.print(line, markup=False, style="dim")

    with contextlib.ExitStack() as stack:
        if resumes(train_cfg, out):  # before its files are touched
            stack.enter_context(sole(out))
            run = prepare(cfg, train_cfg, out, say)
        else:
            run = prepare(cfg, train_cfg, out, say)
            stack.enter_context(sole(out))
        checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", run.train_cfg.keep))
        asked = stack.enter_context(_interruptible(say))
        state, iterator = _start(run, checkpoints)
        report = stack.enter_context(Report(out, run.train_cfg.steps, int(state.step), console))
        outcome = _go_on(run, state, iterator, checkpoints, report, asked)
    if asked:  # with everything closed, what Ctrl-C or a termination does when nobody minds it
        signal.raise_signal(asked[0])
    return outcome


def _start(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, BatchIterator]:
    """Returns the state and the data where the newest checkpoint left them, or at the beginning."""
    iterator = batches(
        run.ids,
        length=run.cfg.context_length,
        batch_size=run.train_cfg.batch_size,
        seed=run.train_cfg.seed,
        shift=run.train_cfg.windows == "shifted",
    )
    if checkpoints.latest_step() is None:
        return init_state(run.cfg, run.train_cfg, run.params), iterator
    fresh = jax.eval_shape(partial(init_state, run.cfg, run.train_cfg))
    restored = checkpoints.restore(_arrays(fresh))
    iterator.set_state(restored.data)
    return dataclasses.replace(fresh, **restored.state), iterator


def _go_on(
    run: Run,
    state: TrainState,
    iterator: BatchIterator,
    checkpoints: Checkpoints,
    report: Report,
    asked: list[int],
) -> Outcome:
    recipe = run.train_cfg
    start = step = int(state.step)
    compiled: dict[int, Any] = {}
    unreported: list[tuple[float, float]] = []  # loss and seconds of each step
    if step >= recipe.steps:
        report.note(f"step {step} is there already: more steps than {recipe.steps} go on from it")

    def validated() -> float:
        assert run.val_windows is not None
        loss = mean_loss(
            run.cfg,
            state.params,
            run.val_windows,
            batch_size=max(1, recipe.batch_size // recipe.accumulate),
            dtype=recipe.dtype,
        )
        best = checkpoints.best()
        is_best = best is None or loss < best[1]
        report.validation(step, loss, is_best)
        if is_best:
            save(run.folder / "model", run.cfg, state.params, tokenizer=run.tokenizer)
        return loss

    def keep(place: dict[str, Any], validation: float | None) -> None:
        config = {"model": run.cfg.to_dict(), "training": recipe.to_dict()}
        checkpoints.save(step, _arrays(state), place, config, validation)

    new = checkpoints.latest_step() is None
    if new and run.params is not None and run.val_windows is not None:
        keep(iterator.get_state(), validated())  # what it starts from may stay the best
    upcoming = _take(iterator, recipe, step)
    while upcoming is not None:
        chunk, place = upcoming
        if len(chunk) not in compiled:
            compiled[len(chunk)] = _compile(state, chunk, report)
        begun = time.perf_counter()
        state, on_device = compiled[len(chunk)](state, chunk)
        upcoming = _take(iterator, recipe, step + len(chunk))  # while the device works
        metrics = jax.device_get(on_device)
        seconds = (time.perf_counter() - begun) / len(chunk)
        _check_finite(metrics, step, checkpoints)
        names = ("loss", "grad_norm", "learning_rate")
        for loss, norm, rate in zip(*(metrics[name].tolist() for name in names), strict=True):
            step += 1
            unreported.append((loss, seconds))
            if step % recipe.log_every == 0 or step == recipe.steps:
                losses, times = zip(*unreported, strict=True)
                tokens = len(losses) * recipe.batch_size * run.cfg.context_length
                report.training(step, sum(losses) / len(losses), rate, norm, tokens, sum(times))
                unreported = []

        validation = None
        if run.val_windows is not None and _due(step, recipe.eval_every, recipe):
            validation = validated()
        if recipe.sample_every and _due(step, recipe.sample_every, recipe):
            report.sample(step, _sample(run, state.params))
        if validation is not None or _due(step, recipe.save_every, recipe) or asked:
            if run.val_windows is None:
                save(run.folder / "model", run.cfg, state.params, tokenizer=run.tokenizer)
            keep(place, validation)
        if asked:
            break
    checkpoints.wait()
    if step > start:
        report.saved(step)
    best_step, best_loss = checkpoints.best() or (None, None)
    return Outcome(state, best_loss, best_step, run.folder / "model")


def _arrays(state: TrainState) -> dict[str, Any]:
    """Returns what of a state is to be kept: all but the configurations."""
    names = ("params", "opt_state", "step", "key")
    return {name: getattr(state, name) for name in names}


def _due(step: int, every: int, recipe: TrainConfig) -> bool:
    return step % every == 0 or step == recipe.steps


def _take(
    iterator: BatchIterator, recipe: TrainConfig, step: int
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Returns the batches of the next call, [K, B, T + 1], and where the data then stands.

    A call never goes past a step at which something is due. So where calls end depends on the step
    alone, and a run that was killed makes the same calls again, which give the same bits.
    """
    periods = (recipe.steps_per_call, recipe.eval_every, recipe.save_every, recipe.sample_every)
    stop = min(recipe.steps, *(step + every - step % every for every in periods if every))
    if stop <= step:
        return None
    return np.stack([next(iterator) for _ in range(stop - step)]), iterator.get_state()


def _compile(state: TrainState, chunk: np.ndarray, report: Report) -> Any:
    begun = time.perf_counter()
    compiled = train_steps.lower(state, chunk).compile()
    seconds = time.perf_counter() - begun
    report.note(f"compiled {len(chunk)} step{'s'[: len(chunk) > 1]} a call in {seconds:.1f} s")
    return compiled


def _check_finite(metrics: Any, step: int, checkpoints: Checkpoints) -> None:
    fine = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
    if fine.all():
        return
    first = int(np.argmin(fine))
    latest = checkpoints.latest_step()
    kept = "there is no checkpoint yet" if latest is None else f"the last checkpoint is of {latest}"
    raise DivergedError(
        f"step {step + first + 1} has loss {metrics['loss'][first]} and a gradient of norm "
        f"{metrics['grad_norm'][first]}; {kept}. Try a lower learning_rate than "
        f"{metrics['learning_rate'].max():.1e}, more warmup_steps, grad_clip=1.0 or dtype float32"
    )


def _sample(run: Run, params: Params) -> str:
    recipe = run.train_cfg
    if recipe.sample_prompt:
        prompt = run.tokenizer.encode(recipe.sample_prompt)
    else:
        prompt = (run.ids[:8] if run.val_windows is None else run.val_windows[0, :8]).tolist()
    ids = generate(
        run.cfg,
        params,
        [prompt],
        recipe.sample_tokens,
        temperature=0.8,
        key=jax.random.key(recipe.seed),
        dtype=recipe.dtype,
    )

    def spelled(id: int) -> bytes:
        try:
            return run.tokenizer.token_bytes(id)
        except ValueError:  # the model has more ids than the tokenizer
            return "\ufffd".encode()

    return b"".join(map(spelled, [*prompt, *ids[0]])).decode("utf-8", errors="replace")


@contextlib.contextmanager
def _interruptible(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Yields a list that a first Ctrl-C or termination is put in; a second one interrupts."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("saving after this step; interrupt again to stop without")

    before = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background jobs have
                before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
