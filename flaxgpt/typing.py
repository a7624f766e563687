"""Types shared across the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Params = dict[str, Any]
"""Model parameters: a nested dict of arrays."""

Progress = Callable[[int, int], None]
"""Called with (units done, units in total) as work proceeds."""
