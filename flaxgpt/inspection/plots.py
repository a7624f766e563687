"""Pictures of what a model is and does. Each function returns a matplotlib Figure to show or save.

Neither the caller's pyplot backend nor style plays a part.
"""

from __future__ import annotations

import functools
import itertools
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

_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#bbbbbb", "#ee6677")  # Tol's bright
_LINE_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_MOST_LABELS = 40  # more do not fit beside an axis
_MOST_COLUMNS = 64  # of words in a table, which then is a screen's width four times over


def attention_maps(weights: ArrayLike, tokens: Sequence[str], title: str = "") -> Any:
    """Draws where each head looks: a row of each map is a query, a column a key.

    Args:
        weights: float [N, T, S], one row's `trf_blocks_i/att/weights`; or [L, N, T, S], those of
            all blocks, for smaller maps, a line of them a block.
        tokens: the T tokens, as text.
        title: above all of it.

    Raises:
        ValueError: weights that are neither, of no head, or of another number of tokens.
        ImportError: matplotlib is not there; says how to install it.
    """
    maps = np.asarray(weights)
    if maps.ndim not in (3, 4) or maps.shape[-2:] != (len(tokens),) * 2:
        raise ValueError(
            f"weights of shape {maps.shape} must be [heads, {len(tokens)}, {len(tokens)}], for the "
            f"{len(tokens)} tokens: of activations, take one row, as found[name][0]"
        )
    if not maps.size:
        raise ValueError(f"weights of shape {maps.shape} have nothing to draw")
    if maps.ndim == 3:
        columns = min(4, len(maps))
        lines = math.ceil(len(maps) / columns)
        side = 0.6 + max(1.8, 0.17 * min(len(tokens), _MOST_LABELS))
    else:
        lines, columns = maps.shape[:2]
        side = 1.2
    with new_figure(columns * side + 1.2, lines * side + 0.8) as figure:
        from matplotlib.colors import PowerNorm

        # The first query has but itself to look at, so 1 is always there; of a long text all else
        # would be of one colour.
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        axes = figure.subplots(lines, columns, squeeze=False)
        places = list(axes.flat)
        grids = maps.reshape(-1, *maps.shape[-2:])
        for place in places[len(grids) :]:
            place.set_axis_off()
        for i, grid in enumerate(grids):
            place = places[i]
            line, column = divmod(i, columns)
            image = place.imshow(grid, norm=norm, cmap="viridis")
            if maps.ndim == 3:
                place.set_title(f"head {i}", fontsize=9)
                _label_tokens(place, tokens, bottom=i + columns >= len(maps), left=column == 0)
                continue
            place.set(xticks=[], yticks=[])
            if line == 0:
                place.set_title(f"head {column}", fontsize=9)
            if column == 0:
                place.set_ylabel(f"block {line}", fontsize=9)
        figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
        figure.supxlabel("key: the token looked at", fontsize=9)
        figure.supylabel("query: the token that looks", fontsize=9)
        figure.suptitle(_plain(title), fontsize=10)
    return figure


def lens_table(
    logits: ArrayLike, tokens: Sequence[str], spell: Callable[[int], str], title: str = ""
) -> Any:
    """Draws the logit lens: after each block, what token would come next, and how surely.

    Args:
        logits: float [L + 1, T, V], one row's `logit_lens`.
        tokens: the T tokens read, as text.
        spell: returns the text of an id, as `lambda id: tokenizer.decode([id])`.
        title: above all of it.

    Raises:
        ValueError: logits of another shape, or that are no numbers; more than 64 tokens.
        ImportError: matplotlib is not there; says how to install it.
    """
    table = np.asarray(logits)
    if table.ndim != 3 or not table.size or table.shape[1] != len(tokens):
        raise ValueError(
            f"logits of shape {table.shape} must be [layers + 1, {len(tokens)}, vocabulary]: of "
            "logit_lens, take one row, as found[:, 0]"
        )
    if len(tokens) > _MOST_COLUMNS:
        raise ValueError(
            f"{len(tokens)} tokens make a table too wide to read: give {_MOST_COLUMNS} at most"
        )
    best, sure = np.empty(table.shape[:2], int), np.empty(table.shape[:2])
    for i, layer in enumerate(table):  # one at a time, as they may be large
        values = layer.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                "logits have NaN or Inf: flaxgpt params shows which parameters have them"
            )
        best[i] = values.argmax(-1)
        sure[i] = 1 / np.exp(values - values.max(-1, keepdims=True)).sum(-1)
    with new_figure(1.6 + 0.82 * len(tokens), 1.2 + 0.32 * len(table)) as figure:
        axes = figure.subplots()
        # The top of the table is the model's answer.
        image = axes.imshow(sure[::-1], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, column in np.ndindex(sure.shape):
            value = sure[::-1][row, column]
            text = shown(spell(int(best[::-1][row, column])))
            axes.text(
                column,
                row,
                text if len(text) <= 10 else text[:9] + "…",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else "black",
            )
        names = ["embeddings", *(f"block {i}" for i in range(len(table) - 1))]
        axes.set_yticks(range(len(table)), names[::-1], fontsize=8)
        axes.set_xticks(range(len(tokens)), [shown(token) for token in tokens], fontsize=8)
        axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("token read")
        title = title or "likeliest next token, read off after each block"
        axes.set_title(_plain(title), fontsize=10)
        figure.colorbar(image, ax=axes, label="its probability")
    return figure


def parameter_shares(configs: Mapping[str, GPTConfig]) -> Any:
    """Draws how the parameters of several models divide among their parts.

    Args:
        configs: architectures by name.
    """
    counts = {name: count_params(cfg) for name, cfg in configs.items()}
    parts = [part for part in PARTS if any(count.by_part[part] for count in counts.values())]
    with new_figure(9, 1.3 + 0.45 * len(counts)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(counts))
        for part, colour in zip(parts, _COLOURS, strict=False):
            share = np.array([100 * count.by_part[part] / count.total for count in counts.values()])
            axes.barh(
                range(len(counts)), share, left=left, color=colour, label=part.replace("_", " ")
            )
            for i, (start, width) in enumerate(zip(left, share, strict=True)):
                if width >= 4:
                    axes.text(start + width / 2, i, f"{width:.0f} %", ha="center", va="center")
            left += share
        labels = [f"{name}\n{_short(count.total)}" for name, count in counts.items()]
        axes.set_yticks(range(len(counts)), labels)
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="share of the parameters in %")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(parts), frameon=False, fontsize=9)
    return figure


def lines_by_depth(
    curves: Mapping[str, ArrayLike], ylabel: str, title: str = "", xlabel: str = "block"
) -> Any:
    """Draws numbers of each block against its depth, such as gradient norms.

    Where they span more than a factor of ten, their axis is logarithmic.

    Args:
        curves: by name, float [L], one number a block.
        ylabel: what the numbers are.
        title: above all of it.
        xlabel: what has the depth.

    Raises:
        ValueError: no curves, one of no numbers, or numbers that are NaN or infinite.
        ImportError: matplotlib is not there; says how to install it.
    """
    if not curves or not all(np.size(values) for values in curves.values()):
        raise ValueError(f"curves {listed(list(curves)) or '{}'}: give numbers of each to draw")
    sizes = np.concatenate([np.ravel(values) for values in curves.values()])
    if not np.isfinite(sizes).all():
        raise ValueError(
            f"{ylabel} of {listed([n for n, v in curves.items() if not np.isfinite(v).all()])} is "
            "NaN or Inf: flaxgpt params shows which parameters are"
        )
    with new_figure(7, 4) as figure:
        axes = figure.subplots()
        for (name, values), colour in zip(
            curves.items(), itertools.cycle(_LINE_COLOURS), strict=False
        ):
            axes.plot(np.ravel(values), "o-", color=colour, markersize=4, label=_plain(name))
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
    """Returns a token so that a picture can show it: spaces and line ends made visible."""
    return _plain(token.replace(" ", "␣").replace("\n", "⏎")) or "∅"


def _plain(text: str) -> str:
    """Returns text without mathematics in dollars, nor characters that the font has no shape of."""
    known = _characters()
    return "".join(c if ord(c) in known or c == "\n" else f"U+{ord(c):04X}" for c in text).replace(
        "$", r"\$"
    )


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    with default_style():
        path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def _label_tokens(axes: Any, tokens: Sequence[str], bottom: bool, left: bool) -> None:
    step = math.ceil(len(tokens) / _MOST_LABELS)
    places = range(0, len(tokens), step)
    names = [shown(tokens[i]) for i in places]
    size = 8 if len(names) <= 20 else 6
    axes.set_xticks(places, names if bottom else [""] * len(names), rotation=90, fontsize=size)
    axes.set_yticks(places, names if left else [""] * len(names), fontsize=size)


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
