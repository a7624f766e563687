"""Matching tensors with a layout and a configuration, and reporting all faults together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig
from flaxgpt.weights.layouts import LAYOUTS
from flaxgpt.weights.table import Layout, Slot, slots
from flaxgpt.weights.tensors import FLOATS, Tensor

_MESSAGES = {  # in the order of the report
    "blocks": "the weights have {found} blocks instead of n_layers={expected}",
    "missing": "missing {tensor}",
    "unexpected": "unexpected {tensor}",
    "duplicate": "unexpected second {tensor} in {found}",
    "shape": "{tensor} has shape {found} instead of {expected}",
    "dtype": "{tensor} is {found} instead of {expected}",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way in which a set of tensors does not fit a configuration.

    Attributes:
        kind: a key of `_MESSAGES`.
        tensor: name of the tensor; empty for `blocks`.
        block: number of its block, None outside the blocks.
        found: what the files have.
        expected: what the configuration requires.
    """

    kind: str
    tensor: str = ""
    block: int | None = None
    found: Any = None
    expected: Any = None

    def __str__(self) -> str:
        return _MESSAGES[self.kind].format(**vars(self))


class Match(NamedTuple):
    """How a set of tensors fits a layout and a configuration."""

    layout: Layout
    tensors: dict[str, tuple[Tensor, Slot]]
    """The tensors that the configuration requires or allows, by their full names."""
    faults: list[Fault]
    known: int
    """Number of tensor names that belong to the layout."""


def match_layout(cfg: GPTConfig, tensors: Sequence[Tensor], paths: Sequence[Path]) -> Match:
    """Return the match with the layout that knows the most names.

    Args:
        cfg: the configuration.
        tensors: all tensors in the files.
        paths: the files, for messages.

    Raises:
        ValueError: no layout knows any of the names, or some tensors do not fit.
    """
    matches = [_match(layout, cfg, tensors) for layout in LAYOUTS.values()]
    best = max(matches, key=lambda match: (match.known, -len(match.faults)))
    if not best.known:
        names = listed(sorted(tensor.name for tensor in tensors)) or "none"
        expected = " or ".join(
            f"{layout.title} ({', '.join(layout.examples)}, ...)" for layout in LAYOUTS.values()
        )
        raise ValueError(
            f"{paths[0]} has no GPT-2 weights in a known layout. Its tensors: {names}. Expected "
            f"{expected}"
        )
    if best.faults:
        place = paths[0] if len(paths) == 1 else paths[0].parent
        raise ValueError(
            f"the weights in {place} do not fit vocab_size={cfg.vocab_size}, "
            f"context_length={cfg.context_length}, emb_dim={cfg.emb_dim}, n_layers={cfg.n_layers}, "
            f"qkv_bias={cfg.qkv_bias}, tie_embeddings={cfg.tie_embeddings} of config.json: "
            f"{listed(list(map(str, best.faults)), '; ')}. Correct config.json, or get the weights "
            "that belong to it"
        )
    return best


def _match(layout: Layout, cfg: GPTConfig, tensors: Sequence[Tensor]) -> Match:
    wanted = slots(layout, cfg)
    fitting: dict[str, tuple[Tensor, Slot]] = {}
    faults: list[Fault] = []
    known, blocks = 0, 0
    for tensor in tensors:
        name, block = layout.find(tensor.name) or (None, None)
        known += name is not None
        blocks = max(blocks, 0 if block is None else block + 1)
        if name is not None and layout.is_constant(name):
            continue
        if name is None or name not in wanted:
            faults.append(Fault("unexpected", tensor.name, block))
        elif name in fitting:
            faults.append(Fault("duplicate", tensor.name, block, found=tensor.path.name))
        else:
            slot = wanted[name]
            fitting[name] = tensor, slot
            if tensor.shape != slot.shape:
                faults.append(Fault("shape", tensor.name, block, tensor.shape, slot.shape))
            if tensor.dtype not in FLOATS:
                faults.append(Fault("dtype", tensor.name, block, tensor.dtype, "floating point"))
    faults += [
        Fault("missing", name, slot.block)
        for name, slot in wanted.items()
        if name not in fitting and slot.role != "tied head"
    ]
    if faults and blocks != cfg.n_layers:
        # The number of blocks says more than the names of all tensors in the surplus ones.
        common = min(blocks, cfg.n_layers)
        faults = [fault for fault in faults if fault.block is None or fault.block < common]
        faults.append(Fault("blocks", found=blocks, expected=cfg.n_layers))
    order = list(_MESSAGES)
    faults.sort(key=lambda fault: (order.index(fault.kind), fault.tensor))
    return Match(layout, fitting, faults, known)
