"""Checks of arguments, made on the host before any computation, and the errors they raise."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flaxgpt._quantized import dtype_faults, take_scales


def check_size(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int, or raise ValueError unless it is whole and at least `least`."""
    try:
        size = operator.index(value)
    except TypeError:
        size = least - 1
    if size < least or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    return size


def check_positive(name: str, value: Any) -> float:
    """Return `value` as a float, or raise ValueError unless it is positive and finite."""
    if not 0.0 < _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive number")
    return float(value)


def check_finite(name: str, value: Any) -> float:
    """Return `value` as a float, or raise ValueError unless it is a finite number."""
    if not float("-inf") < _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return float(value)


def check_nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float of 0 or more, or raise ValueError."""
    if not 0.0 <= _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a finite number, 0 or more")
    return float(value)


def check_rate(name: str, value: Any) -> float:
    """Return `value` as a float, or raise ValueError unless it is a probability below 1."""
    if not _number(value) >= 0.0 or not below_one(value):
        raise ValueError(
            f"{name}={value!r} must be a probability, at least 0 and below 1 in float32 (a rate of "
            "1 would erase everything); 0.0 turns dropout off"
        )
    return float(value)


def check_float32(name: str, value: Any) -> float:
    """Return `value` as a float, or raise ValueError unless float32 can hold it, or it is 0.

    Devices read numbers below float32's smallest normal number as 0.
    """
    number, info = check_nonnegative(name, value), np.finfo(np.float32)
    least, most = float(info.tiny), float(info.max)
    if number and not least <= number <= most:
        raise ValueError(
            f"{name}={value!r} is outside the range of float32: give 0, or a number from "
            f"{least:.3g} to {most:.3g}"
        )
    return number


def below_one(value: Any) -> bool:
    """Whether a number is below 1 in float64 and, rounded, in float32."""
    number = _number(value)
    return number < 1.0 and float(np.float32(number)) < 1.0


def check_keys(kind: str, values: Iterable[str], cls: Any) -> None:
    """Raise ValueError unless every key is a field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown {kind} {unknown}: expected some of {known}")


def check_context(context_length: int, length: Any) -> int:
    """Return `length` as an int, or raise ValueError unless a sequence can be that long."""
    length = check_size("length", length)
    if length > context_length:
        raise ValueError(
            f"length={length} exceeds context_length={context_length}, the longest sequence the "
            "model supports"
        )
    return length


def check_dtype(dtype: DTypeLike) -> Any:
    """Return the NumPy dtype to compute in, or raise ValueError unless it is a supported float."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
    return resolved


def check_ids(vocab_size: int, ids: Any) -> Any:
    """Return ids as an array [B, T], or raise ValueError; traced values cannot be checked."""
    ids = _integers(ids)
    if ids.ndim != 2:
        raise ValueError(
            f"ids of shape {ids.shape} must be [batch, length]; for a single row, pass ids[None]"
        )
    if 0 in ids.shape:
        raise ValueError(f"ids of shape {ids.shape} are empty: pass at least one row of one id")
    if not isinstance(ids, jax.core.Tracer):
        check_vocabulary(vocab_size, np.asarray(ids))
    return ids


def check_vocabulary(vocab_size: int, ids: np.ndarray, row: int | None = None) -> None:
    """Raise ValueError with the first id that is outside the vocabulary and its position."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        place = np.argwhere(outside)[0].tolist()
        where = ", ".join(map(str, place if row is None else [row, *place]))
        raise ValueError(
            f"id {int(ids[tuple(place)])} at [{where}] is outside the vocabulary: expected 0 to "
            f"{vocab_size - 1}; was the text encoded with this model's tokenizer?"
        )


def _integers(ids: Any) -> Any:
    try:
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    except ValueError as error:
        raise ValueError(
            "ids must be an int array [batch, length] with all rows equally long"
        ) from error
    if 0 in ids.shape:
        return ids.astype(np.int32)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids of dtype {ids.dtype} must be integers")
    return ids


def check_params(expected: Any, params: Any) -> None:
    """Raise ValueError unless `params` has exactly the names and shapes of `expected`.

    An int8 weight and its scales, as `flaxgpt.quantize` returns them, count as one array.
    """
    if not isinstance(params, dict):
        raise ValueError(f"params must be a nested dict of arrays, got {type(params).__name__}")
    if params.keys() == {"params"}:
        raise ValueError('params are a linen variables dict: pass variables["params"]')
    leaves = dict(jax.tree.leaves_with_path(params))
    scales = take_scales(leaves)
    found = {path: getattr(leaf, "shape", None) for path, leaf in leaves.items()}
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(expected)}
    of_dtypes = dtype_faults(leaves, scales)
    if shapes == found and not of_dtypes:
        return
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    faults = [f"missing {name(path)}" for path in shapes if path not in found]
    faults += [f"unexpected {name(path)}" for path in found if path not in shapes]
    faults += [
        f"{name(path)} has shape {found[path]} instead of {shape}"
        for path, shape in shapes.items()
        if path in found and found[path] != shape
    ]
    faults += of_dtypes
    raise ValueError(f"params do not fit the configuration: {listed(faults, '; ')}")


def check_prompts(vocab_size: int, prompts: Any) -> list[np.ndarray]:
    """Return prompts as B arrays of int32 ids, or raise ValueError for the first invalid one."""
    if isinstance(prompts, jax.core.Tracer):
        raise ValueError("prompts must be concrete: generate runs on the host, not inside jit")
    not_rows = "prompts must be rows of ids, got {!r}: for one prompt, pass [prompt]"
    if not isinstance(prompts, Iterable):
        raise ValueError(not_rows.format(prompts))
    # An iterator can be read only once, and iterating over a device array would compile and fetch
    # each row separately.
    prompts = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or any(isinstance(row, str) for row in prompts):
        raise ValueError("prompts are ids, not text: use generate_text, or encode them first")
    rows = []
    for i, given in enumerate(prompts):
        row = np.asarray(_integers(given))
        if row.ndim == 0:
            raise ValueError(not_rows.format(given))
        if row.ndim != 1:
            raise ValueError(f"prompt {i} of shape {row.shape} must be a flat list of ids")
        if row.size == 0:
            raise ValueError(
                f"prompt {i} is empty: pass at least one id to continue from, such as the "
                "tokenizer's end-of-text id"
            )
        check_vocabulary(vocab_size, row, row=i)
        rows.append(row.astype(np.int32))
    if not rows:
        raise ValueError("no prompts: pass at least one row of ids")
    return rows


def check_stop_ids(stop_ids: Any, vocab_size: int | None = None) -> tuple[int, ...]:
    """Return distinct stop ids, or raise ValueError with one that is outside the vocabulary."""
    if isinstance(stop_ids, str) or not isinstance(stop_ids, Iterable):
        raise ValueError(f"stop_ids={stop_ids!r} must be a list of ids, such as (50256,)")
    ids = []
    for token in stop_ids:
        try:
            ids.append(-1 if isinstance(token, bool) else operator.index(token))
        except TypeError:
            ids.append(-1)
        if not 0 <= ids[-1] < (vocab_size or 2**31):
            allowed = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
            raise ValueError(f"stop id {token!r} must be an id, {allowed}")
    return tuple(dict.fromkeys(ids))


def check_allowed(allowed: Any, vocab_size: int | None = None) -> np.ndarray:
    """Return a mask of ids as a bool array [V], or raise ValueError."""
    mask = np.asarray(allowed)
    size = mask.size if vocab_size is None else vocab_size
    if mask.dtype != bool or mask.shape != (size,):
        raise ValueError(
            f"allowed of shape {mask.shape} and dtype {mask.dtype} must be bool "
            f"[{vocab_size or 'vocab_size'}], True for each id that may be chosen"
        )
    if not mask.any():
        raise ValueError("allowed is False for every id: allow at least one")
    return mask


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int | None = None
) -> None:
    """Raise ValueError for an invalid sampling option; None means that it is not set or known."""
    if not 0.0 <= _number(temperature) < float("inf"):
        raise ValueError(
            f"temperature={temperature!r} must be 0 (greedy decoding) or a positive number"
        )
    if top_k is not None and (top_k := check_size("top_k", top_k)) > (vocab_size or top_k):
        raise ValueError(
            f"top_k={top_k} exceeds vocab_size={vocab_size}: omit it to sample from all ids"
        )
    if top_p is not None and not (np.float32(_number(top_p)) > 0.0 and _number(top_p) <= 1.0):
        raise ValueError(
            f"top_p={top_p!r} must be above 0 and at most 1; omit it to sample from all ids"
        )


def unknown_name(kind: str, name: Any, known: Iterable[str], advice: str = "") -> ValueError:
    """Return the error for an unknown name: the closest names, and `advice` or all known names."""
    names = list(known)
    close = close_names(str(name), names)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}{advice or f'expected {listed(names)}'}")


def close_names(name: str, known: Iterable[str], cutoff: float = 0.4) -> list[str]:
    """Return up to three known names similar to `name`, without those much worse than the best."""
    name = name.lower()
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    scores = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
    return [other for other, score in zip(close, scores, strict=True) if score > scores[0] - 0.2]


def require_extra(module: str, purpose: str, extra: str) -> Any:
    """Import a module of an optional dependency, or raise ImportError with the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} requires {module.partition('.')[0]} ({error}): "
            f"pip install 'flaxgpt[{extra}]'"
        ) from error


@contextlib.contextmanager
def value_errors(prefix: Path | str, advice: str = "") -> Iterator[None]:
    """Raise ValueError for any error in the block except those of the system."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        # A Rust panic, which some libraries raise for invalid input, is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{prefix}: {error}{advice}") from error


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first eight items, and say how many more there are."""
    rest = len(items) - 8
    return separator.join(items[:8]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _number(value: Any) -> float:
    try:
        return float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):  # such as 10**400
        return float("nan")
