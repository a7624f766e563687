"""The book's layout: the state dict of its PyTorch `GPTModel`, and its config dict as JSON.

`INT8` has the same names, and scales beside the weights.
"""

from __future__ import annotations

import re
from itertools import product

from flaxgpt.config import GPTConfig
from flaxgpt.weights.table import HEAD, TOKEN_EMBEDDING, Entry, Layout, block_path

_PROJECTIONS = ("att/W_query", "att/W_key", "att/W_value", "att/out_proj")
_LINEAR = (*_PROJECTIONS, "ff/layers_0", "ff/layers_2")
_BLOCK = (*product(("norm1", "norm2"), ("scale", "shift")), *product(_LINEAR, ("weight", "bias")))
_PATHS = (
    TOKEN_EMBEDDING,
    "pos_emb/weight",
    *(block_path("/".join(names)) for names in _BLOCK),
    "final_norm/scale",
    "final_norm/shift",
    HEAD,
)


def _torch_name(path: str) -> str:
    """Return PyTorch's name of a parameter: linen appends the number of a list item with "_"."""
    return re.sub(r"_(\d|\{l\})/", r".\1/", path).replace("/", ".")


_SCALES = tuple(f"{path}_scale" for path in _PATHS if path.endswith("/weight"))


BOOK = Layout(
    title="the book's",
    entries=tuple(Entry(path, _torch_name(path)) for path in _PATHS),
    constants=(_torch_name(block_path("att/mask")),),
    # The book's GPTModel always has an output head, and load_state_dict requires it.
    writes_tied_head=True,
    write_config=GPTConfig.to_dict,
)
INT8 = Layout(
    title="flaxgpt's for int8 weights",
    entries=tuple(Entry(path, _torch_name(path)) for path in (*_PATHS, *_SCALES)),
    write_config=GPTConfig.to_dict,
    is_int8=True,
)
