"""Reading models, or only their configuration and the size of their files."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flaxgpt.config import GPTConfig
from flaxgpt.model import param_shapes
from flaxgpt.sharding import ShardRules, check_mesh, shard, shard_rules
from flaxgpt.tokenizer import Tokenizer, load_tokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning, read_model_tokenizer
from flaxgpt.typing import Params, Progress
from flaxgpt.weights.book_init import book_params
from flaxgpt.weights.matching import match_layout
from flaxgpt.weights.parts import Targets, put_on_mesh, same_bits
from flaxgpt.weights.source import locate, read_config_file, weight_files
from flaxgpt.weights.table import TOKEN_EMBEDDING, Slot, stored_shapes
from flaxgpt.weights.tensors import STORED, Tensor, read, stamp, tensors_in

_FILES = "vocab.json and merges.txt, tokenizer.json, vocab.txt or flaxgpt_tokenizer.json"
_OTHERS = "flaxgpt.load_tokenizer('gpt2') if it was trained with GPT-2's"


def load(
    source: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    rules: ShardRules | None = None,
) -> tuple[GPTConfig, Params, Tokenizer | None]:
    """Read the configuration, parameters and tokenizer of a model.

    With a mesh, each device's part of a parameter is read from the safetensors file on its own: no
    device holds more than its part, and the host holds one part at a time. With several processes,
    each process reads the parts of its own devices.

    Args:
        source: one of

            - a folder in the layout of Hugging Face, the book or nanoGPT, with `config.json` and
              either `model.safetensors` or `flax_model.msgpack`, or shards and their index;
            - a `.safetensors` or `.msgpack` file with a `config.json` beside it;
            - the folder of a training run, for its best model;
            - a model on the Hugging Face hub, such as `gpt2`, downloaded unless it is cached;
            - `tales`, the small trained model in the package, or `book`, the book's untrained 124M
              model. Folders of these names are `./tales` and `./book`.
        progress: called with (parameters read, parameters in total).
        mesh: the mesh to read the parameters onto, such as `flaxgpt.make_mesh(data=1, fsdp=-1)`;
            None for one device. The values are the same. The parameters of `book`, and those in a
            `.msgpack` file, are whole in the memory of each process before they are split.
        rules: how to split them, if not by `flaxgpt.shard_rules(cfg)`.

    Returns:
        The configuration; the parameters, as nested float32 arrays whatever the dtype in the file,
        or int8 weights and their scales if they were saved so (see `flaxgpt.quantize`); and the
        tokenizer stored with the model, whose `stop_ids` are the model's. Without one, a model with
        GPT-2's vocabulary size gets GPT-2's tokenizer, unless its files name another. A missing or
        unreadable tokenizer gives an `UnreadableTokenizerWarning` and None.

    Raises:
        FileNotFoundError: there is no such folder, file or model.
        PermissionError: the model on the hub is gated.
        ConnectionError: the hub cannot be reached.
        ValueError: a file is damaged, of an unsupported kind, or does not fit the configuration;
            the mesh has an unknown axis; a rule does not fit a parameter; or there are rules but no
            mesh.

    Warns:
        UserWarning: something in the folder is left out, such as another head than the language
            model's, an unknown key of the configuration or a tokenizer that cannot be read.
    """
    if mesh is not None:
        mesh = check_mesh(mesh)
    elif rules is not None:
        raise ValueError(
            "rules split parameters over a mesh, but there is no mesh: give one too, such as "
            "mesh=flaxgpt.make_mesh(data=1, fsdp=-1)"
        )
    if source == "book":
        cfg = read_config(source)
        params = book_params(cfg, progress=progress)
        if mesh is not None:
            params = shard(params, mesh, shard_rules(cfg) if rules is None else rules)
        return cfg, params, load_tokenizer("gpt2")
    path = locate(source)
    paths = weight_files(path)
    cfg = read_config_file(path)
    if mesh is not None:
        rules = shard_rules(cfg) if rules is None else rules
        rules.shardings(param_shapes(cfg), mesh)  # raises for a rule that does not fit
    folder = path if path.is_dir() else path.parent
    tokenizer = None
    try:
        tokenizer = read_model_tokenizer(folder, cfg.vocab_size)
        reason = f" for its {cfg.vocab_size} tokens: add {_FILES} to {folder}, or use {_OTHERS}"
    except ValueError as error:
        reason = f": {error}"
    if tokenizer is None:
        # The weights are still useful.
        warnings.warn(f"no tokenizer{reason}", UnreadableTokenizerWarning, stacklevel=2)
    return cfg, _read_params(cfg, paths, progress, mesh, rules), tokenizer


def read_config(source: str | os.PathLike[str]) -> GPTConfig:
    """Return the configuration of a model without reading its weights.

    `source` and the exceptions are those of `load`.
    """
    return GPTConfig.preset("book-124M") if source == "book" else read_config_file(locate(source))


def read_stored_bytes(source: str | os.PathLike[str]) -> dict[str, int]:
    """Return the size of a model's weights in its files, in bytes by dtype, largest first.

    The dtypes are those of the files; `load` converts all floating-point weights to float32.
    `source` and the exceptions are those of `load`; `book` is computed and has no files.
    """
    sizes: Counter[str] = Counter()
    paths = [] if source == "book" else weight_files(locate(source))
    for tensor in tensors_in(paths):
        if dtype := STORED.get(tensor.dtype):
            sizes[dtype] += tensor.size * int(jnp.dtype(dtype).itemsize)
    return dict(sizes.most_common())


def _targets(shapes: Params, mesh: Mesh, rules: ShardRules) -> Targets:
    shardings = flatten_dict(rules.shardings(shapes, mesh), sep="/")
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in flatten_dict(shapes, sep="/").items()
    }


def _read_params(
    cfg: GPTConfig,
    paths: Sequence[Path],
    progress: Progress | None,
    mesh: Mesh | None,
    rules: ShardRules | None,
) -> Params:
    stamps = [stamp(path) for path in paths]
    layout, tensors = match_layout(cfg, paths)
    targets: Targets | None = None
    if mesh is not None:
        targets = _targets(stored_shapes(layout, cfg), mesh, rules or shard_rules(cfg))
    # The largest tensors are read first, while there is room for a copy of them, so that host
    # memory stays near the size of the parameters. A tied head comes after the token embedding,
    # which has its size, because it is compared to it.
    order = sorted(tensors, key=lambda pair: (-pair[0].size, pair[1].role == "tied head"))
    done, total = 0, sum(tensor.size for tensor, _ in order)
    params: dict[str, jax.Array] = {}
    for tensor, slot in order:
        if slot.role == "weights":
            params |= (
                _put_on_device(tensor, slot)
                if targets is None
                else put_on_mesh(tensor, slot.entries, targets)
            )
        # Leaving out the other tensors must not change the model.
        elif slot.role == "zero bias":
            _check_zeros(tensor, slot)
        elif not _is_embedding(tensor, slot, params, targets):
            raise ValueError(
                f"{tensor.path}: {tensor.name} differs from the token embedding, but config.json "
                f'ties the two; set "{layout.tie_key}" to false there to keep both'
            )
        done += tensor.size
        if progress is not None:
            progress(done, total)
    if [stamp(path) for path in paths] != stamps:
        raise ValueError(f"{paths[0].parent} was modified while it was being read: load it again")
    return unflatten_dict(params, sep="/")


def _put_on_device(tensor: Tensor, slot: Slot) -> dict[str, jax.Array]:
    # In its own function, so that the copy on the host is freed before the next tensor is read.
    parts = np.split(read(tensor), len(slot.entries), axis=slot.entries[0].output_axis)
    loaded = {}
    for entry, part in zip(slot.entries, parts, strict=True):
        values = np.ascontiguousarray(part.T if entry.transposed else part)
        loaded[entry.ours] = jax.device_put(values).block_until_ready()
    return loaded


def _check_zeros(tensor: Tensor, slot: Slot) -> None:
    if read(tensor).any():
        raise ValueError(
            f"{tensor.path}: {tensor.name} is not all zeros, but config.json says "
            f'"{"qkv_bias" if len(slot.entries) > 1 else "bias"}": false; set it to true to keep it'
        )


def _is_embedding(
    tensor: Tensor, slot: Slot, params: dict[str, jax.Array], targets: Targets | None
) -> bool:
    if targets is not None:
        (head,) = put_on_mesh(tensor, slot.entries, targets).values()
        return same_bits(head, params[TOKEN_EMBEDDING])
    values, embedding = read(tensor), np.asarray(params[TOKEN_EMBEDDING])
    values = values.T if slot.entries[0].transposed else values
    return np.array_equal(values.view(np.uint32), embedding.view(np.uint32))  # NaN equals NaN
