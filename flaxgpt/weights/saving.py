"""Writing models: `save`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flaxgpt._checks import check_params, unknown_name
from flaxgpt._files import replacing_folder
from flaxgpt._quantized import is_quantized, refuse_quantized
from flaxgpt.config import GPTConfig
from flaxgpt.model import param_shapes
from flaxgpt.sharding import gather_on_first, is_shared, wait_for_all
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.tokenizer.folder import save_tokenizer
from flaxgpt.typing import Params
from flaxgpt.weights.book import INT8
from flaxgpt.weights.layouts import LAYOUTS
from flaxgpt.weights.table import export, stored_shapes
from flaxgpt.weights.tensors import INDEXES, SINGLE

# The files that `save` and transformers' save_pretrained write: only these may be replaced.
REPLACEABLE = (
    *("config.json", "generation_config.json", SINGLE, INDEXES[0], "model-*-of-*.safetensors"),
    *("flaxgpt_tokenizer.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def save(
    folder: str | os.PathLike[str],
    cfg: GPTConfig,
    params: Params,
    *,
    layout: Literal["huggingface", "book"] | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model to a folder atomically.

    On Linux, the folder holds the old model or the new one after a crash. On other systems, a crash
    while an old model is being replaced can leave both in hidden folders next to it.

    `load` reads both layouts, bit for bit.

    Parameters that are spread over several processes are brought together in process 0, which
    writes them; call `save` in all processes.

    Args:
        folder: a new folder, or one that holds only a saved model, which is replaced.
        cfg: the configuration.
        params: its parameters; bfloat16 and float16 are written unchanged, and so are int8 weights
            with their scales (see `flaxgpt.quantize`), the rest as float32.
        layout: `huggingface`, for transformers' `GPT2LMHeadModel`, or `book`, for its `GPTModel`.
            By default the first; for int8 weights, a layout of flaxgpt's own with the book's names.
        tokenizer: if given, stored with the weights, as are its `stop_ids`.

    Raises:
        ValueError: params do not fit `cfg`, the layout is unknown or has no int8 weights, or the
            folder holds other files.
        OSError: the folder cannot be written. Its previous contents are unchanged.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    check_params(param_shapes(cfg), params)
    table = LAYOUTS[layout or "huggingface"]
    if is_quantized(params):
        if layout is not None:
            refuse_quantized(params, f"the layout {layout!r}")
        table = INT8
        _check_all_quantized(cfg, params)
    if is_shared(params):
        params = gather_on_first(params)
        try:
            if jax.process_index() == 0:
                save(folder, cfg, params, layout=layout, tokenizer=tokenizer)
        finally:
            wait_for_all("flaxgpt.save")
        return
    assert table.write_config is not None
    with replacing_folder(Path(folder).expanduser(), REPLACEABLE) as temporary:
        values = table.write_config(cfg)
        if tokenizer is not None and "eos_token_id" in values:
            values |= _token_ids(tokenizer)
        config = json.dumps(values, indent=2) + "\n"
        (temporary / "config.json").write_text(config, encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        try:
            save_file(export(table, cfg, params), temporary / SINGLE, table.metadata)
        except SafetensorError as error:
            raise OSError(f"the weights cannot be written to {folder}: {error}") from error


def _check_all_quantized(cfg: GPTConfig, params: Params) -> None:
    expected, found = flatten_dict(stored_shapes(INT8, cfg)), flatten_dict(params)
    if expected.keys() != found.keys():
        raise ValueError(
            "some weights of params are int8 and others are not, which no file layout has: use "
            "flaxgpt.dequantize(params), or flaxgpt.quantize on all of them"
        )


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings of config.json that say where a text begins and ends."""
    ids = list(tokenizer.stop_ids)
    start = tokenizer.special_tokens.get("<|endoftext|>")
    return {"bos_token_id": start, "eos_token_id": ids if len(ids) > 1 else ids[0] if ids else None}
