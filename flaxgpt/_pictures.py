"""Matplotlib figures that do not depend on, or change, the caller's pyplot backend and style."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from flaxgpt._checks import require_extra


@contextlib.contextmanager
def new_figure(width: float, height: float, dpi: int = 120) -> Iterator[Any]:
    """Yield an empty matplotlib Figure, with a size in inches, to draw on in a `with` block."""
    module = require_extra("matplotlib.figure", "plotting", "plots")
    with default_style():
        yield module.Figure(figsize=(width, height), dpi=dpi, layout="constrained")


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Use matplotlib's default style during a `with` block."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def to_png(figure: Any) -> bytes:
    """Return a matplotlib Figure as the contents of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = io.BytesIO()
    with default_style():  # Fonts are looked up while drawing.
        FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()
