"""From the path that JAX gives an operation, such as "jit(f)/GPT.states/trf_blocks_0/att/mul", to
the part of the model that it belongs to."""

from __future__ import annotations

import itertools
import re

_PARTS = {
    "att": "attention",
    "ff": "feed-forward",
    "norm1": "norms",
    "norm2": "norms",
    "final_norm": "norms",
    "GPT.logits": "head",
    "out_head": "head",
    "tok_emb": "embedding",
    "pos_emb": "embedding",
    "drop_emb": "embedding",
}
_MODEL = re.compile(r"GPT\.\w+|trf_blocks_\d+")
_WRAPPER = re.compile(
    r"jit\(.*?\)+|jvp\(.*?\)+|transpose\(.*?\)+|vmap\(.*?\)+|while|body|cond|closed_call|remat\w*"
    r"|checkpoint|rematted_computation|GPT\.\w+|trf_blocks_\d+|shard_map"
)
# Products over the vocabulary (v), which the loss computes itself.
_HEAD_PRODUCT = re.compile(r"[a-z.]*v[a-z.]*,[a-z.]+->[a-z.]+|[a-z.]+,[a-z.]*v[a-z.]*->[a-z.]+")
OTHER = "other"
"""The part of operations that are not of the model, such as copies that the compiler adds."""


def part_of(path: str) -> tuple[str, str]:
    """Return the part of the model, and the operation's name within it.

    >>> part_of("jit(decode)/while/body/GPT.states/trf_blocks_3/ff/layers_0/dot_general")
    ('feed-forward', 'layers_0/dot_general')
    >>> part_of("jit(train_step)/transpose(jvp(jit(_states)))/GPT.states/trf_blocks_3/att/mul")
    ('attention, backward', 'mul')

    Outside of the model, operations of `decode` are "sampling", and those of a training step "loss"
    if they are differentiated, and else "optimizer".

    Args:
        path: the operation's `op_name` in the compiled program.
    """
    pieces = path.split("/")
    kept = [piece for piece in pieces if piece and not _WRAPPER.fullmatch(piece)]
    name = "/".join(piece for piece, _ in itertools.groupby(kept))  # kernels are named twice
    name = name or pieces[-1]
    part = next((_PARTS[piece] for piece in pieces if piece in _PARTS), "")
    if "GPT.logits" in pieces or any(map(_HEAD_PRODUCT.fullmatch, pieces)):
        part = "head"
    if part:
        name = name.partition("/")[2] or name if name.split("/")[0] in _PARTS else name
    elif any(map(_MODEL.fullmatch, pieces)):
        part = "residual stream"
    elif pieces[0] == "jit(train_step)" or pieces[0] == "jit(train_steps)":
        part = "loss" if "jvp(" in path else "optimizer"
    elif pieces[0] == "jit(decode)" and len(pieces) > 1:
        part = "sampling"
    else:
        return OTHER, name or OTHER
    return f"{part}, backward" if "transpose(" in path else part, name
