"""Matching tensors with a layout and a configuration, and reporting all faults together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig
from flaxgpt.weights.layouts import READABLE
from flaxgpt.weights.table import Layout, Slot, slots
from flaxgpt.weights.tensors import INT8, Tensor, tensors_in


class Fault(NamedTuple):
    """A tensor that does not fit; sorts in the order in which faults are reported."""

    kind: Literal["missing", "unexpected", "unfit"]
    tensor: str
    block: int  # -1 outside the blocks
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.tensor} {self.detail}" if self.detail else f"{self.kind} {self.tensor}"


class _Match(NamedTuple):
    layout: Layout
    known: int  # tensors whose names belong to the layout
    unfit: int  # those of another shape or dtype, as in a layout with the same names
    tensors: list[tuple[Tensor, Slot]]
    apart: list[str]  # names of tensors that are not of the language model
    faults: list[str]


def match_layout(cfg: GPTConfig, paths: Sequence[Path]) -> tuple[Layout, list[tuple[Tensor, Slot]]]:
    """Return the layout that knows the most names in the files, and their tensors with slots."""
    tensors = list(tensors_in(paths))
    has_int8 = any(tensor.dtype == INT8 for tensor in tensors)
    layouts = [layout for layout in READABLE if has_int8 or not layout.is_int8]
    matches = [_match(layout, cfg, tensors) for layout in layouts]
    best = max(matches, key=lambda match: (match.known, -match.unfit, -len(match.faults)))
    if not best.known:
        names = listed(sorted(tensor.name for tensor in tensors)) or "none"
        if any("lora_" in tensor.name for tensor in tensors):
            names += ". They are a LoRA adapter: merge it into its base model with peft"
        expected = " or ".join(
            f"{layout.title} ({', '.join(entry.theirs for entry in layout.entries[:2])}, ...)"
            for layout in layouts
        )
        raise ValueError(
            f"{paths[0]} has no GPT-2 weights in a known layout. Its tensors: {names}. Expected "
            + expected
        )
    place = paths[0] if len(paths) == 1 else paths[0].parent
    if best.faults:
        raise ValueError(
            f"the weights in {place} do not fit vocab_size={cfg.vocab_size}, "
            f"context_length={cfg.context_length}, emb_dim={cfg.emb_dim}, n_layers={cfg.n_layers}, "
            f"bias={cfg.bias}, qkv_bias={cfg.qkv_bias}, tie_embeddings={cfg.tie_embeddings} of "
            f"config.json: {listed(best.faults, '; ')}. Correct config.json, or get the weights "
            "that belong to it"
        )
    if best.apart:
        warnings.warn(
            f"{place} also has {listed(best.apart)}, which the language model does not use: left "
            "out",
            stacklevel=2,
        )
    return best.layout, best.tensors


def _match(layout: Layout, cfg: GPTConfig, tensors: Sequence[Tensor]) -> _Match:
    wanted = slots(layout, cfg)
    fitting: dict[str, tuple[Tensor, Slot]] = {}
    apart: list[str] = []
    faults: list[Fault] = []
    known, blocks = 0, 0
    for tensor in tensors:
        found = layout.find(tensor.name)
        full, block, is_constant = found or ("", -1, False)
        known += found is not None
        blocks = max(blocks, block + 1)
        if is_constant:
            continue
        if found is None and layout.is_apart(tensor.name):
            apart.append(tensor.name)
        elif full not in wanted:
            faults.append(Fault("unexpected", tensor.name, block))
        elif full in fitting:
            again = f"second {tensor.name} in {tensor.path.name}"
            faults.append(Fault("unexpected", again, block))
        else:
            slot = wanted[full]
            fitting[full] = tensor, slot
            if tensor.shape != slot.shape:
                detail = f"has shape {tensor.shape} instead of {slot.shape}"
                faults.append(Fault("unfit", tensor.name, block, detail))
            if tensor.dtype not in slot.dtypes:
                expected = "int8" if slot.is_int8 else "floating point"
                detail = f"is {tensor.dtype} instead of {expected}"
                faults.append(Fault("unfit", tensor.name, block, detail))
    for name, slot in wanted.items():
        if name not in fitting and slot.role != "tied head":
            faults.append(Fault("missing", name, slot.block))
    # The number of blocks says more than the names of all tensors in the surplus ones.
    messages = [str(fault) for fault in sorted(faults) if fault.block < min(blocks, cfg.n_layers)]
    if faults and blocks != cfg.n_layers:
        messages.insert(0, f"the weights have {blocks} blocks instead of n_layers={cfg.n_layers}")
    unfit = sum(fault.kind == "unfit" for fault in faults)
    return _Match(layout, known, unfit, list(fitting.values()), sorted(apart), messages)
