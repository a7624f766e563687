"""Matching tensors with a layout and a configuration, and reporting all faults together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig
from flaxgpt.weights.layouts import LAYOUTS
from flaxgpt.weights.table import Layout, Slot, slots
from flaxgpt.weights.tensors import FLOATS, Tensor

Kind = Literal["blocks", "missing", "unexpected", "shape", "dtype"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way in which a set of tensors does not fit a configuration.

    Attributes:
        kind: what is wrong: the number of blocks, a missing or unexpected tensor, or the shape or
            dtype of a tensor.
        tensor: name of the tensor; empty for `blocks`.
        block: number of its block, None outside the blocks.
        found: what the files have; of a second tensor for the same parameter, its file's name.
        expected: what the configuration requires.
    """

    kind: Kind
    tensor: str = ""
    block: int | None = None
    found: Any = None
    expected: Any = None

    def __str__(self) -> str:
        match self.kind:
            case "blocks":
                return f"the weights have {self.found} blocks instead of n_layers={self.expected}"
            case "missing":
                return f"missing {self.tensor}"
            case "unexpected" if self.found is not None:
                return f"unexpected second {self.tensor} in {self.found}"
            case "unexpected":
                return f"unexpected {self.tensor}"
            case "shape":
                return f"{self.tensor} has shape {self.found} instead of {self.expected}"
            case "dtype":
                return f"{self.tensor} is {self.found} instead of {self.expected}"


_KINDS: tuple[Kind, ...] = ("blocks", "missing", "unexpected", "shape", "dtype")


@dataclasses.dataclass(frozen=True)
class Match:
    """How a set of tensors fits a layout and a configuration.

    Attributes:
        layout: the layout.
        tensors: the tensors that the configuration requires or allows, each with its place in the
            layout, by their full names.
        faults: everything that does not fit.
        known: how many names belong to the layout.
    """

    layout: Layout
    tensors: dict[str, tuple[Tensor, Slot]]
    faults: tuple[Fault, ...]
    known: int


def match_layout(cfg: GPTConfig, tensors: Sequence[Tensor], paths: Sequence[Path]) -> Match:
    """Return the match with the layout that knows the most names, and that has no faults.

    Args:
        cfg: the configuration.
        tensors: all tensors in the files.
        paths: the files, for messages.

    Raises:
        ValueError: no layout knows any of the names, or some tensors do not fit. The message lists
            all faults together.
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
            faults.append(Fault("unexpected", tensor.name, block, found=tensor.path.name))
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
    faults.sort(key=lambda fault: (_KINDS.index(fault.kind), fault.tensor))
    return Match(layout, fitting, tuple(faults), known)
