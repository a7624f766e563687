"""Checkpoints: written in the background, complete or not at all, and restored bit-for-bit."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from flaxgpt.runs import checkpoints as checkpoint
from flaxgpt.runs import durable_folder
from flaxgpt.runs.checkpoints import Checkpoints

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 50), b2=0.95),
)
DATA = {"batch": 7, "shards": [1, 2], "order": {"seed": 2**53 + 1}}
CONFIG = {"model": {"emb_dim": 8, "tie_embeddings": True}, "training": {"learning_rate": 1e-3}}


def init_state() -> dict[str, Any]:
    params = {"embedding": jnp.ones((5, 4)), "block": {"kernel": jnp.arange(12.0).reshape(4, 3)}}
    with jax.numpy_dtype_promotion("standard"):
        opt_state = OPTIMIZER.init(params)
    return {
        "params": params,
        "opt_state": opt_state,
        "step": jnp.int32(0),
        "key": jax.random.key(0),
    }


@partial(jax.jit, donate_argnums=0)
def update(state: dict[str, Any]) -> dict[str, Any]:
    def loss(params: Any) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), (5, 3))
        return ((params["embedding"] @ params["block"]["kernel"] - noise) ** 2).sum()

    grads = jax.grad(loss)(state["params"])
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}


def train(steps: int) -> dict[str, Any]:
    state = init_state()
    for _ in range(steps):
        state = update(state)
    return state


def bits(tree: Any) -> list[Any]:
    """Return structure, dtypes, shapes and bytes of a tree: all but the placement of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    bare = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
    return [
        structure,
        *((x.dtype, x.shape, np.asarray(y).tobytes()) for x, y in zip(leaves, bare, strict=True)),
    ]


def state_of(step: int, size: int = 10) -> dict[str, Any]:
    """Return a state that differs for every step."""
    return {"w": jnp.asarray(np.random.default_rng(step).standard_normal(size, np.float32))}


def save_all(folder: Path, *losses: float | None, keep: int = 10) -> None:
    """Save checkpoints of steps 1, 2, ... with these validation losses."""
    with Checkpoints(folder, keep) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, state_of(step), {"step": step}, {}, loss)


def restore_step(folder: Path) -> int:
    with Checkpoints(folder, 10) as checkpoints:
        restored = checkpoints.restore(state_of(0))
    assert restored.data == {"step": restored.step}
    assert bits(restored.state) == bits(state_of(restored.step))
    return restored.step


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Contents


def test_everything_saved_is_restored_bit_for_bit(tmp_path: Path) -> None:
    state = train(7)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, state, DATA, CONFIG, 1.5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(init_state))
    assert restored.step == 7
    assert restored.data == DATA
    assert restored.config == CONFIG
    assert bits(restored.state) == bits(state)


def test_training_from_a_restored_state_is_bit_identical_to_uninterrupted_training(
    tmp_path: Path,
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, train(7), {}, {})
        state = checkpoints.restore(jax.eval_shape(init_state)).state
    for _ in range(8):
        state = update(state)
    assert bits(state) == bits(train(15))


def test_states_of_every_dtype_and_container_are_restored_exactly(tmp_path: Path) -> None:
    odd = np.array([0x7FC0_0001, 0xFFFF_FFFF, 0x8000_0000, 0x0000_0001], np.uint32)
    state = {
        "nan payloads, -0 and denormals": jnp.asarray(odd.view(np.float32)),
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "flags": jnp.array([True, False]),
        "tuple": (jnp.int8(-3), [jnp.uint32(2**32 - 1)]),
        "nothing": None,
        "empty": optax.EmptyState(),
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        assert bits(checkpoints.restore(state).state) == bits(state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_of_every_implementation_are_restored_as_keys(
    impl: str, tmp_path: Path
) -> None:
    state = {
        "one": jax.random.key(3, impl=impl),
        "many": jax.random.split(jax.random.key(4, impl=impl), 3),
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, {})
        restored = checkpoints.restore(state).state
        assert bits(restored) == bits(state)
        assert bits(checkpoints.restore(jax.eval_shape(lambda: state)).state) == bits(state)
    drawn = [jax.random.normal(keys["one"], 4) for keys in (state, restored)]
    np.testing.assert_array_equal(*drawn)


def test_orbax_alone_can_read_the_arrays(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, state := train(7), {}, {})
    with warnings.catch_warnings(action="ignore"):  # orbax prefers to be given shardings
        arrays = ocp.PyTreeCheckpointer().restore(tmp_path / "7" / "arrays")
    np.testing.assert_array_equal(
        arrays["params"]["block"]["kernel"], state["params"]["block"]["kernel"]
    )


def test_arrays_are_committed_to_a_device_only_where_the_template_says_so(tmp_path: Path) -> None:
    device = jax.devices()[0]
    bound = jax.sharding.SingleDeviceSharding(device)
    array = jnp.ones(3)
    template = {
        "free": array,
        "bound": jax.device_put(array, device),
        "shape": jax.ShapeDtypeStruct((3,), jnp.float32),
        "shape and place": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=bound),
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, dict.fromkeys(template, array), {}, {})
        state = checkpoints.restore(template).state
    assert {name: leaf.committed for name, leaf in state.items()} == {
        "free": False,
        "bound": True,
        "shape": False,
        "shape and place": True,
    }


SHARDED = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flaxgpt.runs.checkpoints import Checkpoints

mesh = jax.make_mesh((4,), ("x",))
cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "x"), ()))
array = np.arange(24, dtype=np.float32).reshape(3, 8)
state = {"cut": jax.device_put(array, cut), "whole": jax.device_put(array, whole)}
update = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
turned = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    for name, sharding in (("cut", whole), ("whole", cut))
}
with Checkpoints(Path(sys.argv[1]), 1) as checkpoints:
    checkpoints.save(1, state, {}, {})
    state = update(state)
    like, other = checkpoints.restore(state).state, checkpoints.restore(turned).state
assert all((like[name] == array).all() and (other[name] == array).all() for name in state)
for restored, template in ((like, state), (other, turned)):
    assert all(restored[name].sharding == template[name].sharding for name in state)
"""


@pytest.mark.slow
def test_sharded_arrays_are_placed_by_the_shardings_of_the_template(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED, tmp_path], env=environment, check=True
    )


# Background writing


def test_donating_the_state_after_save_does_not_change_what_is_written(tmp_path: Path) -> None:
    state = {"w": jnp.zeros(200_000), "small": jnp.zeros(()), "key": jax.random.key(0)}
    hammer = jax.jit(
        lambda s: {"w": s["w"] + 1, "small": s["small"] + 1, "key": jax.random.split(s["key"])[0]},
        donate_argnums=0,
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(1, 6):
            given = bits(state)
            checkpoints.save(step, state, {}, {})
            for _ in range(200):
                state = hammer(state)
            assert bits(checkpoints.restore(state).state) == given


def test_data_and_config_may_be_modified_after_save(tmp_path: Path) -> None:
    data, config = {"batch": 1, "order": [1]}, {"a": {"b": 1}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_of(1), data, config)
        data["batch"], config["a"]["b"] = 2, 2
        data["order"].append(2)
        restored = checkpoints.restore(state_of(0))
    assert restored.data == {"batch": 1, "order": [1]}
    assert restored.config == {"a": {"b": 1}}


def test_save_returns_before_the_checkpoint_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, on_disk = os.fsync, []

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        on_disk.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_of(1), {}, {})
        assert on_disk == []
        checkpoints.wait()
        assert on_disk != []


PLAIN = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from flaxgpt.runs.checkpoints import Checkpoints

state = {"w": jnp.ones(100), "key": jax.random.key(0)}
for run in range(2):
    with Checkpoints(Path(sys.argv[1]), 1) as checkpoints:
        for step in range(3):
            checkpoints.save(3 * run + step, state, {"a": 1}, {}, 1.0)
        checkpoints.restore(state)
"""


def test_saving_and_restoring_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    exec(PLAIN, {})
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_saving_and_restoring_print_nothing_and_warn_of_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PLAIN, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Retention


@pytest.mark.parametrize(
    ("keep", "losses", "kept", "best"),
    [
        (2, [3.0, 2.0, 1.0, 0.5], "34", (4, 0.5)),
        (2, [3.0, 1.0, 2.0, 2.5], "234", (2, 1.0)),
        (1, [1.0, 1.0, 1.0], "13", (1, 1.0)),
        (1, [2.0, None, None], "13", (1, 2.0)),
        (2, [None, None, None], "23", None),
        (1, [5.0, float("nan"), float("-inf")], "13", (1, 5.0)),
        (9, [1.0, 2.0], "12", (1, 1.0)),
    ],
)
def test_the_latest_and_the_best_checkpoints_are_kept(
    keep: int, losses: list[float | None], kept: str, best: Any, tmp_path: Path
) -> None:
    save_all(tmp_path, *losses, keep=keep)
    assert names(tmp_path) == list(kept)
    with Checkpoints(tmp_path, keep) as checkpoints:
        assert checkpoints.best() == best
        assert checkpoints.latest_step() == len(losses)


def test_the_best_checkpoint_of_an_earlier_session_is_kept(tmp_path: Path) -> None:
    save_all(tmp_path, 1.0, 2.0, keep=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state_of(step), {}, {}, jnp.float32(2.0))
    assert names(tmp_path) == ["1", "4"]


def test_a_new_folder_has_no_latest_and_no_best_checkpoint(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best() is None
        with pytest.raises(FileNotFoundError, match="checkpoints has no checkpoint to resume from"):
            checkpoints.restore(state_of(0))


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / ".DS_Store").touch()
    save_all(tmp_path, None, None, keep=1)
    assert restore_step(tmp_path) == 2
    assert names(tmp_path) == [".DS_Store", "2", "notes"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_the_newest_is_refused(step: int, tmp_path: Path) -> None:
    save_all(tmp_path, None, None)
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(ValueError, match=f"step {step} is not after step 2.*restore that"),
    ):
        checkpoints.save(step, state_of(step), {}, {})
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keeping_less_than_one_checkpoint_is_refused(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep={keep} must be a whole number, 1 or more"):
        Checkpoints(tmp_path, keep)


# Killed processes and damaged files


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
import jax.numpy as jnp
from flaxgpt.runs.checkpoints import Checkpoints

with Checkpoints(Path(sys.argv[1]), 2) as checkpoints:
    step = checkpoints.latest_step() or 0
    while True:
        step += 1
        w = jnp.asarray(np.random.default_rng(step).standard_normal(500_000, np.float32))
        checkpoints.save(step, {"w": w}, {"step": step}, {}, (step * 7) % 5)
        print(step - 1, flush=True)  # `save` has waited for this one
"""


def kill_while_saving(folder: Path, seconds: float) -> int:
    """Start or resume a process that only saves; return a step that was certainly saved."""
    command = [sys.executable, "-W", "ignore", "-c", ENDLESS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        printed += process.stdout.readlines()
    return int(printed[-1])


def kill_and_restore(folder: Path, rounds: int, seed: int) -> None:
    moments = random.Random(seed)
    template = jax.eval_shape(lambda: state_of(0, 500_000))
    for _ in range(rounds):
        written = kill_while_saving(folder, moments.uniform(0, 0.5))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoints = Checkpoints(folder, keep=2)
        assert all("which a killed run left half-written" in str(x.message) for x in caught)
        with checkpoints:  # a warning of a damaged checkpoint would be an error here
            restored = checkpoints.restore(template)
        assert restored.step >= written
        assert restored.data == {"step": restored.step}
        assert bits(restored.state) == bits(state_of(restored.step, 500_000))
        assert len(names(folder)) <= 4  # the best, two latest, and one about to be removed


def test_a_process_killed_while_saving_leaves_the_last_finished_checkpoint(tmp_path: Path) -> None:
    kill_and_restore(tmp_path, rounds=1, seed=0)


@pytest.mark.slow
def test_a_process_killed_forty_times_always_leaves_the_last_finished_checkpoint(
    tmp_path: Path,
) -> None:
    kill_and_restore(tmp_path, rounds=40, seed=1)


def test_a_half_written_checkpoint_is_removed_with_a_warning(tmp_path: Path) -> None:
    save_all(tmp_path, None, None)
    left = tmp_path / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "2", left)
    with pytest.warns(UserWarning, match=f"{left}, which a killed run left half-written"):
        Checkpoints(tmp_path, keep=2).close()
    assert names(tmp_path) == ["1", "2"]
    assert restore_step(tmp_path) == 2


def test_a_half_removed_checkpoint_is_never_restored_and_the_next_save_removes_it(
    tmp_path: Path,
) -> None:
    save_all(tmp_path, 3.0, 1.0, keep=2)
    next(path for path in (tmp_path / "2" / "arrays").rglob("*") if path.is_file()).unlink()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoints.restore(state_of(0)).step == 1
        assert checkpoints.best() == (1, 3.0)
        checkpoints.save(2, state_of(2), {"step": 2}, {}, 2.0)
    assert names(tmp_path) == ["2"]
    assert restore_step(tmp_path) == 2


def test_a_checkpoint_gets_its_name_only_after_every_file_is_synced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: set[tuple[int, int]] = set()
    fsync, rename = os.fsync, os.rename

    def identity(path: Path | int) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_dev, found.st_ino

    def remembers(descriptor: int) -> None:
        fsync(descriptor)
        on_disk.add(identity(descriptor))

    def checks(old: Path, new: Path) -> None:
        if Path(new) == tmp_path / "1":
            files = [path for path in Path(old).rglob("*") if path.is_file()]
            assert len(files) > 5
            assert [path for path in files if identity(path) not in on_disk] == []
            on_disk.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", remembers)
    monkeypatch.setattr(os, "rename", checks)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_of(1), {}, {})
    assert on_disk == {identity(tmp_path)}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_checkpoint_with_any_damaged_file_is_skipped_with_a_warning(
    damage: Any, tmp_path: Path
) -> None:
    save_all(tmp_path / "whole", None, None)
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file.relative_to(tmp_path / "whole"))
        with pytest.warns(UserWarning, match=f"checkpoint {folder / '2'} is damaged, not used: "):
            assert restore_step(folder) == 1


def test_a_checkpoint_with_damaged_metadata_is_not_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, 3.0, 1.0, 2.0)
    run = tmp_path / "2" / "run" / "metadata"
    run.write_text(run.read_text().replace('"validation_loss": 1.0', '"validation_loss": 0.1'))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best() == (3, 2.0)


def test_saving_after_restore_removes_damaged_checkpoints(tmp_path: Path) -> None:
    save_all(tmp_path, None, None, None)
    for step in "23":
        flip(tmp_path / step / "run" / "metadata")
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        with pytest.warns(UserWarning, match="damaged") as caught:
            assert checkpoints.restore(state_of(0)).step == 1
        assert len(caught) == 2
        assert names(tmp_path) == ["1", "2", "3"]  # until the next save
        checkpoints.save(2, state_of(2), {"step": 2}, {})
    assert names(tmp_path) == ["1", "2"]
    assert restore_step(tmp_path) == 2


def test_restoring_fails_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    save_all(tmp_path, None, None)
    for step in "12":
        cut(tmp_path / step / "checksums.json")
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(FileNotFoundError, match="no checkpoint to resume from: all are damaged; st"),
    ):
        checkpoints.restore(state_of(0))
    assert names(tmp_path) == ["1", "2"]


def test_a_template_of_another_model_is_refused_with_a_list_of_differences(tmp_path: Path) -> None:
    given = {"same": jnp.ones(2), "shape": jnp.ones(2), "dtype": jnp.ones(2), "gone": jnp.ones(2)}
    wanted = {
        "same": jnp.ones(2),
        "shape": jnp.ones((1, 2)),
        "dtype": jnp.ones(2, jnp.bfloat16),
        "new": {"key": jax.random.key(0)},
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, given, {}, {})
        with pytest.raises(ValueError, match="1 is of another model or optimizer") as caught:
            checkpoints.restore(wanted)
        assert bits(checkpoints.restore(given).state) == bits(given)
    for fault in (
        "shape is float32[2], expected float32[1, 2]",
        "dtype is float32[2], expected bfloat16[2]",
        "new/key is missing, expected key<fry>[]",
        "gone is float32[2], expected none",
    ):
        assert fault in str(caught.value)
    assert "same" not in str(caught.value)


# Failing writes


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(durable_folder, "sync", fail)
        yield patch


NEXT_CALLS: dict[str, Any] = {
    "save": lambda checkpoints: checkpoints.save(2, state_of(2), {}, {}),
    "restore": lambda checkpoints: checkpoints.restore(state_of(0)),
    "wait": Checkpoints.wait,
    "latest_step": Checkpoints.latest_step,
    "best": Checkpoints.best,
    "close": Checkpoints.close,
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_a_failed_write_is_raised_once_by_the_next_call(
    call: str,
    failing_disk: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state_of(1), {}, {})
    with pytest.raises(
        OSError, match=r"checkpoint of step 1 could not be written to .*1: .*Input/output error"
    ):
        NEXT_CALLS[call](checkpoints)
    assert names(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    failing_disk.undo()
    if call != "close":
        checkpoints.save(1, state_of(1), {"step": 1}, {})
        checkpoints.close()
        assert restore_step(tmp_path) == 1


def test_after_a_failed_write_the_latest_and_the_best_checkpoints_are_still_kept(
    failing_disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing_disk.undo()
    save_all(tmp_path, 1.0, 2.0, keep=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with failing_disk.context() as patch:
            patch.setattr(durable_folder, "sync", None)
            checkpoints.save(3, state_of(3), {}, {}, 0.5)
            with pytest.raises(OSError, match="checkpoint of step 3"):
                checkpoints.wait()
        assert (checkpoints.latest_step(), checkpoints.best()) == (2, (1, 1.0))
        checkpoints.save(3, state_of(3), {}, {}, 1.5)
    assert names(tmp_path) == ["1", "3"]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    folder = Path(tempfile.mkdtemp())  # pytest cannot remove its own while this is mounted
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_raises_one_readable_error_and_keeps_earlier_checkpoints(
    checked: bool,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if not checked:  # the disk fills up during the write, or the limit is a quota
        monkeypatch.setattr(checkpoint, "_check_space", lambda folder, needed: None)
    save_all(small_disk, 1.0)
    with Checkpoints(small_disk, keep=1) as checkpoints:
        checkpoints.save(2, state_of(2), {"step": 2}, {})
        with pytest.raises(
            OSError, match=r"checkpoint of step 3 could not be .*free some space"
        ) as caught:
            checkpoints.save(3, state_of(3, 2_000_000), {"step": 3}, {})
            checkpoints.wait()
        assert ("9 MB and 4 MB are free" if checked else "No space left") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert names(small_disk) == ["1", "2"]
        assert checkpoints.restore(state_of(0)).step == 2
        checkpoints.save(3, state_of(3), {"step": 3}, {})
    assert restore_step(small_disk) == 3
    assert capfd.readouterr() == ("", "")


def test_a_file_without_read_permission_does_not_count_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, None, None)
    path_open = Path.open

    def refuses(path: Path, *mode: Any, **options: Any) -> Any:
        if path == tmp_path / "2" / "run" / "metadata":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *mode, **options)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(Path, "open", refuses)
        with pytest.raises(PermissionError, match="Permission denied"):
            checkpoints.restore(state_of(0))


def test_waiting_again_after_an_interrupted_wait_finds_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_of(1), {}, {})
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "join", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.wait()
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, state_of(2), {}, {})
    assert names(tmp_path) == ["2"]
    assert capfd.readouterr() == ("", "")
