"""Several processes that train one model: connecting them, and keeping them in step.

JAX aborts a process that cannot connect, or that loses the others, with a stack trace. So the
processes first meet on the coordinator's port, where process 0 tells all of them what is wrong,
such as two of the same number; and a process that is aborted later says so in plain words last.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

import flaxgpt
from flaxgpt._checks import check_size, listed

Result = TypeVar("Result")

LOST = (
    "another process has stopped or cannot be reached: see its output, then start all processes "
    "again, with --init-from and the run's folder to resume"
)

_STATUS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED): ")  # XLA's
CONNECTING_SECONDS = 60
"""How long processes wait for each other at the start."""
HEARTBEAT_SECONDS = 30
"""How long a process may be out of reach before JAX ends the others."""


class LostProcessError(RuntimeError):
    """Another process has stopped or cannot be reached, so this one cannot continue."""


def connect(
    coordinator: str | None = None, process_id: int | None = None, processes: int | None = None
) -> None:
    """Connect this process with the others. Call it in each, before any other use of JAX.

    Without arguments, JAX finds out about the others: under Slurm, Kubernetes, Open MPI and on TPU
    pods (`jax.distributed.initialize`).

    Args:
        coordinator: host and port of process 0, such as "10.0.0.1:1234".
        process_id: number of this process, from 0 on.
        processes: how many processes there are.

    Raises:
        ValueError: only some arguments are given, or processes do not fit together.
        OSError: the coordinator cannot be reached, or not all processes connect within a minute.
        RuntimeError: JAX has already been used in this process.
    """
    limits: dict[str, Any] = {
        "initialization_timeout": CONNECTING_SECONDS,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
    }
    given = {"coordinator": coordinator, "process-id": process_id, "processes": processes}
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"give all three or none: {listed(missing)} not given")
        _explain_aborts()
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            raise ValueError(
                "no cluster was detected (Slurm, Kubernetes, Open MPI or a TPU pod): give "
                "--coordinator HOST:PORT, --process-id and --processes to each process"
            ) from error
        return
    assert coordinator is not None
    count, number = check_size("processes", processes), check_size("process_id", process_id, 0)
    if number >= count:
        raise ValueError(f"process_id={number} must be from 0 to {count - 1}: processes={count}")
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, such as 10.0.0.1:1234")
    meet(host.strip("[]"), int(port), number, count)
    _explain_aborts()
    jax.distributed.initialize(coordinator, count, number, **limits)


_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_SIGNAL_HANDLER
def _say_why(number: int) -> None:
    # JAX's own threads abort, where no exception can be raised.
    os.write(2, f"flaxgpt: {LOST}\n".encode())
    os._exit(1)


def _explain_aborts() -> None:
    """Print a message where JAX aborts this process; Python cannot handle that signal itself."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _SIGNAL_HANDLER), ctypes.c_void_p
    libc.signal(signal.SIGABRT, _say_why)


def _hello(number: int, count: int) -> dict[str, Any]:
    versions = {"flaxgpt": flaxgpt.__version__, "jax": jax.__version__}
    return {"process_id": number, "processes": count, **versions}


def meet(
    host: str, port: int, number: int, count: int, seconds: float = CONNECTING_SECONDS
) -> None:
    """Wait until all processes have reported to process 0 at this address, for some seconds.

    Raises:
        ValueError: the processes do not fit together; all that have reported raise it.
        OSError: the address cannot be reached or used.
    """
    if number == 0:
        _wait_for_others(port, count, seconds)
    else:
        _report_to_first(host, port, number, count, seconds)


def _wait_for_others(port: int, count: int, seconds: float) -> None:
    """Let all other processes report, and answer each of them with what is wrong, or nothing."""
    deadline = time.monotonic() + seconds
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"port {port} cannot be used here ({error.strerror}): choose another port for "
            "--coordinator, in all processes"
        ) from error
    waiting: dict[int, socket.socket] = {}
    fault = ""
    with server, contextlib.ExitStack() as stack:
        while len(waiting) < count - 1 and not fault:
            absent = [str(number) for number in range(1, count) if number not in waiting]
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                stack.enter_context(connection)
            except TimeoutError:
                fault = (
                    f"process {' and '.join(absent)} of {count} did not connect within "
                    f"{seconds:g} s: start all of them, with --process-id 0 to {count - 1}"
                )
                break
            try:
                hello = _read_line(connection, min(deadline, time.monotonic() + 5))
                if hello.keys() != _hello(0, count).keys():
                    continue
            except (OSError, ValueError):  # not one of ours
                continue
            if fault := _unfit(hello, count, waiting):
                _write_line(connection, {"fault": fault})
            else:
                waiting[hello["process_id"]] = connection
        for connection in waiting.values():
            _write_line(connection, {"fault": fault})
        for connection in waiting.values():  # which close first, so that the port is free
            with contextlib.suppress(OSError, ValueError):
                _read_line(connection, time.monotonic() + 5)
    if fault:
        raise ValueError(fault)


def _unfit(hello: dict[str, Any], count: int, waiting: Mapping[int, Any]) -> str:
    """Return why a process cannot take part, or "" if it can."""
    number, ours = hello["process_id"], _hello(0, count)
    for name in ("processes", "flaxgpt", "jax"):
        if hello[name] != ours[name]:
            what = "--processes" if name == "processes" else f"version of {name}"
            return (
                f"process {number} has {what} {hello[name]}, and process 0 has {ours[name]}: they "
                "must be equal"
            )
    if number == 0 or number in waiting:
        return f"two processes have --process-id {number}: number them from 0 to {count - 1}"
    return ""


def _report_to_first(host: str, port: int, number: int, count: int, seconds: float) -> None:
    """Report to process 0, and raise ValueError if something is wrong."""
    deadline, reason = time.monotonic() + seconds, ""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise OSError(
                f"the coordinator {host}:{port} could not be reached within {seconds:g} s "
                f"({reason}): start process 0 there, and check the address and the firewall"
            )
        time.sleep(0.2)
    with connection:
        try:
            _write_line(connection, _hello(number, count))
            # Process 0 waits for the others meanwhile, and started at another time.
            answer = _read_line(connection, time.monotonic() + 2 * seconds)
        except (OSError, ValueError) as error:
            raise OSError(
                f"process 0 at {host}:{port} stopped while the processes connected: see its output"
            ) from error
    if answer["fault"]:
        raise ValueError(answer["fault"])


def _write_line(connection: socket.socket, values: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other end reports it
        connection.sendall(json.dumps(values).encode() + b"\n")


def _read_line(connection: socket.socket, deadline: float) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        piece = connection.recv(4096)
        if not piece or len(data) > 2**16:
            raise ValueError("the connection was closed")
        data += piece
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} is not what was expected")
    return values


def is_first() -> bool:
    """Return whether this process is the one that prints, plots and writes reports."""
    return jax.process_index() == 0


def in_step(action: Callable[[], Result]) -> Result:
    """Run an action in every process, and raise an error in all of them if one fails.

    All processes must call this, and each waits for the others.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must not wait for this process
        failure = error
    messages = _gather("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message:
            raise ValueError(f"process {number} stopped: {message}")
    return result


def from_first(text: str) -> str:
    """Return the text of process 0."""
    return text if jax.process_count() == 1 else _gather(text)[0]


def check_same(values: Mapping[str, Any]) -> None:
    """Raise ValueError in all processes unless the values, which JSON can hold, are the same."""
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, _gather(json.dumps(values)))
    for number, other in enumerate(others, start=1):
        if differing := [
            f"{name}={other.get(name)!r} (process 0: {first.get(name)!r})"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]:
            raise ValueError(
                f"process {number} was started with {listed(differing)}: start all processes with "
                "the same settings and data"
            )


def largest(number: int) -> int:
    """Return the largest of a number from each process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _gather(text: str) -> list[str]:
    """Return the texts of all processes, by process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def not_waiting_for_others(stack: contextlib.ExitStack) -> Iterator[None]:
    """After a failure in one of several processes, close nothing: it would wait for the others."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        stack.pop_all()
        reason = " ".join(str(error).split())[:200]
        is_lost = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason
        # JAX also raises ValueError for what its library for communication reports.
        if is_lost or re.match(
            "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED): ", reason
        ):
            raise LostProcessError(f"{LOST} ({reason})") from error
        raise
