"""Plots of a model, as matplotlib Figures that do not depend on pyplot's backend and style."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from flaxgpt._checks import listed
from flaxgpt._pictures import default_style, new_figure, to_png
from flaxgpt.config import GPTConfig
from flaxgpt.inspection.parameters import PARTS, count_params

__all__ = ["attention_maps", "lens_table", "lines_by_depth", "parameter_shares", "shown", "to_png"]

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee")  # Tol's bright
_MOST_LABELS = 40  # beside an axis
_MOST_COLUMNS = 64  # of a table of words


def attention_maps(weights: ArrayLike, tokens: Sequence[str], title: str = "") -> Any:
    """Draw the attention weights of each head: one row per query, one column per key.

    Args:
        weights: float [N, T, S], `trf_blocks_i/att/weights` of one sequence; or [L, N, T, S] of all
            blocks, drawn smaller.
        tokens: text of the T tokens.
        title: title of the figure.

    Raises:
        ValueError: weights of another shape, or empty ones.
        ImportError: matplotlib is not installed.
    """
    maps = np.asarray(weights)
    if maps.ndim not in (3, 4) or maps.shape[-2:] != (len(tokens),) * 2:
        raise ValueError(
            f"weights of shape {maps.shape} must be [heads, {len(tokens)}, {len(tokens)}], for the "
            f"{len(tokens)} tokens; select one row of activations, as found[name][0]"
        )
    if not maps.size:
        raise ValueError(f"weights of shape {maps.shape} are empty: expected at least one head")
    lines, columns, side = *maps.shape[:2], 1.2
    if maps.ndim == 3:
        columns = min(4, len(maps))
        lines = math.ceil(len(maps) / columns)
        side = 0.6 + max(1.8, 0.17 * min(len(tokens), _MOST_LABELS))
    with new_figure(columns * side + 1.2, lines * side + 0.8) as figure:
        from matplotlib.colors import PowerNorm

        # The first query can only attend to itself, with weight 1. On a linear scale all other
        # weights of a long text would look alike.
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        axes = figure.subplots(lines, columns, squeeze=False)
        grids = maps.reshape(-1, *maps.shape[-2:])
        for place in axes.flat[len(grids) :]:
            place.set_axis_off()
        ticks = range(0, len(tokens), math.ceil(len(tokens) / _MOST_LABELS))
        names, empty = [shown(tokens[i]) for i in ticks], [""] * len(ticks)
        size = 8 if len(ticks) <= 20 else 6
        for i, (grid, place) in enumerate(zip(grids, axes.flat, strict=False)):
            image = place.imshow(grid, norm=norm, cmap="viridis")
            left = i % columns == 0
            if maps.ndim == 3:
                bottom = i + columns >= len(maps)
                place.set_xticks(ticks, names if bottom else empty, rotation=90, fontsize=size)
                place.set_yticks(ticks, names if left else empty, fontsize=size)
            else:
                place.set(xticks=[], yticks=[], ylabel=f"block {i // columns}" if left else "")
            if maps.ndim == 3 or i < columns:
                place.set_title(f"head {i}", fontsize=9)
        figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
        figure.supxlabel("key (token attended to)", fontsize=9)
        figure.supylabel("query (token attending)", fontsize=9)
        figure.suptitle(_plain(title), fontsize=10)
    return figure


def lens_table(
    logits: ArrayLike, tokens: Sequence[str], spell: Callable[[int], str], title: str = ""
) -> Any:
    """Draw the logit lens: the most likely next token after each block, and its probability.

    Args:
        logits: float [L + 1, T, V], `logit_lens` of one sequence.
        tokens: text of the T input tokens.
        spell: function from an id to its text, such as `lambda id: tokenizer.decode([id])`.
        title: title of the figure.

    Raises:
        ValueError: logits of another shape or with NaN or infinities, or more than 64 tokens.
        ImportError: matplotlib is not installed.
    """
    table = np.asarray(logits)
    if table.ndim != 3 or not table.size or table.shape[1] != len(tokens):
        raise ValueError(
            f"logits of shape {table.shape} must be [layers + 1, {len(tokens)}, vocabulary]; "
            "select one row of logit_lens, as found[:, 0]"
        )
    if len(tokens) > _MOST_COLUMNS:
        raise ValueError(
            f"{len(tokens)} tokens make a table too wide to read: pass at most {_MOST_COLUMNS}"
        )
    best, sure = np.empty(table.shape[:2], int), np.empty(table.shape[:2])
    for i, layer in enumerate(table):  # one at a time, as they may be large
        values = layer.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                "logits have NaN or Inf: `flaxgpt params MODEL` lists parameters that have them"
            )
        best[i] = values.argmax(-1)
        sure[i] = 1 / np.exp(values - values.max(-1, keepdims=True)).sum(-1)
    best, sure = best[::-1], sure[::-1]  # the last block is on top
    with new_figure(1.6 + 0.82 * len(tokens), 1.2 + 0.32 * len(table)) as figure:
        axes = figure.subplots()
        image = axes.imshow(sure, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (row, column), token in np.ndenumerate(best):
            text = shown(spell(int(token)))
            text = text if len(text) <= 10 else text[:9] + "…"
            color = "white" if sure[row, column] > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        names = ["embeddings", *(f"block {i}" for i in range(len(table) - 1))]
        axes.set_yticks(range(len(table)), names[::-1], fontsize=8)
        axes.set_xticks(range(len(tokens)), [shown(token) for token in tokens], fontsize=8)
        axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("input token")
        title = title or "most likely next token after each block"
        axes.set_title(_plain(title), fontsize=10)
        figure.colorbar(image, ax=axes, label="probability")
    return figure


def parameter_shares(configs: Mapping[str, GPTConfig]) -> Any:
    """Draw the share of each part in the parameters of several models, given by name."""
    counts = {name: count_params(cfg) for name, cfg in configs.items()}
    parts = [part for part in PARTS if any(count.by_part[part] for count in counts.values())]
    with new_figure(9, 1.3 + 0.45 * len(counts)) as figure:
        axes = figure.subplots()
        axes.set_prop_cycle(color=_COLORS)
        left = np.zeros(len(counts))
        for part in parts:
            share = np.array([100 * count.by_part[part] / count.total for count in counts.values()])
            label = part.replace("_", " ")
            bars = axes.barh(range(len(counts)), share, left=left, label=label)
            texts = [f"{width:.0f} %" if width >= 4 else "" for width in share]
            axes.bar_label(bars, texts, label_type="center")
            left += share
        labels = [f"{name}\n{count.total:,}" for name, count in counts.items()]
        axes.set_yticks(range(len(counts)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="share of parameters (%)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(parts), frameon=False, fontsize=9)
    return figure


def lines_by_depth(
    curves: Mapping[str, ArrayLike], ylabel: str, title: str = "", xlabel: str = "block"
) -> Any:
    """Draw one number per block against depth, such as gradient norms.

    The axis is logarithmic if the numbers span more than a factor of ten.

    Args:
        curves: float [L], one number per block, by name.
        ylabel: label of the numbers.
        title: title of the figure.
        xlabel: label of the depth.

    Raises:
        ValueError: there are no curves, or one is empty or has NaN or infinities.
        ImportError: matplotlib is not installed.
    """
    if not curves or not all(np.size(values) for values in curves.values()):
        names = listed(list(curves)) or "{}"
        raise ValueError(f"curves {names}: each must have at least one number")
    sizes = np.concatenate([np.ravel(values) for values in curves.values()])
    if broken := [name for name, values in curves.items() if not np.isfinite(values).all()]:
        raise ValueError(
            f"{ylabel} of {listed(broken)} is NaN or Inf: `flaxgpt params MODEL` lists parameters "
            "that have them"
        )
    with new_figure(7, 4) as figure:
        axes = figure.subplots()
        axes.set_prop_cycle(color=_COLORS)
        for name, values in curves.items():
            axes.plot(np.ravel(values), "o-", markersize=4, label=_plain(name))
        longest = max(np.size(values) for values in curves.values())
        axes.set_xticks(range(0, longest, math.ceil(longest / 20)))
        if (sizes > 0).all() and sizes.max() > 10 * sizes.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0, 1.05 * sizes.min()))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(_plain(title), fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def shown(token: str) -> str:
    """Return a token as text for a plot, with visible spaces and line ends."""
    return _plain(token.replace(" ", "␣").replace("\n", "⏎")) or "∅"


def _plain(text: str) -> str:
    """Escape dollar signs, which start formulas, and characters that are not in the font."""
    known = _characters()
    letters = (c if ord(c) in known or c == "\n" else f"U+{ord(c):04X}" for c in text)
    return "".join(letters).replace("$", r"\$")


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    with default_style():
        path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())
