"""JAX's compilation cache in the user's cache folder, so that the next process compiles nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import warnings
from pathlib import Path

import jax
import jaxlib

_MAX_BYTES = 2**28


def enable_compilation_cache() -> None:
    """Let JAX keep compiled programs in the user's cache folder.

    Does nothing if `JAX_COMPILATION_CACHE_DIR` is set, or if the folder cannot be written. A
    damaged cache, or one on a full disk, only costs the time to compile again.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if importlib.util.find_spec("filelock") is None:  # with which JAX limits the size
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # there is no home folder
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": _MAX_BYTES,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    }
    for name, value in settings.items():
        if name not in os.environ:
            jax.config.update(name.lower(), value)
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache")


def cache_folder() -> Path:
    """Return the folder for this version of jaxlib and this kind of processor.

    XLA warns about programs that were compiled for another processor, as in a home folder that
    several machines share.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the specification of XDG_CACHE_HOME requires
        base = Path.home() / ".cache"
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return base / "flaxgpt" / "compiled" / f"jaxlib-{jaxlib.__version__}-{kind}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on Linux
        return f"{platform.machine()} {platform.processor()}"
    names = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))
