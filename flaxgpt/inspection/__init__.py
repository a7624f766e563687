"""Inspection: parameters, operations, memory, intermediate values and gradients of a model."""

from flaxgpt.inspection.flop_count import FlopCount, flops, mfu
from flaxgpt.inspection.gradients import gradient_norms, without_shortcuts
from flaxgpt.inspection.intermediates import activation_names, activations, patch
from flaxgpt.inspection.lens import logit_lens
from flaxgpt.inspection.memory_use import LargestBatch, MemoryUse, largest_batch, memory
from flaxgpt.inspection.parameters import ParamCount, count_params
from flaxgpt.inspection.tree import Difference, Statistics, TreeRow, compare, show, tree_rows

__all__ = [
    "Difference",
    "FlopCount",
    "LargestBatch",
    "MemoryUse",
    "ParamCount",
    "Statistics",
    "TreeRow",
    "activation_names",
    "activations",
    "compare",
    "count_params",
    "flops",
    "gradient_norms",
    "largest_batch",
    "logit_lens",
    "memory",
    "mfu",
    "patch",
    "show",
    "tree_rows",
    "without_shortcuts",
]
