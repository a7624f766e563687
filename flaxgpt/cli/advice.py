"""What is wrong with a command line that cannot be parsed, and what was probably meant."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import tyro

from flaxgpt._checks import close_names, unknown_name

# Names in nanoGPT and in Hugging Face's libraries; of several names, the command's own counts.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "adam-beta1": ("beta1",),
    "adam-beta2": ("beta2",),
    "adam-epsilon": ("eps",),
    "batch-size": ("batch",),
    "block-size": ("context-length",),
    "checkpoint": ("init-from", "model"),
    "dataset": ("data",),
    "do-sample": ("temperature",),
    "dropout": ("drop-rate",),
    "eval-interval": ("eval-every",),
    "eval-iters": ("eval-windows",),
    "eval-steps": ("eval-every",),
    "file": ("data",),
    "gradient-accumulation-steps": ("accumulate",),
    "gradient-checkpointing": ("remat",),
    "hidden-size": ("emb-dim",),
    "input": ("data", "prompt", "text"),
    "logging-steps": ("log-every",),
    "log-interval": ("log-every",),
    "lr": ("learning-rate",),
    "max-grad-norm": ("grad-clip",),
    "max-iters": ("steps",),
    "max-length": ("max-new-tokens", "context-length", "length"),
    "max-position-embeddings": ("context-length",),
    "max-seq-length": ("context-length",),
    "max-steps": ("steps",),
    "max-tokens": ("max-new-tokens",),
    "min-lr": ("min-learning-rate",),
    "model-name-or-path": ("model", "init-from"),
    "n-embd": ("emb-dim",),
    "n-head": ("n-heads",),
    "n-layer": ("n-layers",),
    "n-positions": ("context-length",),
    "num-attention-heads": ("n-heads",),
    "num-hidden-layers": ("n-layers",),
    "num-return-sequences": ("n",),
    "num-samples": ("n",),
    "num-tokens": ("max-new-tokens",),
    "optim": ("optimizer",),
    "out-dir": ("out",),
    "output": ("out",),
    "output-dir": ("out",),
    "per-device-train-batch-size": ("batch-size", "batch"),
    "precision": ("dtype",),
    "preset": ("recipe",),
    "resume": ("init-from",),
    "resume-from-checkpoint": ("init-from",),
    "save-steps": ("save-every",),
    "start": ("prompt",),
    "stop-token": ("stop",),
    "tie-word-embeddings": ("tie-embeddings",),
    "tie-weights": ("tie-embeddings",),
    "tokens": ("max-new-tokens",),
    "train-file": ("data",),
    "validation-file": ("validation-data",),
    "validation-split": ("val-fraction",),
    "warmup-iters": ("warmup-steps",),
    "warmup-ratio": ("warmup-fraction",),
}
_OTHER_COMMANDS = {
    "chat": "generate",
    "complete": "generate",
    "finetune": "train",
    "fine-tune": "train",
    "inspect": "params",
    "resume": "train",
    "run": "generate",
    "sample": "generate",
    "summary": "params",
    "test": "eval",
    "valid": "eval",
    "version": "--version",
}
_TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "1", "0")


class _Option(NamedTuple):
    kind: Any  # the type, without None
    positional: bool
    required: bool


def explain(arguments: Sequence[str], commands: Mapping[str, type]) -> str | None:
    """Return what is wrong with the arguments, or None if that is not known.

    Args:
        arguments: the command line; the first argument should be the name of a command.
        commands: the dataclass of each command by name.
    """
    name, *rest = arguments
    if name.startswith("-"):
        return _misplaced_option(name, commands)
    if name not in commands:
        return _unknown_command(name, commands)
    options = _options(commands[name])
    groups = list(_groups(rest))
    faults, positionals = [], []
    for flag, values in groups:
        option = options.get(_plain(flag))
        if not flag:
            positionals += values
        elif option is None or option.positional or not re.match("--[^A-Z]+$", flag):
            faults.append(_unknown_option(flag, name, commands))
        elif option.kind is bool and "".join(values[:1]).lower() in _TRUTH_VALUES:
            switch = _plain(flag).removeprefix("no-")
            faults.append(f"{flag} takes no value: give --{switch} or --no-{switch}")
        elif option.kind is bool:
            positionals += values
        elif not values:
            faults.append(f"{flag} needs a value")
        elif get_origin(option.kind) is not tuple:
            faults.append(_wrong_value(flag, values[0], option.kind))
            positionals += values[1:]
    faults = [fault for fault in faults if fault] or [_wrong_positional(positionals, options)]
    if not any(faults):
        given = {_plain(flag) for flag, _ in groups}
        faults = [_missing(name, option) for name, option in options.items() if name not in given]
    return "; ".join(filter(None, faults)) or None


def _options(command: type) -> dict[str, _Option]:
    """Return the options of a command and of its settings by name, with hyphens."""
    defaults = {field.name: field.default for field in dataclasses.fields(command)}
    options: dict[str, _Option] = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            options |= _options(cast(type, kind))
        elif tyro.conf.Suppress not in marks:
            options[_plain(name)] = _Option(
                kind, tyro.conf.Positional in marks, defaults[name] is dataclasses.MISSING
            )
            if kind is bool:
                options[_plain(f"no-{name}")] = options[_plain(name)]
    return options


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option and the values after it, beginning with "" and what precedes them all."""
    flag, values = "", list[str]()
    for i, argument in enumerate(arguments):
        if argument == "--":
            values += arguments[i + 1 :]
            break
        if re.match(r"--?[a-zA-Z]", argument):
            yield flag, values
            flag, equals, value = argument.partition("=")
            values = [value] * bool(equals)
        else:
            values.append(argument)
    yield flag, values


def _misplaced_option(argument: str, commands: Mapping[str, type]) -> str:
    flag = argument.partition("=")[0]
    for name, command in commands.items():
        if meant := _equivalent(flag, _options(command)):
            return f"{flag} without a command: did you mean flaxgpt {name} --{meant[0]}?"
    owners = {
        option: name for name in reversed(list(commands)) for option in _options(commands[name])
    }
    owners |= {"help": "", "version": ""}
    for close in close_names(_plain(flag), owners, cutoff=0.6)[:1]:
        meant_command = f"flaxgpt {owners[close]} --{close}".replace("  ", " ")
        return f"unknown option {argument}: did you mean {meant_command}?"
    return f"unknown option {argument}: give a command first, one of {', '.join(commands)}"


def _unknown_command(name: str, commands: Mapping[str, type]) -> str:
    if other := _OTHER_COMMANDS.get(name.lower()):
        return f"unknown command {name!r}: did you mean {other!r}?"
    if " " in name:
        return f'unknown command {name!r}: to continue a text, flaxgpt generate "TEXT"'
    return str(unknown_name("command", name, commands))


def _unknown_option(flag: str, name: str, commands: Mapping[str, type]) -> str:
    fault, options = f"unknown option {flag} of flaxgpt {name}", _options(commands[name])
    meant = _equivalent(flag, options)
    if not meant:
        for other, command in commands.items():
            if meant := _equivalent(flag, _options(command)):
                return f"{fault}: did you mean --{meant[0]} of flaxgpt {other}?"
        meant = close_names(_plain(flag), [*options, "help"], cutoff=0.6)
    if _plain(flag) == "version":
        return f"{fault}: did you mean flaxgpt --version?"
    if not meant:
        return fault
    if meant[0] in options and options[meant[0]].positional:
        return f"{fault}: the {meant[0]} has no option, as in flaxgpt {name} {meant[0].upper()}"
    return f"{fault}: did you mean {' or '.join(f'--{other}' for other in meant)}?"


def _equivalent(flag: str, options: Mapping[str, _Option]) -> list[str]:
    """Return the option that has this name, here or in other software, or an empty list."""
    name = _plain(flag)
    return [known for known in (name, *_OTHER_NAMES.get(name, ())) if known in options][:1]


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def _wrong_value(flag: str, value: str, kind: Any) -> str:
    """Return what is wrong with a value, or "" for what is right."""
    if get_origin(kind) is Literal and value not in get_args(kind):
        return str(unknown_name(flag, value, get_args(kind)))
    if kind not in (int, float) or value == "None":
        return ""
    try:
        kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        return f"{flag} {value!r} must be {expected}"
    return ""


def _wrong_positional(values: Sequence[str], options: Mapping[str, _Option]) -> str:
    names = [name for name, option in options.items() if option.positional]
    for name, value in zip(names, values, strict=False):
        if fault := _wrong_value(name, value, options[name].kind):
            return fault
    if len(values) > len(names):
        extra = values[len(names)]
        return f"unexpected argument {extra!r}: put a text that has spaces in quotation marks"
    return ""


def _missing(name: str, option: _Option) -> str:
    if not option.required:
        return ""
    choices = get_args(option.kind) if get_origin(option.kind) is Literal else ()
    advice = f": give one of {', '.join(choices)}" if choices else ""
    return f"{name if option.positional else f'--{name}'} is missing{advice}"
