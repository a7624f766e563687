"""`flaxgpt params`."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from typing import Annotated, Any, Literal

import tyro

import flaxgpt
from flaxgpt._checks import check_size, listed
from flaxgpt.cli import tables
from flaxgpt.cli.common import progress, say
from flaxgpt.config import PRESETS, GPTConfig, block_index, block_name
from flaxgpt.inspection import TreeRow, compare, count_params, largest_batch, tree_rows
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning
from flaxgpt.typing import Params
from flaxgpt.weights import read_config, read_stored_bytes

_LISTING = ("depth", "sort", "flops", "memory")
_EXCLUDES = {"fits": (*_LISTING, "diff"), "diff": _LISTING, "json": ("depth", "sort")}
_REQUIRES_ONE_OF = {
    "batch": ("flops", "memory"),
    "length": ("flops", "memory", "fits"),
    "dtype": ("memory", "fits"),
}


@dataclasses.dataclass(frozen=True)
class ParamsCommand:
    """List the parameters of a model, with their number, size and statistics.

    A preset needs no weights: nothing is allocated, and its identical blocks are shown once.

    Examples:
      flaxgpt params gpt2-xl --flops --memory
      flaxgpt params tales --sort count
      flaxgpt params run --diff openai-community/gpt2
      flaxgpt params --fits 16GB
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A preset (gpt2, gpt2-xl, book-124M, ...), or a model as for generate; a hub id needs a slash,
    as in openai-community/gpt2."""

    depth: int = 4
    """Levels of the tree to show, from 1 (parts of the model) to 4 (every array)."""

    sort: Literal["model", "count", "name"] = "model"
    """Order of the rows: as data flows through the model, or only arrays, by size or by name."""

    json: bool = False
    """Print JSON with the keys model, config, count, parameters and others that apply."""

    flops: bool = False
    """Show the operations of a forward pass and a training step, by part."""

    memory: bool = False
    """Show the memory that generation and a training step need."""

    batch: int = 1
    """Batch size for --flops and --memory."""

    length: int | None = None
    """Ids per row for --flops, --memory and --fits; the context length by default."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation for --memory and --fits; weights are float32."""

    diff: str | None = None
    """A second model: show the differences between the two."""

    fits: str | None = None
    """Memory of a device, such as 16GB: show the largest batch that fits, by model or preset."""

    def run(self) -> None:
        """Print to standard output."""
        check_size("--depth", self.depth)
        check_size("--batch", self.batch)
        if self.length is not None:
            check_size("--length", self.length)
        fields = dataclasses.fields(self)
        given = {field.name for field in fields if getattr(self, field.name) != field.default}
        for mode, names in _EXCLUDES.items():
            if mode in given and (useless := given.intersection(names)):
                raise ValueError(f"--{min(useless)} has no effect with --{mode}: omit one of them")
        for name, modes in _REQUIRES_ONE_OF.items():
            if name in given and not given.intersection(modes):
                flags = listed([f"--{mode}" for mode in modes])
                raise ValueError(f"--{name} has no effect without one of {flags}: omit it")
        if self.fits is not None:
            self._print_largest_batches(parse_size(self.fits))
        elif self.model is None:
            presets = ", ".join(PRESETS)
            raise ValueError(f"no model: give a preset ({presets}), a folder, tales or book")
        elif self.diff is not None:
            self._print_differences(self.model, self.diff)
        else:
            self._print_parameters(self.model)

    def _print_parameters(self, model: str) -> None:
        cfg, params, stored = _read(model)
        tree = cfg if params is None else params
        count, rows = count_params(tree), tree_rows(tree, statistics=params is not None)
        length = cfg.context_length if self.length is None else self.length
        flops = flaxgpt.flops(cfg, self.batch, length) if self.flops else None
        used = flaxgpt.memory(cfg, self.batch, length, dtype=self.dtype) if self.memory else None
        if self.json:
            extent = {"batch": self.batch, "length": length}
            _print_json(
                {"model": model, "config": cfg.to_dict(), "count": count.to_dict()}
                | ({"stored": stored} if params is not None else {})
                | {"parameters": [row.to_dict() for row in rows if row.shape is not None]}
                | ({"flops": extent | flops.to_dict()} if flops else {})
                | ({"memory": extent | used.to_dict()} if used else {})
            )
            return
        tables.print_parameters(self._select(rows, cfg, params), count, stored)
        if flops:
            say("\n")
            tables.print_flops(flops, self.batch, length)
        if used:
            say("\n")
            tables.print_memory(used, self.batch, length)

    def _select(self, rows: list[TreeRow], cfg: GPTConfig, params: Params | None) -> list[TreeRow]:
        """Return the rows to show, in order."""
        arrays = [row for row in rows if row.shape is not None]
        if self.sort == "count":
            return sorted(arrays, key=lambda row: -row.count)
        if self.sort == "name":
            return sorted(arrays, key=lambda row: row.path)
        shown = [row for row in rows if len(row.path) <= self.depth]
        if params is not None or cfg.n_layers == 1:
            return shown
        titles = {block_name(0): f"{block_name(0)} to {cfg.n_layers - 1}, each"}
        return [
            dataclasses.replace(row, path=(titles.get(row.path[0], row.path[0]), *row.path[1:]))
            for row in shown
            if block_index(row.path[0]) in (None, 0)
        ]

    def _print_differences(self, a: str, b: str) -> None:
        for name in (a, b):
            if name in PRESETS:
                raise ValueError(f"{name} is a preset without weights: --diff compares two models")
        (cfg_a, params_a, stored_a), (cfg_b, params_b, stored_b) = _read(a), _read(b)
        differences = compare(params_a, params_b)
        one, other = dataclasses.asdict(cfg_a), dataclasses.asdict(cfg_b)
        config = {name: [one[name], other[name]] for name in one if one[name] != other[name]}
        if self.json:
            stored, items = [stored_a, stored_b], [item.to_dict() for item in differences]
            _print_json({"a": a, "b": b, "config": config, "stored": stored, "differences": items})
            return
        for letter, name, sizes in (("A", a, stored_a), ("B", b, stored_b)):
            say(f"{letter}: {name}" + (f", stored as {', '.join(sizes)}\n" if sizes else "\n"))
        for name, (first, second) in config.items():
            say(f"config {name}: {first} in A, {second} in B\n")
        if differences:
            tables.print_differences(differences)
        else:
            say("the parameters are equal\n")

    def _print_largest_batches(self, size: int) -> None:
        names = PRESETS if self.model is None else [self.model]
        configs = {
            name: GPTConfig.preset(name) if name in PRESETS else read_config(name) for name in names
        }
        lengths = {name: self.length or cfg.context_length for name, cfg in configs.items()}
        batches = {
            name: largest_batch(cfg, size, lengths[name], dtype=self.dtype)
            for name, cfg in configs.items()
        }
        if self.json:
            fits = {name: dataclasses.asdict(found) for name, found in batches.items()}
            _print_json({"bytes": size, "fits": fits})
        else:
            tables.print_largest_batches(batches, lengths, size)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `16GB`, `500 MB` or `15.9GiB`."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([KMGT])(I?)B\s*", text.upper())
    size = 0.0
    if match:
        number, prefix, binary = match.groups()
        size = float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix))
    if not 1 <= size < 1e18:
        raise ValueError(f"--fits {text!r} must be a size such as 16GB, 500MB or 15.9GiB")
    return int(size)


def _read(model: str) -> tuple[GPTConfig, Params | None, dict[str, int]]:
    """Return the configuration, the parameters (None for presets) and the bytes by stored dtype."""
    if model in PRESETS:
        return GPTConfig.preset(model), None, {}
    with progress(f"loading {model}") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableTokenizerWarning)  # it is not needed here
        cfg, params, _ = flaxgpt.load(model, progress=advance)
    return cfg, params, read_stored_bytes(model)


def _print_json(values: dict[str, Any]) -> None:
    say(json.dumps(values, indent=2, allow_nan=False) + "\n")
