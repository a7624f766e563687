"""The picture of a run: training and validation loss over steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def draw_loss(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws the loss of a run, the best validation marked.

    The training loss is drawn as it is, faintly, and smoothed.

    Args:
        records: of `read_metrics`; those with "loss" and with "validation_loss" are drawn, None is
            a gap.

    Returns:
        A PNG of 1200 x 750 pixels. Neither the caller's pyplot backend nor style plays a part.

    Raises:
        ImportError: matplotlib is not there; says how to install it.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f"drawing the loss needs matplotlib ({error}): pip install 'flaxgpt[train]'"
        ) from error

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        steps, losses = _points(records, "loss")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(
            steps, _smooth(losses), color="tab:blue", linewidth=1.6, label="training, smoothed"
        )
        steps, losses = _points(records, "validation_loss")
        axes.plot(
            steps,
            losses,
            "o-",
            color="tab:orange",
            markersize=4,
            markevery=1 + len(steps) // 50,
            label="validation",
        )
        if np.isfinite(losses).any():
            best = np.nanargmin(losses)
            axes.plot(
                steps[best],
                losses[best],
                "*",
                color="tab:red",
                markersize=13,
                zorder=3,
                label=f"best: {losses[best]:.4f} at step {steps[best]:,.0f}",
            )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Averages twice over the nearest fiftieth of the run; gaps stay gaps."""
    places = np.arange(len(losses))
    # No further ahead than there is behind: else the steep start would be drawn far too low.
    reach = np.minimum(places, 1 + len(losses) // 100)
    first, last = places - reach, np.minimum(places + reach + 1, len(losses))
    for _ in range(2):
        there = np.isfinite(losses)
        sums = np.cumsum(np.concatenate([[0], np.where(there, losses, 0)]))
        counts = np.cumsum(np.concatenate([[0], there]))
        means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
        losses = np.where(there, means, np.nan)
    return losses
