"""Training in several processes on one machine, with JAX's communication on CPU."""

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxgpt
from command import COMMAND, QUICK
from flaxgpt.runs.processes import connect, meet

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "big", "old", "dog"]
SETTINGS = [
    *("--steps=12", "--batch-size=8", "--emb-dim=32", "--n-heads=4", "--n-layers=1"),
    *("--context-length=32", "--drop-rate=0.1", "--eval-every=6", "--save-every=6"),
    *("--steps-per-call=3", "--log-every=1", "--sample-every=0"),
]
ENDLESS = [*SETTINGS, "--steps=100000", "--keep=1", "--sample-every=0"]


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 8000)))
    return path


class Group:
    """Several `flaxgpt train` processes of one run, with simulated devices."""

    def __init__(self, count, out, *options, devices=2, own=None, folders=None):
        self.out = Path(out)
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = QUICK | {"XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
        address = f"localhost:{free_port()}"
        self.logs = [self.out.with_name(f"{self.out.name}.{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            arguments = [
                *("train", "--out", out, *options, *((own or {}).get(i, []))),
                *("--distributed", "--coordinator", address),
                *("--process-id", i, "--processes", count),
            ]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*COMMAND, *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    env=environment,
                    cwd=folders[i] if folders else None,
                )
            self.processes.append(process)

    def wait(self, seconds=240):
        """Return the exit codes and standard outputs, once all processes have ended."""
        deadline = time.monotonic() + seconds
        outputs = [
            process.communicate(timeout=max(1, deadline - time.monotonic()))[0].decode()
            for process in self.processes
        ]
        return [process.returncode for process in self.processes], outputs

    def wait_until(self, step, seconds=120):
        """Wait until a step has been reported."""
        deadline = time.monotonic() + seconds
        while not any(record["step"] >= step for record in metrics(self.out, partial=True)):
            assert time.monotonic() < deadline, self.messages()
            assert all(process.poll() is None for process in self.processes), self.messages()
            time.sleep(0.1)

    def messages(self):
        return [log.read_text() for log in self.logs]


@pytest.fixture
def group():
    """Return `Group`, whose processes are killed at the end."""
    started = []

    def start(*arguments, **options):
        started.append(Group(*arguments, **options))
        return started[-1]

    yield start
    for process in (process for group in started for process in group.processes):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stdout.close()


def metrics(out, partial=False):
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() or not partial else []
    return [json.loads(line) for line in lines]


def losses(out):
    names = ("loss", "validation_loss")
    return [(x["step"], x[name]) for x in metrics(out) for name in names if name in x]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The losses of the run in one process, on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [*COMMAND, "train", "--data", text, "--out", out, *SETTINGS]
    subprocess.run(command, env=QUICK, check=True, capture_output=True)
    return losses(out)


def assert_close(found, expected):
    assert [step for step, _ in found] == [step for step, _ in expected]
    # Sums are made in another order; 1e-6 is observed.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_only_the_first_reports(
    alone, group, text, tmp_path
):
    training = group(2, tmp_path / "run", "--data", text, *SETTINGS, devices=1)
    codes, outputs = training.wait()
    assert codes == [0, 0], training.messages()
    assert_close(losses(tmp_path / "run"), alone)
    assert outputs == [f"{tmp_path / 'run' / 'model'}\n", ""]
    assert "step" not in training.messages()[1]


@pytest.mark.slow
def test_one_process_trains_on_several_devices(alone, text, tmp_path):
    environment = QUICK | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [*COMMAND, "train", "--data", text, "--out", tmp_path / "run", *SETTINGS]
    subprocess.run(
        [*command, "--mesh=fsdp=2,tensor=2"], env=environment, check=True, capture_output=True
    )
    assert_close(losses(tmp_path / "run"), alone)


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """A run of two processes that has a checkpoint of step 6, and what it would have become."""
    folder = tmp_path_factory.mktemp("stopped")
    sampling = ["--sample-every=12", "--sample-tokens=8"]
    training = Group(2, folder / "whole", "--data", text, *SETTINGS, *sampling)
    assert training.wait()[0] == [0, 0], training.messages()
    assert (folder / "whole" / "samples.txt").read_text().count("step 12") == 1
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half" / "checkpoints" / "12")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(4, 1, ["--mesh=fsdp=2,tensor=2"]), (4, 2, ["--mesh=data=2,fsdp=4"]), (2, 1, [])],
    ids=["4 processes, fsdp and tensor", "4 processes of 2 devices", "fewer devices"],
)
def test_a_run_resumes_on_another_mesh_and_number_of_processes(
    count, devices, mesh, alone, stopped, group, tmp_path
):
    shutil.copytree(stopped / "half", tmp_path / "run")
    training = group(
        count, tmp_path / "run", "--init-from", tmp_path / "run", *mesh, devices=devices
    )
    assert training.wait()[0] == [0] * count, training.messages()
    assert_close(losses(tmp_path / "run"), alone)


@pytest.mark.slow
def test_a_run_of_several_processes_resumes_in_one(alone, stopped, tmp_path):
    shutil.copytree(stopped / "half", tmp_path / "run")
    command = [*COMMAND, "train", "--init-from", tmp_path / "run"]
    subprocess.run(command, env=QUICK, check=True, capture_output=True)
    assert_close(losses(tmp_path / "run"), alone)


@pytest.mark.slow
def test_a_run_that_resumes_on_the_same_devices_is_bit_identical(stopped, group, tmp_path):
    shutil.copytree(stopped / "half", tmp_path / "run")
    training = group(2, tmp_path / "run", "--init-from", tmp_path / "run")
    assert training.wait()[0] == [0, 0], training.messages()
    assert losses(tmp_path / "run") == losses(stopped / "whole")
    model = Path("model", "model.safetensors")
    assert (tmp_path / "run" / model).read_bytes() == (stopped / "whole" / model).read_bytes()


@pytest.mark.slow
def test_a_model_is_fine_tuned_by_several_processes(stopped, group, text, tmp_path):
    options = ["--data", text, "--steps=2", "--batch-size=4", "--sample-every=0"]
    source = stopped / "whole" / "model"
    training = group(2, tmp_path / "run", "--init-from", source, "--mesh=fsdp=4", *options)
    assert training.wait()[0] == [0, 0], training.messages()
    alone = [*COMMAND, "train", "--init-from", source, "--out", tmp_path / "alone", *options]
    subprocess.run(list(map(str, alone)), env=QUICK, check=True, capture_output=True)
    assert_close(losses(tmp_path / "run"), losses(tmp_path / "alone"))


LIBRARY = """
import sys
import flaxgpt
from flaxgpt.runs.processes import connect

connect(sys.argv[1], int(sys.argv[2]), 2)
mesh = flaxgpt.make_mesh(fsdp=2)
cfg, params, tokenizer = flaxgpt.load("tales", mesh=mesh)
flaxgpt.save(sys.argv[3], cfg, params, tokenizer=tokenizer)
cfg, params, tokenizer = flaxgpt.load(sys.argv[3], mesh=mesh)
texts = flaxgpt.generate_text(cfg, params, tokenizer, ["Once upon a time", "A"], 12)
total = flaxgpt.score(cfg, params, [[1, 2, 3], [4, 5, 6]]).sum().round(3)
with open(sys.argv[4], "w") as file:  # JAX writes to standard output
    print(texts, file=file)
    print(total, file=file)
"""


@pytest.mark.slow
def test_a_model_is_loaded_saved_and_used_by_two_processes(tmp_path):
    address = f"localhost:{free_port()}"
    environment = QUICK | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LIBRARY, address, str(i), str(tmp_path / "saved"), str(output)],
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        for i, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    cfg, params, tokenizer = flaxgpt.load("tales")
    texts = flaxgpt.generate_text(cfg, params, tokenizer, ["Once upon a time", "A"], 12)
    total = flaxgpt.score(cfg, params, [[1, 2, 3], [4, 5, 6]]).sum().round(3)
    for output in outputs:
        assert output.read_text().splitlines() == [str(texts), str(total)]
    _, saved, _ = flaxgpt.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, saved, params)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_stops_the_others_and_the_run_resumes(victim, group, text, tmp_path):
    training = group(2, tmp_path / "run", "--data", text, *ENDLESS)
    training.wait_until(8)
    training.processes[victim].kill()
    codes, _ = training.wait(60)
    assert codes[1 - victim] == 1, training.messages()[1 - victim]
    message = training.messages()[1 - victim]
    if jax.__version_info__ < (0, 8):  # JAX ends the process in a way that cannot be caught
        assert "another task died" in message or "flaxgpt: another process" in message
    else:
        last = message.splitlines()[-1]
        assert last.startswith("flaxgpt: another process has stopped or cannot be reached")
    done = metrics(tmp_path / "run")[-1]["step"]
    steps = f"--steps={done + 3}"
    again = group(2, tmp_path / "run", "--init-from", tmp_path / "run", steps)
    assert again.wait()[0] == [0, 0], again.messages()
    assert metrics(tmp_path / "run")[-1]["step"] == done + 3


@pytest.mark.slow
def test_interrupting_one_process_saves_once_and_stops_all(group, text, tmp_path):
    options = [*ENDLESS, "--save-every=100000", "--eval-every=100000"]
    training = group(4, tmp_path / "run", "--data", text, *options, devices=1)
    training.wait_until(8)
    training.processes[2].send_signal(signal.SIGINT)
    assert training.wait(60)[0] == [130] * 4
    (saved,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert training.messages()[0].count("checkpoint saved") == 1
    assert int(saved.name) == metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--learning-rate=0.5"], "learning_rate=0.5 (process 0: 0.004)"),
        (["--mesh=data=1,fsdp=4"], "mesh={'data': 1, 'fsdp': 4, 'tensor': 1} (process 0: None)"),
    ],
)
def test_processes_with_other_settings_are_refused_by_all(own, message, group, text, tmp_path):
    training = group(2, tmp_path / "run", "--data", text, *SETTINGS, own={1: own})
    assert training.wait(90)[0] == [2, 2]
    for text in training.messages():
        assert text.startswith("flaxgpt: process 1 was started with")
        assert message in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_with_another_text_is_refused_by_all(group, text, tmp_path):
    # Each has a text.txt in its folder, as on machines of their own.
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, words in zip(folders, [text.read_text(), text.read_text()[::-1]], strict=True):
        folder.mkdir()
        (folder / "text.txt").write_text(words)
    options = ["--data", "text.txt", *SETTINGS]
    training = group(2, tmp_path / "run", *options, folders=folders)
    assert training.wait(90)[0] == [2, 2]
    ours, theirs = training.messages()[::-1]
    assert ours.startswith("flaxgpt: the text text.txt is not the one that process 0 has")
    assert "flaxgpt: process 1 stopped: the text text.txt is not the one" in theirs
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_the_devices_do_not_divide_is_refused_by_all(group, text, tmp_path):
    training = group(2, tmp_path / "run", "--data", text, *SETTINGS, "--batch-size=6")
    assert training.wait(90)[0] == [2, 2]
    for message in training.messages():
        assert message.startswith("flaxgpt: batch_size=6 with accumulate=1 makes pieces of 6 rows")


def meet_all(*arguments, seconds=10):
    """Call `meet` with (number, count) for each process, and return the message of each error."""
    port = free_port()

    def call(number, count):
        try:
            meet("localhost", port, number, count, seconds)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return [*pool.map(call, *zip(*arguments, strict=True))]


def test_processes_that_fit_together_meet():
    assert meet_all((0, 3), (1, 3), (2, 3)) == ["", "", ""]


def test_processes_with_different_counts_are_told_so():
    message = "process 1 has --processes 3, and process 0 has 2: they must be equal"
    assert meet_all((0, 2), (1, 3)) == [message, message]


def test_two_processes_of_one_number_are_told_so():
    messages = meet_all((0, 3), (1, 3), (1, 3))
    assert set(messages) == {"two processes have --process-id 1: number them from 0 to 2"}


def test_the_processes_that_are_there_learn_which_one_is_missing():
    messages = meet_all((0, 3), (2, 3), seconds=1)
    expected = "process 1 of 3 did not connect within 1 s: start all of them, with --process-id 0"
    assert all(message.startswith(expected) for message in messages)


def test_a_coordinator_that_cannot_be_reached_is_named():
    (message,) = meet_all((1, 2), seconds=0.5)
    assert message.startswith("the coordinator localhost:")
    assert "could not be reached within 0.5 s (Connection refused): start process 0" in message


def connect_to(port, line):
    """Send a line to a port as soon as somebody listens there."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection(("localhost", port)) as connection:
                connection.sendall(line)
            return
        time.sleep(0.05)


def test_other_connections_to_the_port_do_not_matter():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, "localhost", port, 0, 2, 10)
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"{}\n"):
            connect_to(port, line)
        pool.submit(meet, "localhost", port, 1, 2, 10).result()
        first.result()


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be used here"):
            meet("localhost", port, 0, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", 0, None), "give all three or none: --processes not given"),
        (("localhost", 0, 2), "coordinator='localhost' must be HOST:PORT"),
        (("localhost:99999", 0, 2), "must be HOST:PORT"),
        (("localhost:1234", 2, 2), "process_id=2 must be from 0 to 1"),
        (("localhost:1234", -1, 2), "process_id=-1 must be a whole number, 0 or more"),
        (("localhost:1234", 0, 0), "processes=0 must be a whole number, 1 or more"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        connect(*arguments)
