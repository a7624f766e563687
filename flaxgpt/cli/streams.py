"""Standard streams that are closed or in another encoding, and the text that comes from outside."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast


def prepare_streams() -> None:
    """Make standard output replace characters outside its encoding, and open what is closed.

    A file that is opened later would otherwise take the number of a closed stream, and receive what
    JAX's libraries write to standard error.

    Raises:
        OSError: standard output is closed.
    """
    is_closed = sys.stdout is None
    sys.stdin = sys.stdin or _nothing("r")  # in the order of their numbers
    sys.stdout = sys.stdout or _nothing("w")
    sys.stderr = sys.stderr or _nothing("w")
    if is_closed:
        raise OSError("standard output is closed: redirect it to a file or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


@contextlib.contextmanager
def hidden_output() -> Iterator[None]:
    """Discard everything on standard output during a `with` block.

    On CPU, JAX's library for communication reports there which processes it is connected to.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"flaxgpt: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def read_prompt() -> str:
    """Return the text on standard input without its byte-order mark and the newline at its end.

    Lines may end as on Windows. The text is in UTF-8, or in the encoding of standard input.

    Raises:
        ValueError: the bytes are not text in these encodings.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        text = _decode(sys.stdin.buffer.read(), sys.stdin.encoding)
    else:  # replaced by the caller of `main`
        text = sys.stdin.read()
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


def check_text(name: str, text: str) -> str:
    """Return a text of the command line, or raise ValueError if its bytes are not UTF-8."""
    if text.isascii():
        return text
    try:
        # In the C locale, Python may take bytes beyond ASCII for surrogates.
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError as error:
            raise ValueError(f"{name} is not UTF-8 ({error}): check its encoding") from error
    return text


def _nothing(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))


def _decode(data: bytes, encoding: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, own = "utf-16", True
    else:
        own = codecs.lookup(encoding).name not in ("utf-8", "ascii")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if own:
            return data.decode(encoding)
        raise ValueError(
            f"standard input is not UTF-8 (byte {data[error.start]:#04x} at {error.start}): "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
