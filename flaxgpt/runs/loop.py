"""`train`: a whole run, from text files to a model, that can be killed at any point and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.batch import generate
from flaxgpt.runs.checkpoints import Checkpoints
from flaxgpt.runs.folder import Run
from flaxgpt.runs.model_folder import save_model
from flaxgpt.runs.processes import (
    check_same,
    in_step,
    is_first,
    largest,
    not_waiting_for_others,
)
from flaxgpt.runs.report import ErrorConsole, Report, show
from flaxgpt.runs.signals import catch_signals
from flaxgpt.runs.start import open_run, settings_to_agree_on
from flaxgpt.sharding import (
    Mesh,
    ShardRules,
    check_mesh,
    check_rules,
    gather_on_first,
    make_mesh,
    place_rows,
)
from flaxgpt.tokenizer import text_ids
from flaxgpt.training.config import TrainConfig
from flaxgpt.training.losses import mean_loss
from flaxgpt.training.step import (
    TrainState,
    abstract_state,
    check_rows,
    init_state,
    train_steps,
)
from flaxgpt.typing import Params


class DivergedError(ArithmeticError):
    """The loss or the gradient is no longer finite."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        state: the state after the last step.
        validation_loss: the lowest validation loss, or None without validation.
        best_step: the step with that loss.
        model: folder of the model with that loss, or of the last model without validation.
    """

    state: TrainState
    validation_loss: float | None
    best_step: int | None
    model: Path


class _Context(NamedTuple):
    """What stays the same during a run."""

    run: Run
    checkpoints: Checkpoints
    report: Report
    signals: list[int]
    verified: list[int]  # the step of the first checkpoint, once it has been restored
    unsaved: list[str]  # why the model could not be saved, if it could not


def train(
    cfg: GPTConfig,
    train_cfg: TrainConfig,
    out: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: ShardRules | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train a model on text files; see `TrainConfig` for all settings.

    After Ctrl-C, a crash or `kill -9`, the same call with `init_from=out` resumes the run. On CPU,
    on the same machine and with the same versions, the parameters of a resumed run are
    bit-identical to those of an uninterrupted one.
    `read_run(out)` returns the two configurations.

    On several processes, connected with `jax.distributed.initialize`, each calls this function
    with the same arguments, and a folder that all of them see. Process 0 shows progress and writes
    everything but its share of the checkpoints. A run may be resumed on another mesh or number of
    processes: the batches stay the same, and the losses are equal up to rounding.

    Args:
        cfg: the architecture. Its vocabulary must be at least as large as the tokenizer's. When
            fine-tuning (`init_from`), only its dropout rates may differ from the source model's.
        train_cfg: the recipe.
        out: the run's folder, which must be new or empty unless its run is resumed.
        mesh: the mesh to train on, such as `flaxgpt.make_mesh()`. None means one device, or with
            several processes, data parallelism over all devices.
        rules: how to split the parameters over the mesh, if not by `flaxgpt.shard_rules(cfg)`.
        console: where to show progress; standard error by default.

    Returns:
        The final state, and the best validation loss with its step and model.

    Raises:
        ValueError, OSError: an input is invalid, found before any computation; or a file cannot be
            written later, which leaves earlier checkpoints intact.
        LostProcessError: another process has stopped or cannot be reached.
        DivergedError: the loss is no longer finite; the message says when, and what to try.
        KeyboardInterrupt: Ctrl-C was pressed. A checkpoint has been saved.
    """
    first = is_first()
    if not first:
        console = Console(quiet=True)
    elif console is None:
        console = ErrorConsole()

    def say(line: str) -> None:
        show(console, Text(line, "dim"))

    out = Path(os.path.expanduser(out)).absolute()  # the process may change its directory
    check_config(cfg)
    mesh = None if mesh is None else check_mesh(mesh)
    check_same(settings_to_agree_on(cfg, train_cfg, out, mesh, rules))
    if mesh is None and jax.process_count() > 1:
        mesh = make_mesh()
    if mesh is None and jax.device_count() > 1:
        count = jax.device_count()
        say(f"training on 1 of {count} devices; a mesh, such as data={count}, uses all")
    rules = check_rules(rules, cfg, mesh)
    if mesh is not None:
        check_rows(train_cfg, mesh)
    with contextlib.ExitStack() as stack, not_waiting_for_others(stack):
        run = open_run(stack, cfg, train_cfg, out, mesh, say)
        checkpoints = in_step(lambda: Checkpoints(out / "checkpoints", run.train_cfg.keep))
        stack.enter_context(checkpoints)
        signals = stack.enter_context(catch_signals(say))
        state = _restore(run, checkpoints, mesh, rules)
        start = int(state.step)
        report = Report(out, run.train_cfg.steps, start, console, writes=first)
        stack.enter_context(report)
        context = _Context(run, checkpoints, report, signals, [], [])
        if checkpoints.latest_step() is not None:
            _save_best_model(context, state)
        state = _train_until_done(context, state)
        checkpoints.wait()
        if int(state.step) > start:
            report.saved(int(state.step))
        best_step, best_loss = checkpoints.best() or (None, None)
        stopped_by = largest(signals[0] if signals else 0)
    if context.unsaved and not stopped_by:
        raise OSError(
            f"training is complete, but its best model is not in {out / 'model'}: "
            f"{context.unsaved[0]}; fix the cause and resume the run, which saves the model"
        )
    if stopped_by:  # everything is closed: let the signal take its default action
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # waits for the others, which are here too
        signal.raise_signal(stopped_by)
    return TrainResult(state, best_loss, best_step, out / "model")


def _restore(
    run: Run, checkpoints: Checkpoints, mesh: Mesh | None, rules: ShardRules | None
) -> TrainState:
    """Return the state of the newest checkpoint, and move to its batch, or start the run."""
    if checkpoints.latest_step() is None:
        return init_state(run.cfg, run.train_cfg, run.params, mesh=mesh, rules=rules)
    template = abstract_state(run.cfg, run.train_cfg, mesh=mesh, rules=rules)
    restored = checkpoints.restore(_arrays(template))
    run.batches.set_state(restored.data)
    return dataclasses.replace(template, **restored.state)


def _train_until_done(context: _Context, state: TrainState) -> TrainState:
    """Train until the last step or a signal, and return the final state."""
    run, checkpoints, report, signals, *_ = context
    recipe, step = run.train_cfg, int(state.step)
    if step >= recipe.steps:
        report.note(f"already at step {step}: set steps above {step} to continue")
    is_new = checkpoints.latest_step() is None
    if is_new and run.params is not None and run.val_windows is not None:
        # The model that fine-tuning starts from may remain the best one.
        _save_checkpoint(context, state, run.batches.get_state(), run.val_windows)
    compiled: dict[int, Any] = {}
    unlogged: list[tuple[float, float]] = []  # loss and seconds
    upcoming = _next_chunk(run, step, state.mesh)
    while upcoming is not None:
        ids, position = upcoming
        size = len(ids)
        if size not in compiled:
            started = time.perf_counter()
            compiled[size] = train_steps.lower(state, ids).compile()
            seconds = time.perf_counter() - started
            report.note(f"compiled {size} step{'s'[: size > 1]} per call in {seconds:.1f} s")
        started = time.perf_counter()
        state, on_device = compiled[size](state, ids)
        upcoming = _next_chunk(run, step + size, state.mesh)  # while the device computes
        metrics = jax.device_get(on_device)
        seconds = (time.perf_counter() - started) / size
        names = ("loss", "grad_norm", "learning_rate")
        for loss, norm, rate in zip(*(metrics[name].tolist() for name in names), strict=True):
            step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _diverged(checkpoints.latest_step(), step, loss, norm, rate)
            unlogged.append((loss, seconds))
            if _due(step, recipe.log_every, recipe):
                losses, times = zip(*unlogged, strict=True)
                tokens = len(losses) * recipe.batch_size * run.cfg.context_length
                mean = sum(losses) / len(losses)
                report.training(step, mean, rate, norm, tokens, sum(times))
                unlogged.clear()
        stopping = bool(largest(bool(signals)))
        windows = run.val_windows if _due(step, recipe.eval_every, recipe) else None
        if windows is not None or stopping or _due(step, recipe.save_every, recipe):
            _save_checkpoint(context, state, position, windows)
        if recipe.sample_every and _due(step, recipe.sample_every, recipe):
            with report.tolerating("no sample"):
                report.sample(step, _sample(run, state.params))
        if stopping:
            break
    return state


def _next_chunk(
    run: Run, step: int, mesh: Mesh | None
) -> tuple[jax.Array | np.ndarray, dict[str, Any]] | None:
    """Return the ids of the next call, int32 [K, B, T + 1], and the position after them, if any."""
    # A call never crosses a step at which something is due. The boundaries of calls depend on the
    # step alone, so a resumed run makes the same calls, which compute the same bits.
    recipe = run.train_cfg
    periods = (recipe.steps_per_call, recipe.eval_every, recipe.save_every, recipe.sample_every)
    stop = min(recipe.steps, *(step + every - step % every for every in periods if every))
    if stop <= step:
        return None
    ids = np.stack([next(run.batches) for _ in range(stop - step)])
    return place_rows(ids, recipe.batch_size, 1, mesh), run.batches.get_state()


def _due(step: int, every: int, recipe: TrainConfig) -> bool:
    return step % every == 0 or step == recipe.steps


def _diverged(latest: int | None, step: int, loss: float, norm: float, rate: float) -> Exception:
    kept = "no checkpoint was saved" if latest is None else f"the last checkpoint: step {latest}"
    return DivergedError(
        f"step {step} has loss {loss} and gradient norm {norm}; {kept}. Try a learning_rate below "
        f"{rate:.1e}, more warmup_steps, grad_clip=1.0 or dtype=float32"
    )


def _save_checkpoint(
    context: _Context, state: TrainState, position: dict[str, Any], windows: np.ndarray | None
) -> None:
    """Validate on the windows, if any, save a checkpoint, and save the model if it is the best."""
    run, checkpoints, report, _, verified, _ = context
    recipe, step = run.train_cfg, int(state.step)
    config = {"model": run.cfg.to_dict(), "training": recipe.to_dict()}
    loss, is_best = None, run.val_windows is None  # without validation, the last model is saved
    if windows is not None:
        size, dtype = recipe.batch_size // recipe.accumulate, recipe.dtype
        try:
            loss = mean_loss(run.cfg, state.params, windows, batch_size=size, dtype=dtype)
        except Exception:  # such as too little memory: the steps so far must not be lost
            checkpoints.save(step, _arrays(state), position, config)
            raise
        best = checkpoints.best()
        is_best = best is None or loss < best[1]
        report.validation(step, loss, is_best)
    checkpoints.save(step, _arrays(state), position, config, loss)
    if not verified:
        checkpoints.verify(_arrays(state))
        verified.append(step)
    if is_best:
        _save_model(context, state.params)
    if windows is not None:
        report.draw()


def _save_best_model(context: _Context, state: TrainState) -> None:
    """Save the model of the best checkpoint, which a killed run may not have done."""
    run, checkpoints = context.run, context.checkpoints
    step, _ = checkpoints.best() or (None, None)
    if run.val_windows is None:
        step = checkpoints.latest_step()
    if step == int(state.step):
        _save_model(context, state.params)
    elif step is not None:
        with context.report.tolerating("the best model is not saved again"):
            _save_model(context, checkpoints.read(step, _arrays(state))["params"])


def _save_model(context: _Context, params: Params) -> None:
    """Save the model. A failure is only a warning, as its checkpoint can be used instead."""
    run, report, unsaved = context.run, context.report, context.unsaved
    folder = run.folder / "model"
    unsaved.clear()
    params = gather_on_first(params)
    if not is_first():
        return
    try:
        others = save_model(folder, run.cfg, params, run.tokenizer)
    except (OSError, ValueError) as error:
        unsaved.append(str(error))
        report.warn("the model is not saved", str(error))
    else:
        if others:
            report.warn(f"{folder} holds other files, left in place", listed(others))


def _arrays(state: TrainState) -> dict[str, Any]:
    """Return the part of a state that checkpoints hold: all but the configurations."""
    return {name: getattr(state, name) for name in ("params", "opt_state", "step", "key")}


def _sample(run: Run, params: Params) -> str:
    """Return a continuation of the recipe's prompt, or of the start of the validation text."""
    recipe, tokenizer = run.train_cfg, run.tokenizer
    if recipe.sample_prompt:
        prompt = tokenizer.encode(recipe.sample_prompt)
    else:
        prompt = (run.ids[:8] if run.val_windows is None else run.val_windows[0, :8]).tolist()
    (ids,) = generate(
        run.cfg,
        params,
        [prompt],
        recipe.sample_tokens,
        temperature=0.8,
        key=jax.random.key(recipe.seed),
        allowed=text_ids(tokenizer, run.cfg.vocab_size),
        dtype=recipe.dtype,
    )
    return tokenizer.decode(prompt + ids)
