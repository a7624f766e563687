"""Checkpoints of a run, from which it goes on bit for bit, killed at whatever moment.

    RUN/checkpoints/300/arrays/         the state of the run, as orbax writes it
                        run.json        what is not an array, and what the arrays are
                        checksums.json  CRC-32 of each of these files

Orbax writes the arrays, but does not settle whether they are a checkpoint: version 0.12 reads a
flipped byte as just another number, and leaves small files for the system to write when it likes.
So here a folder gets its name, in one step, when all of it is on disk, and is read only if it is
still what was written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flaxgpt._checks import check_size, listed
from flaxgpt._files import replacing_folder

_ARRAYS, _RUN, _CHECKSUMS = "arrays", "run.json", "checksums.json"


class Restored(NamedTuple):
    """What `Checkpoints.save` was given."""

    step: int
    state: Any
    data: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, which one process at a time may have open.

    A background thread writes while training goes on. Use as a context manager, or call `close`:
    what is not written when Python exits is lost.

    Args:
        folder: RUN/checkpoints; made if need be. What a killed run left half written in it is
            removed, with a warning.
        keep: how many of the latest are kept. The one with the lowest validation loss is kept too.

    Raises:
        ValueError: `keep` is not 1 or more.
        OSError: the folder cannot be made, read or tidied.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder.resolve(), check_size("keep", keep)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(".[0-9]*.tmp")):  # as `replacing_folder` names it
            warnings.warn(f"removing {path}, which a killed run left half written", stacklevel=2)
            shutil.rmtree(path)
        for path in self._folder.glob(".[0-9]*.deleted"):  # as `_remove` names it
            shutil.rmtree(path)
        self._losses = {int(path.name): _validation_loss(path) for path in _folders(self._folder)}
        # Compression would save 8 % of space and double the work.
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: futures.Future[None] | None = None

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        config: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint, once the one before is written.

        Returns when the arrays are in the host's memory: `state` may then be donated, and `data`
        and `config` change.

        Args:
            step: updates so far, more than at any checkpoint there is.
            state: a pytree of JAX arrays, random keys among them.
            data: where the data stands, as JSON can hold it.
            config: what is trained and how, as JSON can hold it.
            validation_loss: if None or not finite, this checkpoint is never the best.

        Raises:
            ValueError: `step` is not above that of the newest checkpoint.
            OSError: the checkpoint before could not be written.
        """
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"step {step} does not come after step {newest}, of which {self._folder} has a "
                "checkpoint: restore that one first, or choose another folder"
            )
        loss = None
        if validation_loss is not None and math.isfinite(validation_loss):
            loss = float(validation_loss)
        keys = {name: leaf for name, leaf in _named(state).items() if _is_key(leaf)}
        run = {
            "validation_loss": loss,
            "data": data,
            "config": config,
            "arrays": _kinds(state),
            "keys": {name: str(jax.random.key_impl(key)) for name, key in keys.items()},
        }
        bare = jax.tree.map(
            lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state
        )
        # On CPU these are views, and need not be copies: what NumPy looks at XLA does not reuse,
        # even where it is donated.
        arrays = jax.device_get(bare)
        self._writing = self._thread.submit(self._write, step, arrays, json.dumps(run), loss)

    def restore(self, template: Any) -> Restored:
        """Reads the newest checkpoint that is as it was written, and warns of those that are not.

        The next save removes the damaged ones.

        Args:
            template: a pytree like the state, of arrays or jax.ShapeDtypeStructs. Arrays go where
                its arrays are, or as its shardings say, or to the default device.

        Returns:
            What was saved, bit for bit.

        Raises:
            FileNotFoundError: there is no checkpoint, or only damaged ones.
            ValueError: what was saved is not like the template.
            OSError: the checkpoint before could not be written, or a file cannot be read.
        """
        newest = self.latest_step()
        for step in sorted(self._losses, reverse=True):
            folder = self._folder / str(step)
            try:
                _check_files(folder)
            except _DamagedError as damage:
                warnings.warn(f"checkpoint {folder} is damaged, not used: {damage}", stacklevel=2)
                del self._losses[step]
                continue
            run = json.loads((folder / _RUN).read_bytes())
            _check_template(folder, run["arrays"], _kinds(template))
            state = self._read_arrays(folder / _ARRAYS, template, run["keys"])
            return Restored(step, state, run["data"], run["config"])
        raise FileNotFoundError(
            f"{self._folder} has no checkpoint to go on from"
            + ("" if newest is None else ": all are damaged")
            + "; train anew, in another folder"
        )

    def latest_step(self) -> int | None:
        """Waits, and returns the step of the newest checkpoint, None if there is none.

        Raises:
            OSError: as `wait`.
        """
        self.wait()
        return max(self._losses, default=None)

    def best(self) -> tuple[int, float] | None:
        """Waits, and returns step and validation loss of the best checkpoint, None if none has any.

        Raises:
            OSError: as `wait`.
        """
        self.wait()
        return _best(self._losses)

    def wait(self) -> None:
        """Waits until what was given to `save` is on disk.

        Raises:
            OSError: it could not be written. Raised once, here or by the method called next.
        """
        if self._writing is not None:
            futures.wait([self._writing])  # interrupted here, there is still something to wait for
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits, and ends the thread.

        Raises:
            OSError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, step: int, arrays: Any, run: str, loss: float | None) -> None:
        target = self._folder / str(step)
        try:
            _check_space(self._folder, sum(array.nbytes for array in jax.tree.leaves(arrays)))
            if target.exists():  # damaged: `save` refuses the step of any other
                _remove(target)
            with replacing_folder(target, replaceable=()) as folder:
                self._orbax.save(folder / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
                (folder / _RUN).write_text(run)
                (folder / _CHECKSUMS).write_text(json.dumps(_sync_and_sum(folder)))
        except Exception as error:
            raise OSError(
                f"checkpoint of step {step} could not be written to {target}: "
                f"{error.__cause__ or error}; free some space, or mend what this says, and resume: "
                "earlier checkpoints are intact"
            ) from error
        self._losses[step] = loss
        kept = sorted(self._losses)[-self._keep :]
        if best := _best(self._losses):
            kept.append(best[0])
        self._losses = {step: self._losses[step] for step in kept}
        for folder in _folders(self._folder):
            if int(folder.name) not in kept:
                _remove(folder)

    def _read_arrays(self, folder: Path, template: Any, key_impls: Mapping[str, str]) -> Any:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
        arrays = self._orbax.restore(
            folder, args=ocp.args.PyTreeRestore(template, restore_args=as_numpy)
        )

        def placed(path: Any, array: np.ndarray, like: Any) -> jax.Array:
            leaf: Any = array
            if impl := key_impls.get(_name(path)):
                leaf = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
            # What jit may use on any device must stay so: it compiles anew for what it may not.
            return jax.device_put(leaf, like.sharding if getattr(like, "committed", True) else None)

        return jax.tree_util.tree_map_with_path(placed, arrays, template)


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.isdecimal()]


def _best(losses: Mapping[int, float | None]) -> tuple[int, float] | None:
    """Returns the step of the lowest loss, the first of equals, and that loss."""
    found = [(loss, step) for step, loss in losses.items() if loss is not None]
    if not found:
        return None
    loss, step = min(found)
    return step, loss


def _remove(folder: Path) -> None:
    # Not under its own name: what a kill leaves half removed must not pass for a checkpoint.
    removed = folder.with_name(f".{folder.name}.deleted")
    folder.rename(removed)
    shutil.rmtree(removed)


def _validation_loss(folder: Path) -> float | None:
    try:
        _check_files(folder, _RUN)
    except _DamagedError:  # of which `restore` warns, if it comes to that
        return None
    return json.loads((folder / _RUN).read_bytes())["validation_loss"]


def _check_files(folder: Path, *only: str) -> None:
    """Raises _DamagedError unless the files, all or `only` some, are as they were written."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_bytes())
        for name in only or sums:
            with (folder / name).open("rb") as file:
                if _crc32(file) != sums[name]:
                    raise _DamagedError(f"{name} is not what was written")
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError) as error:
        raise _DamagedError(str(error)) from error


def _sync_and_sum(folder: Path) -> dict[str, int]:
    """Sees to it that all files are on disk, and returns their checksums."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sums[path.relative_to(folder).as_posix()] = _crc32(file)
    return sums


def _crc32(file: BinaryIO) -> int:
    checksum = 0
    while block := file.read(2**20):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _check_space(folder: Path, needed: int) -> None:
    # Asked before, as orbax prints pages of traceback when it comes to the end of the disk. Its
    # own files, and what of the last block of each file is empty, take some space too.
    needed += needed // 20 + 1_000_000
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _kinds(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_template(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    faults = [
        f"{name} is {saved.get(name, 'not there')} instead of {wanted.get(name, 'left out')}"
        for name in {**wanted, **saved}
        if saved.get(name) != wanted.get(name)
    ]
    if faults:
        raise ValueError(
            f"checkpoint {folder} is of another model or optimiser: {listed(faults, '; ')}; resume "
            "with the configuration it was saved with"
        )
