"""Matching tensors with a layout and a configuration, and reporting all faults together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig
from flaxgpt.weights.layouts import LAYOUTS
from flaxgpt.weights.table import Layout, Slot, slots
from flaxgpt.weights.tensors import FLOATS, Tensor, tensors_in

_MESSAGES = {  # in the order of the report
    "blocks": "the weights have {0} blocks instead of n_layers={1}",
    "missing": "missing {tensor}",
    "unexpected": "unexpected {tensor}",
    "duplicate": "unexpected second {tensor} in {0}",
    "shape": "{tensor} has shape {0} instead of {1}",
    "dtype": "{tensor} is {0} instead of floating point",
}


class _Fault(NamedTuple):
    kind: str  # in _MESSAGES
    tensor: str
    block: int | None
    details: tuple[Any, ...] = ()


class _Match(NamedTuple):
    layout: Layout
    known: int  # tensors whose names belong to the layout
    tensors: list[tuple[Tensor, Slot]]
    faults: list[str]


def match_layout(cfg: GPTConfig, paths: Sequence[Path]) -> tuple[Layout, list[tuple[Tensor, Slot]]]:
    """Return the layout that knows the most names in the files, and their tensors with slots.

    Raises:
        ValueError: no layout knows any of the names, or some tensors do not fit.
    """
    tensors = list(tensors_in(paths))
    matches = [_match(layout, cfg, tensors) for layout in LAYOUTS.values()]
    best = max(matches, key=lambda match: (match.known, -len(match.faults)))
    if not best.known:
        names = listed(sorted(tensor.name for tensor in tensors)) or "none"
        expected = " or ".join(
            f"{layout.title} ({', '.join(layout.examples)}, ...)" for layout in LAYOUTS.values()
        )
        raise ValueError(
            f"{paths[0]} has no GPT-2 weights in a known layout. Its tensors: {names}. Expected "
            + expected
        )
    if best.faults:
        place = paths[0] if len(paths) == 1 else paths[0].parent
        raise ValueError(
            f"the weights in {place} do not fit vocab_size={cfg.vocab_size}, "
            f"context_length={cfg.context_length}, emb_dim={cfg.emb_dim}, n_layers={cfg.n_layers}, "
            f"qkv_bias={cfg.qkv_bias}, tie_embeddings={cfg.tie_embeddings} of config.json: "
            f"{listed(best.faults, '; ')}. Correct config.json, or get the weights that belong to "
            "it"
        )
    return best.layout, best.tensors


def _match(layout: Layout, cfg: GPTConfig, tensors: Sequence[Tensor]) -> _Match:
    wanted = slots(layout, cfg)
    fitting: dict[str, tuple[Tensor, Slot]] = {}
    faults: list[_Fault] = []
    known, blocks = 0, 0
    for tensor in tensors:
        name, block = layout.find(tensor.name) or (None, None)
        known += name is not None
        blocks = max(blocks, 0 if block is None else block + 1)
        if name is not None and layout.is_constant(name):
            continue
        if name is None or name not in wanted:
            faults.append(_Fault("unexpected", tensor.name, block))
        elif name in fitting:
            faults.append(_Fault("duplicate", tensor.name, block, (tensor.path.name,)))
        else:
            slot = wanted[name]
            fitting[name] = tensor, slot
            if tensor.shape != slot.shape:
                faults.append(_Fault("shape", tensor.name, block, (tensor.shape, slot.shape)))
            if tensor.dtype not in FLOATS:
                faults.append(_Fault("dtype", tensor.name, block, (tensor.dtype,)))
    faults += [
        _Fault("missing", name, slot.block)
        for name, slot in wanted.items()
        if name not in fitting and slot.role != "tied head"
    ]
    if faults and blocks != cfg.n_layers:
        # The number of blocks says more than the names of all tensors in the surplus ones.
        common = min(blocks, cfg.n_layers)
        faults = [fault for fault in faults if fault.block is None or fault.block < common]
        faults.append(_Fault("blocks", "", None, (blocks, cfg.n_layers)))
    order = list(_MESSAGES)
    faults.sort(key=lambda fault: (order.index(fault.kind), fault.tensor))
    messages = [_MESSAGES[kind].format(*details, tensor=name) for kind, name, _, details in faults]
    return _Match(layout, known, list(fitting.values()), messages)
