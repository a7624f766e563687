"""`flaxgpt params`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

import tyro

import flaxgpt
from flaxgpt._checks import check_size, listed
from flaxgpt.cli.common import progress, say
from flaxgpt.cli.tables import (
    difference_table,
    fitting_table,
    flops_table,
    memory_table,
    parameter_table,
    print_table,
    totals,
)
from flaxgpt.config import PRESETS, GPTConfig
from flaxgpt.inspection.memory_use import fitting, memory
from flaxgpt.inspection.parameters import count_params
from flaxgpt.inspection.tree import Row, compare, rows
from flaxgpt.weights import read_config, read_stored_bytes


@dataclasses.dataclass(frozen=True)
class Params:
    """List the parameters of a model: where they are, how many, what they weigh and hold.

    A preset is listed without allocating anything, its blocks folded into one, as they are alike;
    a model's numbers are looked at too.

    Examples:
      flaxgpt params gpt2-xl --flops --memory
      flaxgpt params tales --sort count
      flaxgpt params run --diff openai-community/gpt2
      flaxgpt params --fits 16GB
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A preset (gpt2, gpt2-xl, book-124M, ...), or as for generate: "tales", "book", a folder, a
    run, a safetensors file or a hub id with a slash, such as openai-community/gpt2."""

    depth: int = 4
    """Levels of the tree to show: 1 is the model's parts, 4 every array."""

    sort: Literal["model", "count", "name"] = "model"
    """Order: as data flows, or arrays alone, largest first, or by name."""

    json: bool = False
    """Print JSON instead: keys model, config, count, parameters, and what else is asked for."""

    flops: bool = False
    """Add the operations of a forward pass and a training step, by part."""

    memory: bool = False
    """Add the memory that generation and a training step take (on CPU, XLA undoes remat)."""

    batch: int = 1
    """Rows, for --flops and --memory."""

    length: int | None = None
    """Ids a row, for --flops, --memory and --fits; the model's context unless given."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in, for --memory and --fits; weights stay float32."""

    diff: str | None = None
    """A second model: print what differs between the two instead."""

    fits: str | None = None
    """Memory of a device, such as 16GB: print what of the model, or each preset, fits in it."""

    def run(self) -> None:
        """Prints to standard output."""
        check_size("--depth", self.depth)
        check_size("--batch", self.batch)
        if self.length is not None:
            check_size("--length", self.length)
        self._check_that_all_is_of_use()
        if self.fits is not None:
            self._print_fitting(parse_size(self.fits))
            return
        if self.model is None:
            raise ValueError(
                f"no model: give a preset ({', '.join(PRESETS)}), a folder, tales or book"
            )
        if self.diff is not None:
            self._print_differences(self.model, self.diff)
            return
        cfg, params, stored = _read(self.model)
        values: dict[str, Any] = {"model": self.model, "config": cfg.to_dict()}
        tree = cfg if params is None else params
        count = count_params(tree)
        length = cfg.context_length if self.length is None else self.length
        flops = flaxgpt.flops(cfg, self.batch, length) if self.flops else None
        used = memory(cfg, self.batch, length, dtype=self.dtype) if self.memory else None
        found = rows(tree, statistics=params is not None)
        if self.json:
            values["count"] = count.to_dict()
            if params is not None:
                values["stored"] = stored
            values["parameters"] = [_as_dict(row) for row in found if row.shape is not None]
            for name, part in (("flops", flops), ("memory", used)):
                if part is not None:
                    values[name] = {"batch": self.batch, "length": length, **part.to_dict()}
            say(json.dumps(values, indent=2, allow_nan=False) + "\n")
            return
        folded = params is None and cfg.n_layers > 1 and self.sort == "model"
        print_table(parameter_table(_arranged(found, self.depth, self.sort, cfg, folded), count))
        say(totals(count, stored) + "\n")
        if flops is not None:
            print_table(flops_table(flops, self.batch, length))
        if used is not None:
            print_table(memory_table(used, self.batch, length))

    def _check_that_all_is_of_use(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name, value in defaults.items() if getattr(self, name) != value]
        of_listing = ("depth", "sort", "flops", "memory", "batch")
        useless = {
            "fits": (*of_listing, "diff"),
            "diff": (*of_listing, "length", "dtype"),
            "json": ("depth", "sort"),
        }
        for mode, names in useless.items():
            if mode in given and (found := [name for name in names if name in given]):
                raise ValueError(f"--{found[0]} does nothing with --{mode}: leave one of them out")
        takers = {
            "batch": ("flops", "memory"),
            "length": ("flops", "memory", "fits"),
            "dtype": ("memory", "fits"),
        }
        for name, modes in takers.items():
            if name in given and not any(mode in given for mode in modes):
                raise ValueError(f"--{name} is for {listed([f'--{mode}' for mode in modes])} alone")

    def _print_differences(self, a: str, b: str) -> None:
        first, second = _read(a), _read(b)
        for name, (_, params, _) in ((a, first), (b, second)):
            if params is None:
                raise ValueError(f"{name} is a preset, without numbers: --diff takes two models")
        of_config = _config_differences(first[0], second[0])
        found = compare(first[1], second[1])
        if self.json:
            values = {
                "a": a,
                "b": b,
                "config": {name: list(pair) for name, pair in of_config.items()},
                "stored": [first[2], second[2]],
                "differences": [_finite(dataclasses.asdict(item)) for item in found],
            }
            say(json.dumps(values, indent=2, allow_nan=False) + "\n")
            return
        for name, (one, other) in of_config.items():
            say(f"config {name}: {one} in A, {other} in B\n")
        one, other = (", ".join(stored) or "no file" for *_, stored in (first, second))
        if one != other:
            say(f"stored as {one} in A, {other} in B; all are compared as float32\n")
        if not found:
            say("the parameters are equal\n")
            return
        print_table(difference_table(found, a, b))

    def _print_fitting(self, size: int) -> None:
        names = [self.model] if self.model is not None else list(PRESETS)
        configs = {name: _read_config(name) for name in names}
        lengths = {name: self.length or cfg.context_length for name, cfg in configs.items()}
        answers = {
            name: fitting(cfg, size, lengths[name], dtype=self.dtype)
            for name, cfg in configs.items()
        }
        if self.json:
            fits = {name: dataclasses.asdict(answer) for name, answer in answers.items()}
            say(json.dumps({"bytes": size, "fits": fits}, indent=2) + "\n")
            return
        print_table(fitting_table(answers, lengths, size))


def parse_size(text: str) -> int:
    """Returns bytes of a size such as `16GB`, `500 MB` or `15.9GiB`."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {f"{unit[0]}iB".upper(): 1024 ** (i + 1) for i, unit in enumerate(units)}
    compact = text.strip().upper().replace(" ", "")
    unit = next(
        (unit for unit in sorted(units, key=len, reverse=True) if compact.endswith(unit)), ""
    )
    try:
        size = float(compact.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        size = math.nan
    if not 1 <= size < 1e18 or not unit:
        raise ValueError(f"--fits {text!r} must be a size such as 16GB, 500MB or 15.9GiB")
    return int(size)


def _read(model: str) -> tuple[GPTConfig, Any, dict[str, int]]:
    """Returns a configuration and, of what has numbers, those and their files' bytes by dtype."""
    if model in PRESETS:
        return GPTConfig.preset(model), None, {}
    with progress(f"loading {model}") as advance:
        cfg, params, _ = flaxgpt.load(model, progress=advance)
    return cfg, params, read_stored_bytes(model)


def _read_config(model: str) -> GPTConfig:
    return GPTConfig.preset(model) if model in PRESETS else read_config(model)


def _arranged(found: list[Row], depth: int, sort: str, cfg: GPTConfig, folded: bool) -> list[Row]:
    if sort != "model":
        arrays = [row for row in found if row.shape is not None]
        return sorted(arrays, key=(lambda r: -r.count) if sort == "count" else (lambda r: r.path))
    shown = [row for row in found if len(row.path) <= depth]
    if not folded:
        return shown
    block = "trf_blocks_0"
    name = f"trf_blocks_0 to {cfg.n_layers - 1}, each"
    return [
        dataclasses.replace(row, path=(name, *row.path[1:])) if row.path[0] == block else row
        for row in shown
        if row.path[0] == block or not row.path[0].startswith("trf_blocks_")
    ]


def _config_differences(a: GPTConfig, b: GPTConfig) -> dict[str, tuple[Any, Any]]:
    one, other = dataclasses.asdict(a), dataclasses.asdict(b)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _as_dict(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "path": row.name,
        "shape": list(row.shape or ()),
        "dtype": row.dtype,
        "count": row.count,
        "bytes": row.bytes,
    }
    if row.statistics is not None:
        values |= _finite(dataclasses.asdict(row.statistics))
        values["faults"] = list(row.statistics.faults)
    return values


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values for JSON, which has no NaN: null stands for what is no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
