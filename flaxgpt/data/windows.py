"""Windows of ids: shuffled into batches without end for training, in order for evaluation.

A window is T + 1 ids, T the context length: its first T are inputs, its last T their targets.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from flaxgpt._checks import check_size


class BatchIterator(Protocol):
    """What `batches` returns: a `grain.DatasetIterator`, whose state belongs in checkpoints."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __next__(self) -> np.ndarray: ...

    def get_state(self) -> dict[str, Any]:
        """Returns where the iterator stands, as an object that JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where an iterator of the same arguments stood, in this process or another."""
        ...

    def close(self) -> None:
        """Ends the thread that prefetches, if there is one."""
        ...


def count_windows(n_ids: int, length: int) -> int:
    """How many windows some ids hold side by side, each beginning with the last id of the former.

    Args:
        n_ids: how many ids there are.
        length: T, the context length.

    Raises:
        ValueError: the ids do not fill one window.

    Example:
        >>> count_windows(129, 64)
        2
    """
    length = check_size("length", length)
    if n_ids <= length:
        raise ValueError(
            f"{n_ids} ids do not fill one window: a context of {length} takes {length + 1} (the "
            "last is only a target); give more text, or choose a shorter context"
        )
    return (n_ids - 1) // length


def batches(
    ids: np.ndarray,
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    shift: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 0,
) -> BatchIterator:
    """Returns batches without end, in which each epoch meets every window once.

    Window i of an epoch begins at id i * length plus an offset below `length` that the epoch draws,
    so that epochs cut the text in different places; the last window moves back where it would pass
    the end. A batch that ends an epoch is filled up from the next. All of it depends on the
    arguments and the batch's number alone, so the iterator's state is that number.

    Args:
        ids: integer [n], such as `IdsFile.ids`. Only the windows in use are read.
        length: T, the context length.
        batch_size: B, windows a batch, in all processes together.
        seed: 0 or more; with the epoch's number it decides order and offset.
        shuffle: whether each epoch has an order of its own; else the text's.
        shift: whether each epoch draws an offset; else it is 0, as in the book's data loader with a
            stride of the context length.
        process_index: which process this is, 0 to process_count - 1. It gets consecutive rows:
            joined in the order of the processes they are the batch of a single process.
        process_count: how many processes share the work.
        prefetch: batches that a thread makes ahead, for ids on a slow disk. With 0 there is no
            thread, which costs less where the ids are in memory or the page cache.

    Returns:
        An iterator of int32 [batch_size // process_count, length + 1].

    Raises:
        ValueError: fewer ids than one window takes, fewer windows than rows of a batch, rows that
            do not divide among the processes, or an argument out of its range.
        ModuleNotFoundError: grain is not installed.
    """
    ids = _flat(ids)
    windows = count_windows(len(ids), length)
    batch_size = check_size("batch_size", batch_size)
    process_count = check_size("process_count", process_count)
    if batch_size > windows:
        raise ValueError(
            f"batch_size={batch_size} exceeds the data: {len(ids)} ids are {windows} windows of "
            f"{length + 1}; choose a smaller batch or context, or give more text"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {process_count} processes, "
            f"such as {-(-batch_size // process_count) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be 0 to {process_count - 1}")
    seed, prefetch = _not_negative("seed", seed), _not_negative("prefetch", prefetch)
    grain = _grain()
    rows = batch_size // process_count
    every_window = np.lib.stride_tricks.sliding_window_view(ids, length + 1)

    @functools.lru_cache(maxsize=2)  # a batch lies in one epoch or two
    def window_starts(epoch: int) -> np.ndarray:
        # RandomState, for NumPy promises that its numbers never change (NEP 19): a run goes on as
        # it began even after an upgrade.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
        offset = random.randint(length) if shift else 0
        order = random.permutation(windows) if shuffle else np.arange(windows)
        return np.minimum(order * length + offset, len(every_window) - 1)

    def batch(number: int) -> np.ndarray:
        epoch, place = divmod(number * batch_size + process_index * rows, windows)
        starts = window_starts(epoch)[place : place + rows]
        if missing := rows - len(starts):
            starts = np.concatenate([starts, window_starts(epoch + 1)[:missing]])
        return every_window[starts].astype(np.int32)

    numbers = grain.MapDataset.range(sys.maxsize)
    reading = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(numbers.map(batch).to_iter_dataset(reading))


def evaluation_windows(ids: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Returns windows side by side from the first id on, the same each time.

    Args:
        ids: integer [n].
        length: T, the context length.
        limit: the most windows to return, spread evenly over the ids; None is all there are.

    Returns:
        int32 [windows, length + 1]. What does not fill a window at the end is left out.

    Raises:
        ValueError: fewer ids than one window takes, or an argument out of its range.
    """
    ids = _flat(ids)
    windows = count_windows(len(ids), length)
    chosen = windows if limit is None else min(windows, check_size("limit", limit))
    starts = np.arange(chosen) * windows // chosen * length
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[starts].astype(np.int32)


def _flat(ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)  # of a memmap the same memory, without the cost of its subclass
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids of shape {ids.shape} and dtype {ids.dtype} must be a flat array of integers"
        )
    return ids


def _not_negative(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name}={value!r} must be a whole number, 0 or more")
    return number


def _grain() -> ModuleType:
    try:
        import grain
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "batches needs grain: pip install 'flaxgpt[train]'", name="grain"
        ) from error
    return grain
