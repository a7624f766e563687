"""Parameter trees in notebooks: to unfold, with their arrays drawn."""

from __future__ import annotations

from typing import Any


class _Page:
    """What a notebook shows as HTML."""

    def __init__(self, html: str):
        self._html = html

    def __repr__(self) -> str:
        return "a tree, which a notebook draws"

    def _repr_html_(self) -> str:
        return self._html


def show(tree: Any) -> Any:
    """Returns a tree as treescope draws it, for the last line of a notebook's cell.

    Args:
        tree: parameters or a part of them, arrays or shapes; or any other pytree.

    Raises:
        ImportError: treescope is not there; says how to install it.
    """
    try:
        import treescope
    except ImportError as error:
        raise ImportError(
            f"drawing trees needs treescope ({error}): pip install 'flaxgpt[notebook]'"
        ) from error
    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        return _Page(treescope.render_to_html(tree))
