"""Checkpoints that resume a run bit-for-bit, whenever it was killed.

    RUN/checkpoints/300/arrays/         the state of the run
                        run/            JSON: the position in the data, the configuration, ...
                        checksums.json  CRC-32 of every file

`orbax.checkpoint.CheckpointManager` writes in the background and removes old checkpoints. Orbax
0.12 does not sync a checkpoint to disk before naming it, restores a flipped bit as just another
number, leaves a half-written folder behind when a write fails, and misreads some paths.
`flaxgpt.runs.durable_folder` adds the sync and the checksums, `flaxgpt.runs.plain_path` a link for
such paths, and this module the clean-up.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from flaxgpt._checks import check_size, listed
from flaxgpt._files import temporary_folder
from flaxgpt.runs.checksums import CHECKSUMS, DamagedError, check_files
from flaxgpt.runs.durable_folder import DurableFolder
from flaxgpt.runs.plain_path import PlainPath
from flaxgpt.runs.processes import from_first, in_step, is_first
from flaxgpt.runs.quiet import QuietLibraries
from flaxgpt.sharding import make_mesh, place

Json = dict[str, Any]


class Restored(NamedTuple):
    """The arguments of the `Checkpoints.save` call that wrote a checkpoint."""

    step: int
    state: Any
    data: Json
    config: Json


class Checkpoints:
    """The checkpoints of one run, open in one process at a time, inside a `with` block.

    The latest `keep` checkpoints remain, and the one with the lowest validation loss. They are
    written in the background while training continues. Every method first waits for the checkpoint
    that is being written, and raises OSError once if that failed. A checkpoint counts as written
    once its files have been read back from disk.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder.resolve(), check_size("keep", keep)
        in_step(self._prepare)
        self._plain = PlainPath(self._folder)
        self._quiet, self._failed = QuietLibraries(), False
        self._manager = self._open_manager()
        # The intact checkpoints, as far as is known.
        losses = {step: self._read_loss(step) for step in self._manager.all_steps()}
        known = json.loads(from_first(json.dumps(losses)))  # all processes choose the same one
        self._losses: dict[int, float | None] = {int(step): loss for step, loss in known.items()}
        self._damaged: list[int] = []
        self._writing: int | None = None

    def _prepare(self) -> None:
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in _unfinished(self._folder):
                message = f"removing {path}, which a killed run left half-written"
                warnings.warn(message, stacklevel=4)
                shutil.rmtree(path)

    def save(
        self, step: int, state: Any, data: Json, config: Json, validation_loss: float | None = None
    ) -> None:
        """Start writing a checkpoint, and return once the arrays are in host memory.

        The state, a pytree of JAX arrays and random keys, may then be donated, and `data` and
        `config` modified. Without a finite validation loss, the checkpoint is never the best one.
        """
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"step {step} is not after step {newest}, the newest checkpoint in {self._folder}: "
                "restore that checkpoint first, or use another folder"
            )
        loss = math.nan if validation_loss is None else float(validation_loss)
        self._losses[step] = loss if math.isfinite(loss) else None
        run = {
            "validation_loss": self._losses[step],
            "data": data,
            "config": config,
            "arrays": _describe(state),
            "keys": {name: str(jax.random.key_impl(x)) for name, x in _named(state) if _is_key(x)},
        }
        arrays = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
        items = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(arrays),
            run=ocp.args.JsonSave(json.loads(json.dumps(run))),  # a copy, as orbax writes it later
        )
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            self._plain.renew()
            in_step(lambda: _check_space(self._folder, self._size))
            while self._damaged:
                self._manager.delete(self._damaged.pop())
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._clean_up(step, error) from error
        self._writing = step

    def restore(self, template: Any) -> Restored:
        """Restore the newest intact checkpoint, with a warning for each damaged one.

        The next call of `save` removes the damaged ones. The template is a pytree of arrays or
        jax.ShapeDtypeStructs like the state, whose shardings, if any, place the arrays.
        """
        newest = self.latest_step()
        for step in sorted(self._losses, reverse=True):
            folder = self._folder / str(step)
            if damage := from_first(_damage(folder) if is_first() else ""):
                warnings.warn(f"checkpoint {folder} is damaged, not used: {damage}", stacklevel=2)
                self._damaged.append(step)
                del self._losses[step]
                continue
            run = _read_run(folder)
            saved, wanted = run["arrays"], _describe(template)
            if faults := [
                f"{name} is {saved.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
                for name in {**wanted, **saved}
                if saved.get(name) != wanted.get(name)
            ]:
                raise ValueError(
                    f"checkpoint {folder} is of another model or optimizer: "
                    f"{listed(faults, '; ')}; resume with the configuration it was saved with"
                )
            state = self._read_state(step, template, run["keys"])
            return Restored(step, state, run["data"], run["config"])
        raise FileNotFoundError(
            f"{self._folder} has no checkpoint to resume from"
            + ("" if newest is None else ": all are damaged")
            + "; start a new run in another folder"
        )

    def verify(self, state: Any) -> None:
        """Restore the newest checkpoint, and raise OSError unless it holds this state."""
        step = self.latest_step()
        assert step is not None
        try:
            for (name, read), (_, leaf) in zip(
                _named(self._read_arrays(step, state)), _named(state), strict=True
            ):
                written = jax.random.key_data(leaf) if _is_key(leaf) else leaf
                for one, other in zip(_local(read), _local(written), strict=True):
                    if (one.dtype, one.shape) != (other.dtype, other.shape) or (
                        one.tobytes() != other.tobytes()
                    ):
                        raise ValueError(f"{name} is not what was written")
        except Exception as error:
            raise OSError(
                f"the checkpoint written to {self._folder / str(step)} cannot be restored: "
                f"{_first_line(error)}; train in another folder"
            ) from error

    def read(self, step: int, template: Any) -> Any:
        """Return the state in a checkpoint; OSError if the checkpoint is damaged.

        The template is that of `restore`. Arrays of a mesh are returned on the mesh, others as
        NumPy arrays, and random keys as their data.
        """
        self.wait()
        folder = self._folder / str(step)
        if damage := from_first(_damage(folder) if is_first() else ""):
            raise OSError(f"checkpoint {folder} is damaged: {damage}")
        return self._read_arrays(step, template)

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None if there is none."""
        self.wait()
        return max(self._losses, default=None)

    def best(self) -> tuple[int, float] | None:
        """Return step and validation loss of the checkpoint with the lowest one, if any."""
        self.wait()
        return self._best()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if (step := self._writing) is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._clean_up(step, error) from error
        self._writing = None
        if step not in self._manager.all_steps():  # orbax drops it when a wait is interrupted
            self._manager.close()
            self._manager = self._open_manager()
        kept = self._manager.all_steps()
        if step not in kept or not (self._folder / str(step) / CHECKSUMS).exists():
            raise self._clean_up(step, OSError("it is not there after it was written"))
        self._losses = {step: loss for step, loss in self._losses.items() if step in kept}

    def close(self) -> None:
        """Wait until the last checkpoint is on disk, and end the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._plain.close()
            if not self._failed:  # or threads of orbax would still report the failure
                self._quiet.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_manager(self) -> Any:
        policy = AnyPreservationPolicy([LatestN(self._keep), _KeepBest(self._best)])
        return ocp.CheckpointManager(
            self._plain.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                temporary_path_class=DurableFolder,
                async_options=ocp.AsyncOptions(timeout_secs=24 * 60 * 60),
                num_deletion_threads=1,
                lightweight_initialize=True,  # reading the metadata of a damaged one would fail
            ),
            handler_registry=ocp.handlers.create_default_handler_registry(
                # Compression would save 8% of space and take twice as long.
                arrays=ocp.PyTreeCheckpointHandler(use_compression=False),
                run=ocp.JsonCheckpointHandler(),
            ),
        )

    def _clean_up(self, step: int, error: Exception) -> OSError:
        """Remove what a failed write left behind, and return the error to raise."""
        self._writing = None
        del self._losses[step]
        self._failed = True
        if jax.process_count() == 1:  # else the other processes would have to take part
            with contextlib.suppress(Exception):  # the error that is being reported
                self._manager.close()  # waits for threads that are still writing
            for path in _unfinished(self._folder):
                shutil.rmtree(path, ignore_errors=True)
            # The old one no longer counts what it would remove.
            self._manager = self._open_manager()
        reason = error.__cause__ or error
        if not isinstance(reason, OSError) and _free(self._folder) < self._size:
            reason = OSError(errno.ENOSPC, "No space left on device")  # orbax may report another
        return OSError(
            f"checkpoint of step {step} could not be written to {self._folder / str(step)}: "
            f"{_first_line(reason)}; earlier checkpoints are intact: free some space, or fix "
            "the cause, and resume"
        )

    def _best(self) -> tuple[int, float] | None:
        found = [(loss, step) for step, loss in self._losses.items() if loss is not None]
        return min(found)[::-1] if found else None

    def _read_loss(self, step: int) -> float | None:
        folder = self._folder / str(step)
        try:
            check_files(folder, "run/")
        except DamagedError:  # `restore` warns if it gets to this checkpoint
            return None
        return _read_run(folder)["validation_loss"]

    def _read_state(self, step: int, template: Any, key_impls: dict[str, str]) -> Any:
        def put(path: Any, array: Any, like: Any) -> jax.Array:
            if impl := key_impls.get(_name(path)):
                array = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
            if _mesh_sharding(like):
                return array
            # An uncommitted array must stay uncommitted, or jit would compile its caller again.
            sharding = like.sharding if getattr(like, "committed", True) else None
            return jax.device_put(array, sharding)

        arrays = self._read_arrays(step, template)
        return jax.tree_util.tree_map_with_path(put, arrays, template)

    def _read_arrays(self, step: int, template: Any) -> Any:
        """Return the arrays of a checkpoint, NumPy arrays without a mesh; keys as their data."""

        def arguments(like: Any) -> Any:
            if sharding := _mesh_sharding(like):  # each process reads what its devices hold
                return ocp.ArrayRestoreArgs(sharding=sharding)
            return ocp.RestoreArgs(restore_type=np.ndarray)

        how = jax.tree.map(arguments, template)
        items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(template, restore_args=how))
        return self._manager.restore(step, args=items).arrays


def check_folder(folder: Path) -> None:
    """Write and restore a small checkpoint in a folder, and remove it. Call it in all processes.

    Raises:
        OSError, ValueError: the folder cannot hold checkpoints.
    """
    state = {"array": jnp.arange(3)}
    if jax.process_count() > 1:  # an array of all processes
        whole = NamedSharding(make_mesh(), PartitionSpec())
        state = {"array": place(np.arange(3), whole)}
    try:
        with contextlib.ExitStack() as stack:
            make = temporary_folder(folder / "checkpoints")
            own = in_step(lambda: str(stack.enter_context(make)) if is_first() else "")
            checkpoints = stack.enter_context(Checkpoints(Path(from_first(own)), keep=1))
            checkpoints.save(0, state, {}, {})
            checkpoints.verify(state)
    except OSError as error:
        raise OSError(
            f"{folder} cannot hold checkpoints ({_first_line(error.__cause__ or error)}): free "
            "some space, or choose another folder"
        ) from error


class _KeepBest(NamedTuple):
    """Orbax preservation policy: keep the best checkpoint."""

    best: Any

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best_step, _ = self.best() or (None, None)
        return [checkpoint.step == best_step for checkpoint in checkpoints]


def _damage(folder: Path) -> str:
    """Return what is wrong with the files of a checkpoint, or "" if nothing is."""
    try:
        check_files(folder)
    except DamagedError as damage:
        return str(damage)
    return ""


def _unfinished(folder: Path) -> list[Path]:
    found = folder.glob(f"[0-9]*{ocp.path.atomicity.TMP_DIR_SUFFIX}*")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "metadata").read_bytes())


def _check_space(folder: Path, needed: int) -> None:
    needed += needed // 20 + 1_000_000  # orbax's own files, and partly filled blocks
    if needed > (free := _free(folder)):
        raise OSError(f"it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")


def _free(folder: Path) -> float:
    """Return the free space of a folder in bytes; infinity if the folder has been removed."""
    return shutil.disk_usage(folder).free if folder.exists() else math.inf


def _first_line(error: BaseException) -> str:
    """Return the message of an error without what libraries append to it in brackets or lines."""
    message = str(error) or type(error).__name__
    return message.partition("\n")[0].partition(" [tensorstore_spec=")[0]


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(tree: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree)}


def _mesh_sharding(leaf: Any) -> NamedSharding | None:
    """Return how an array is split over a mesh of several devices, or None."""
    sharding = getattr(leaf, "sharding", None)
    is_split = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if is_split else None


def _local(array: Any) -> list[np.ndarray]:
    """Return the parts of an array that this process holds."""
    if _mesh_sharding(array):
        return [np.asarray(shard.data) for shard in array.addressable_shards]
    return [np.asarray(array)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
