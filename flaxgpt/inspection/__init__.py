"""Seeing inside: sizes, operations, memory, and what a model computes on its way."""

from flaxgpt.inspection.flop_count import FlopCount, flops, mfu
from flaxgpt.inspection.gradients import gradient_norms, without_shortcuts
from flaxgpt.inspection.intermediates import activation_names, activations, patch
from flaxgpt.inspection.lens import logit_lens
from flaxgpt.inspection.memory_use import Fit, MemoryUse, fitting, memory
from flaxgpt.inspection.parameters import ParamCount, count_params
from flaxgpt.inspection.show import show
from flaxgpt.inspection.tree import Difference, Row, Statistics, compare, rows

__all__ = [
    "Difference",
    "Fit",
    "FlopCount",
    "MemoryUse",
    "ParamCount",
    "Row",
    "Statistics",
    "activation_names",
    "activations",
    "compare",
    "count_params",
    "fitting",
    "flops",
    "gradient_norms",
    "logit_lens",
    "memory",
    "mfu",
    "patch",
    "rows",
    "show",
    "without_shortcuts",
]
