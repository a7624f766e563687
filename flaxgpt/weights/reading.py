"""From tensors in files to parameters: which layout, whether they fit, then one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from flaxgpt._checks import listed
from flaxgpt.config import GPTConfig
from flaxgpt.typing import Params, Progress
from flaxgpt.weights.book import BOOK
from flaxgpt.weights.huggingface import HUGGINGFACE
from flaxgpt.weights.table import Layout, Slot, slots, split
from flaxgpt.weights.tensors import FLOATS, Tensor, read, stamp, tensors_in

LAYOUTS = (HUGGINGFACE, BOOK)


def read_params(cfg: GPTConfig, paths: Sequence[Path], progress: Progress | None) -> Params:
    """Returns the parameters in some safetensors files, which may be in either layout.

    Host memory stays near the size of the parameters: the largest tensors are read first, when
    there is room for their copies, and none is kept once it is on the device.

    Raises:
        ValueError: the files are damaged, or do not fit the configuration.
    """
    stamps = [stamp(path) for path in paths]
    there = [tensor for path in paths for tensor in tensors_in(path)]
    layout = _layout([tensor.name for tensor in there], paths)
    wanted = slots(layout, cfg)
    found = _checked(cfg, layout, wanted, there, paths)

    def order(name: str) -> tuple[int, bool]:
        return -found[name].size, wanted[name].role == "tied head"

    params: dict[str, jax.Array] = {}
    total = sum(tensor.size for tensor in found.values())
    done = 0
    for name in sorted(found, key=order):
        if wanted[name].role == "weights":
            params |= _on_device(found[name], wanted[name])
        else:
            _check_spare(layout, found[name], wanted[name], params)
        done += found[name].size
        if progress is not None:
            progress(done, total)
    if [stamp(path) for path in paths] != stamps:
        raise ValueError(f"{paths[0].parent} was written to while it was being read: load it again")
    return unflatten_dict(params, sep="/")


def stored_bytes(paths: Sequence[Path]) -> dict[str, int]:
    """Returns what the numbers in some safetensors files take there, in bytes by dtype."""
    sizes: dict[str, int] = {}
    for tensor in (tensor for path in paths for tensor in tensors_in(path)):
        if dtype := FLOATS.get(tensor.dtype):
            size = tensor.size * int(jnp.dtype(dtype).itemsize)
            sizes[dtype] = sizes.get(dtype, 0) + size
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _on_device(tensor: Tensor, slot: Slot) -> dict[str, jax.Array]:
    # A function of its own, so that the values on the host are gone before the next are read.
    return {
        path: jax.device_put(np.ascontiguousarray(part)).block_until_ready()
        for path, part in split(read(tensor), slot)
    }


def _layout(names: Sequence[str], paths: Sequence[Path]) -> Layout:
    known = {layout.name: sum(map(bool, map(layout.full_name, names))) for layout in LAYOUTS}
    best = max(LAYOUTS, key=lambda layout: known[layout.name])
    if not known[best.name]:
        shown = listed(sorted(names)) or "no tensors at all"
        raise ValueError(
            f"{paths[0]} has no GPT-2 weights that flaxgpt knows. Its names: {shown}. "
            "Expected Hugging Face's "
            "(transformer.wte.weight, transformer.h.0.attn.c_attn.weight, ...) or the book's "
            "(tok_emb.weight, trf_blocks.0.att.W_query.weight, ...)"
        )
    return best


def _checked(
    cfg: GPTConfig,
    layout: Layout,
    wanted: dict[str, Slot],
    there: Sequence[Tensor],
    paths: Sequence[Path],
) -> dict[str, Tensor]:
    """Returns the tensors by their full names, or raises ValueError with all that is wrong."""
    found: dict[str, Tensor] = {}
    unexpected, misshapen, mistyped = [], [], []
    for tensor in there:
        name = layout.full_name(tensor.name)
        if name is not None and layout.is_constant(name):
            continue
        if name in found:
            unexpected.append(f"unexpected second {tensor.name} in {tensor.path.name}")
        elif name is None or name not in wanted:
            unexpected.append(f"unexpected {tensor.name}")
        else:
            found[name] = tensor
            if tensor.shape != wanted[name].shape:
                misshapen.append(
                    f"{tensor.name} has shape {tensor.shape} instead of {wanted[name].shape}"
                )
            if tensor.dtype not in FLOATS:
                mistyped.append(f"{tensor.name} is {tensor.dtype} instead of floating point")
    missing = [
        f"missing {name}"
        for name, slot in wanted.items()
        if name not in found and slot.role != "tied head"
    ]
    faults = [*sorted(missing), *sorted(unexpected), *sorted(misshapen), *sorted(mistyped)]
    named = [tensor.name for tensor in there if layout.full_name(tensor.name)]
    blocks = 1 + max(map(_block, named))
    if faults and blocks != cfg.n_layers:
        # All of a block being too much or too little says less than their number does.
        common = min(blocks, cfg.n_layers)
        faults = [fault for fault in faults if _block(fault) < common]
        faults.insert(0, f"the weights have {blocks} blocks instead of n_layers={cfg.n_layers}")
    if faults:
        raise ValueError(
            f"the weights in {_place(paths)} do not fit vocab_size={cfg.vocab_size}, "
            f"context_length={cfg.context_length}, emb_dim={cfg.emb_dim}, n_layers={cfg.n_layers}, "
            f"qkv_bias={cfg.qkv_bias}, tie_embeddings={cfg.tie_embeddings} of config.json: "
            f"{listed(faults, '; ')}. Correct config.json, or get the weights it is for"
        )
    return found


def _block(text: str) -> int:
    """Returns the first number that stands between dots, which is a block's, or -1."""
    numbers = [part for part in text.split(" has shape")[0].split(".")[1:-1] if part.isdigit()]
    return int(numbers[0]) if numbers else -1


def _place(paths: Sequence[Path]) -> str:
    return str(paths[0] if len(paths) == 1 else paths[0].parent)


def _check_spare(layout: Layout, tensor: Tensor, slot: Slot, params: dict[str, jax.Array]) -> None:
    """Raises ValueError unless a tensor that the parameters leave out can be left out."""
    values = read(tensor)
    if slot.role == "zero bias" and values.any():
        raise ValueError(
            f"{tensor.path}: {tensor.name} is not all zeros, yet config.json says "
            '"qkv_bias": false; set it true to keep the bias'
        )
    if slot.role == "tied head":
        embedding = np.asarray(params["tok_emb/weight"])
        if not np.array_equal(values.view(np.uint32), embedding.view(np.uint32)):  # NaN equals NaN
            raise ValueError(
                f"{tensor.path}: {tensor.name} differs from the token embedding, yet config.json "
                f'ties the two; set "{layout.tie_key}": false there to keep both'
            )
