"""Checks of what users pass in, made on the host before anything is computed."""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def check_size(name: str, value: Any, least: int = 1) -> int:
    """Returns `value` as an int of `least` or more, or raises ValueError."""
    try:
        size = operator.index(value)
    except TypeError:
        size = least - 1
    if size < least or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    return size


def check_positive(name: str, value: Any) -> float:
    """Returns `value` as a float above 0 and finite, or raises ValueError."""
    if not 0.0 < _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive number")
    return float(value)


def check_nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float of 0 or more, or raise ValueError."""
    if not 0.0 <= _number(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a finite number, 0 or more")
    return float(value)


def check_keys(kind: str, values: Iterable[str], cls: Any) -> None:
    """Raise ValueError unless every key is a field of the dataclass `cls`.

    Args:
        kind: what the keys are, such as "config keys".
        values: the keys, or a dict that has them.
        cls: the dataclass.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown {kind} {unknown}: expected some of {known}")


def check_extent(context_length: int, batch: Any, length: Any) -> tuple[int, int]:
    """Returns batch and length as ints, or raises ValueError unless a model can have them."""
    batch, length = check_size("batch", batch), check_size("length", length)
    if length > context_length:
        raise ValueError(
            f"length={length} exceeds context_length={context_length}, for which alone the model "
            "has positions"
        )
    return batch, length


def check_dtype(dtype: DTypeLike) -> Any:
    """Returns the NumPy dtype of a floating-point type to compute in, or raises ValueError."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
    return resolved


def check_ids(vocab_size: int, ids: ArrayLike) -> Any:
    """Returns ids as an array [B, T]; where their values are known, every one is looked at."""
    ids = ids if isinstance(ids, jax.Array) else _integers(ids)
    if ids.ndim != 2:
        raise ValueError(f"ids of shape {ids.shape} must be [batch, length]; one row is ids[None]")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids of dtype {ids.dtype} must be integers")
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"ids of shape {ids.shape} are empty: give at least one row of one id")
    if not isinstance(ids, jax.core.Tracer):
        check_vocabulary(vocab_size, np.asarray(ids))
    return ids


def check_vocabulary(vocab_size: int, ids: np.ndarray, row: int | None = None) -> None:
    """Raises ValueError with the first id that lies outside the vocabulary, and its place."""
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
        array = np.asarray(ids)
    except ValueError as error:
        raise ValueError(
            "ids must be an int array [batch, length], all rows equally long"
        ) from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids of dtype {array.dtype} must be integers")
    return array.astype(np.int32) if not array.size else array


def check_params(expected: Any, params: Any) -> None:
    """Raises ValueError unless `params` has exactly the names and shapes of `expected`."""
    if not isinstance(params, dict):
        raise ValueError(f"params must be a nested dict of arrays, got {type(params).__name__}")
    if params.keys() == {"params"}:
        raise ValueError('params are inside a linen variables dict: pass variables["params"]')
    wanted = jax.tree_util.tree_flatten_with_path(expected)[0]
    given, _ = jax.tree_util.tree_flatten_with_path(params)
    if [(path, leaf.shape) for path, leaf in wanted] == [
        (path, getattr(leaf, "shape", None)) for path, leaf in given
    ]:
        return
    shapes = {_path(path): leaf.shape for path, leaf in wanted}
    found = {_path(path): getattr(leaf, "shape", None) for path, leaf in given}
    faults = [f"missing {name}" for name in shapes if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in shapes]
    faults += [
        f"{name} has shape {found[name]} instead of {shapes[name]}"
        for name in shapes
        if name in found and found[name] != shapes[name]
    ]
    raise ValueError(f"params do not fit the configuration: {listed(faults, '; ')}")


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def check_prompts(vocab_size: int, prompts: Any) -> list[np.ndarray]:
    """Returns prompts as B arrays of int32 ids, or raises ValueError saying which one is bad."""
    if isinstance(prompts, jax.core.Tracer):
        raise ValueError("prompts must be concrete: generate runs on the host, not inside jit")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be rows of ids, got {prompts!r}: for one prompt, [prompt]")
    # Once through: an iterator has no second time, and rows of a device array would be fetched and
    # compiled for one by one.
    prompts = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or any(isinstance(row, str) for row in prompts):
        raise ValueError("prompts are ids, not text: use generate_text, or encode them first")
    rows = []
    for i, given in enumerate(prompts):
        row = _integers(given)
        if row.ndim == 0:
            raise ValueError(
                f"prompts must be rows of ids, got {given!r}: for one prompt, [prompt]"
            )
        if row.ndim != 1:
            raise ValueError(f"prompt {i} of shape {row.shape} must be a flat list of ids")
        if row.size == 0:
            raise ValueError(
                f"prompt {i} is empty: there must be an id to continue from, such as the "
                "tokenizer's end-of-text id"
            )
        check_vocabulary(vocab_size, row, row=i)
        rows.append(row.astype(np.int32))
    if not rows:
        raise ValueError("no prompts: give at least one row of ids")
    return rows


def check_stop_ids(stop_ids: Any, vocab_size: int | None = None) -> list[int]:
    """Return stop ids as ints, or raise ValueError for one that no row could ever contain."""
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
    return ids


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int | None = None
) -> None:
    """Raises ValueError unless ids can be drawn so; None is "not given" or, of V, unknown."""
    if not 0.0 <= _number(temperature) < float("inf"):
        raise ValueError(
            f"temperature={temperature!r} must be 0 (the likeliest id) or a positive number"
        )
    if top_k is not None and (top_k := check_size("top_k", top_k)) > (vocab_size or top_k):
        raise ValueError(
            f"top_k={top_k} exceeds vocab_size={vocab_size}: leave it out to draw from all ids"
        )
    if top_p is not None and not 0.0 < np.float32(_number(top_p)) <= 1.0:
        raise ValueError(
            f"top_p={top_p!r} must be above 0 and at most 1; leave it out to draw from all ids"
        )


def unknown_name(kind: str, name: Any, known: Iterable[str], advice: str = "") -> ValueError:
    """Return the error for a name that does not exist, with the closest ones that do.

    Args:
        kind: what the name should stand for, such as "preset".
        name: the name given.
        known: the names that exist.
        advice: what to add at the end; the list of known names unless given.
    """
    names = list(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}{advice or f'expected {listed(names)}'}")


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Returns the first eight of some words, and how many more there are."""
    rest = len(items) - 8
    return separator.join(items[:8]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _number(value: Any) -> float:
    try:
        return float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        return float("nan")
