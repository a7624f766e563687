"""Windows of T + 1 ids, where T is the context length: T inputs and, shifted by one, T targets."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from flaxgpt._checks import check_size, require_extra


class BatchIterator(Iterator[np.ndarray], Protocol):
    """The type that `batches` returns, a `grain.DatasetIterator`; checkpoints store its state."""

    def get_state(self) -> dict[str, Any]:
        """Return the position of the iterator as a JSON object."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position of an iterator that was created with the same arguments."""

    def close(self) -> None:
        """Stop the prefetching thread, if there is one."""


def count_windows(n_ids: int, length: int) -> int:
    """Return how many windows fit side by side, each starting at the last id of the one before.

    Args:
        n_ids: number of ids.
        length: T, the context length.

    Raises:
        ValueError: there are fewer ids than one window needs.

    Example:
        >>> count_windows(129, 64)
        2
    """
    length = check_size("length", length)
    if n_ids <= length:
        raise ValueError(
            f"{n_ids} ids do not fill one window; a context of {length} needs {length + 1} (the "
            "last is only a target): provide more text, or choose a shorter context"
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
    """Return an endless iterator over batches that visits every window once per epoch.

    Window i of an epoch starts at id `i * length` plus a random offset below `length`; the last is
    moved back if it would exceed the ids. The last batch of an epoch is completed with windows of
    the next. A batch depends only on the arguments and its number, the state of the iterator.

    Args:
        ids: integer [n], such as `TokenFile.ids`. Only the windows in use are read.
        length: T, the context length.
        batch_size: B, windows per batch, across all processes.
        seed: 0 or more; together with the epoch it determines order and offset.
        shuffle: whether to shuffle the windows of each epoch.
        shift: whether to draw an offset for each epoch. Otherwise it is 0, as in the book.
        process_index: index of this process. Each gets consecutive rows of the whole batch.
        process_count: number of processes.
        prefetch: number of batches that a thread prepares ahead, for ids on a slow disk; 0 for no
            thread, which is faster if the ids are in memory or in the page cache.

    Returns:
        An iterator over int32 [batch_size // process_count, length + 1].

    Raises:
        ValueError: there are fewer ids than one window needs or fewer windows than `batch_size`,
            `batch_size` is not divisible by `process_count`, or an argument is out of range.
        ImportError: grain is not installed.
    """
    every_window, windows = _all_windows(ids, length)
    batch_size = check_size("batch_size", batch_size)
    process_count = check_size("process_count", process_count)
    if batch_size > windows:
        raise ValueError(
            f"batch_size={batch_size} exceeds the data: {len(ids)} ids are {windows} windows of "
            f"{length + 1}; choose a smaller batch or context, or provide more text"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of the {process_count} processes; "
            f"choose one such as {-(-batch_size // process_count) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} is out of range; expected 0 to {process_count - 1}"
        )
    seed, prefetch = check_size("seed", seed, 0), check_size("prefetch", prefetch, 0)
    grain = require_extra("grain", "drawing batches", "train")
    rows = batch_size // process_count

    @functools.lru_cache(maxsize=2)  # a batch spans one or two epochs
    def window_starts(epoch: int) -> np.ndarray:
        # NumPy guarantees that the numbers of RandomState never change (NEP 19), so a run can be
        # resumed after an upgrade.
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
    """Return windows side by side, starting at the first id.

    Args:
        ids: integer [n].
        length: T, the context length.
        limit: the maximum number of windows, spread evenly over the ids; None means all.

    Returns:
        int32 [windows, length + 1]. Ids at the end that do not fill a window are left out.

    Raises:
        ValueError: there are fewer ids than one window needs, or an argument is out of range.
    """
    every_window, windows = _all_windows(ids, length)
    chosen = windows if limit is None else min(windows, check_size("limit", limit))
    starts = np.arange(chosen) * windows // chosen * length
    return every_window[starts].astype(np.int32)


def _all_windows(ids: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Return a view of the windows from every id, and how many fit side by side."""
    ids = np.asarray(ids)  # a view of a memmap, without the overhead of the subclass
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids has shape {ids.shape} and dtype {ids.dtype}; expected a one-dimensional array of "
            "integers"
        )
    windows = count_windows(len(ids), length)
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1), windows
