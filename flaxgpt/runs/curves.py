"""A plot of a run: training and validation loss over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxgpt._pictures import new_figure, to_png


def draw_loss(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG, 1200 x 750 pixels, of a run's losses, with the best validation marked.

    The training loss is drawn faintly as it is, and smoothed. In the records, those of
    `read_metrics`, a loss of None leaves a gap.
    """
    with new_figure(8, 5, dpi=150) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        steps, losses = _points(records, "loss")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        smooth = _smooth(losses)
        axes.plot(steps, smooth, color="tab:blue", linewidth=1.6, label="training, smoothed")
        steps, losses = _points(records, "validation_loss")
        (line,) = axes.plot(steps, losses, "o-", color="tab:orange", label="validation")
        line.set(markersize=4, markevery=1 + len(steps) // 50)
        if np.isfinite(losses).any():
            best = np.nanargmin(losses)
            x, y = steps[best], losses[best]
            label = f"best: {y:.4f} at step {x:,.0f}"
            axes.plot(x, y, "*", color="tab:red", markersize=13, zorder=3, label=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
        return to_png(figure)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Apply a moving average over 2% of the run twice; gaps remain gaps."""
    places = np.arange(len(losses))
    # Windows are symmetric, or the steep start would be drawn far too low.
    reach = np.minimum(places, 1 + len(losses) // 100)
    first, last = places - reach, np.minimum(places + reach + 1, len(losses))
    for _ in range(2):
        finite = np.isfinite(losses)
        sums = np.cumsum(np.concatenate([[0], np.where(finite, losses, 0)]))
        counts = np.cumsum(np.concatenate([[0], finite]))
        means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
        losses = np.where(finite, means, np.nan)
    return losses
