"""The book's layout: names of its PyTorch `GPTModel`'s state dict, and its config dict as JSON."""

from __future__ import annotations

from flaxgpt.config import GPTConfig
from flaxgpt.weights.table import Layout, Row

_BLOCK = (
    "norm1/scale",
    "norm1/shift",
    "att/W_query/weight",
    "att/W_query/bias",
    "att/W_key/weight",
    "att/W_key/bias",
    "att/W_value/weight",
    "att/W_value/bias",
    "att/out_proj/weight",
    "att/out_proj/bias",
    "norm2/scale",
    "norm2/shift",
    "ff/layers_0/weight",
    "ff/layers_0/bias",
    "ff/layers_2/weight",
    "ff/layers_2/bias",
)
# Our names are the book's: where PyTorch numbers the parts of a list, linen appends the number.
_BLOCK_NAMES = tuple(path.replace("layers_", "layers.").replace("/", ".") for path in _BLOCK)

BOOK = Layout(
    name="book",
    rows=(
        Row("tok_emb/weight", "tok_emb.weight"),
        Row("pos_emb/weight", "pos_emb.weight"),
        *(
            Row(f"trf_blocks_{{l}}/{path}", f"trf_blocks.{{l}}.{name}")
            for path, name in zip(_BLOCK, _BLOCK_NAMES, strict=True)
        ),
        Row("final_norm/scale", "final_norm.scale"),
        Row("final_norm/shift", "final_norm.shift"),
        Row("out_head/weight", "out_head.weight"),
    ),
    constants=("trf_blocks.{l}.att.mask",),
    prefix="",
    # Its GPTModel has an output head of its own, which load_state_dict wants to find.
    writes_tied_head=True,
    tie_key="tie_embeddings",
    write_config=GPTConfig.to_dict,
    metadata=None,
)
