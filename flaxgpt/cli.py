"""The `flaxgpt` command: arguments to one library call, results alone on standard output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import flaxgpt
from flaxgpt._checks import check_sampling, check_size
from flaxgpt.config import GPTConfig
from flaxgpt.text import spoken, stream_text
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.tokenizer_files import UnreadableTokenizerWarning


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt and print the text as it comes.

    Example: flaxgpt generate "Hello, I am" --model book --max-new-tokens 6
    """

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """Text to continue; read from standard input if absent or "-"."""

    model: str = "book"
    """"book" (its untrained 124M model, seed 123), a folder, a safetensors file or a hub id."""

    max_new_tokens: int = 50
    """Tokens to add at most."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; higher draws more freely."""

    top_k: int | None = None
    """Draw from this many likeliest tokens only."""

    top_p: float | None = None
    """Draw from the likeliest tokens that reach this probability together."""

    seed: int = 0
    """Of the random draws: the same seed gives the same text."""

    n: int = 1
    """How many continuations to print, an empty line between them."""

    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A token that ends the text, as text or id (repeatable); else end of text and its like."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in."""

    echo: bool = True
    """Print the prompt before its continuation."""

    def run(self) -> None:
        """Loads the model and prints continuations; bad values are found before loading."""
        check_size("--max-new-tokens", self.max_new_tokens)
        check_size("--n", self.n)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} must be from 0 to {2**32 - 1}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"--n {self.n} at --temperature 0 would print one text {self.n} times: "
                "give a --temperature such as 0.8"
            )
        prompt = _prompt(self.prompt)

        with _progress(f"loading {self.model}") as advance, warnings.catch_warnings():
            warnings.simplefilter("error", UnreadableTokenizerWarning)  # text needs a tokenizer
            try:
                cfg, params, tokenizer = flaxgpt.load(self.model, progress=advance)
            except UnreadableTokenizerWarning as warning:
                raise ValueError(f"{self.model} has {warning}") from warning
        if tokenizer is None:
            raise ValueError(
                f"{self.model} has no tokenizer for its {cfg.vocab_size} tokens: put vocab.json "
                "and merges.txt, tokenizer.json or flaxgpt_tokenizer.json in its folder"
            )
        ids = tokenizer.encode(prompt)
        stop_ids = _stop_ids(cfg, tokenizer, self.stop)
        key = jax.random.key(self.seed)
        for i in range(self.n):
            tokens = flaxgpt.stream(
                cfg,
                params,
                ids,
                self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                key=jax.random.fold_in(key, i)[None],  # as row i of `generate`
                stop_ids=stop_ids,
                dtype=self.dtype,
            )
            _say(("\n" if i else "") + (prompt if self.echo else ""))
            for piece in stream_text(tokenizer, spoken(tokenizer, tokens, stop_ids)):
                _say(piece)
            _say("\n")


_COMMANDS: dict[str, Callable[..., Generate]] = {"generate": Generate}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 on success, 1 where the device fails, 2 on bad input, 130 on Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"flaxgpt {flaxgpt.__version__}")
        return 0
    try:
        _parse(argv).run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us has enough. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"flaxgpt: {_one_line(error)}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        print(
            f"flaxgpt: the device could not do it ({_one_line(error)[:200]}): a smaller model, a "
            "shorter text or --dtype bfloat16 needs less memory",
            file=sys.stderr,
        )
        return 1
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse(argv: list[str]) -> Generate:
    """Returns the command; on bad arguments raises ValueError with tyro's words in one line."""
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS, prog="flaxgpt", description=flaxgpt.__doc__, args=argv
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        lines = [line.strip("│ ") for line in panel.getvalue().splitlines()]
        reason = " ".join(line for line in lines if re.match(r"[^╭─╰]", line))
        reason = reason.partition(" For full helptext")[0].removesuffix(".")
        raise ValueError(f"{reason}; flaxgpt --help lists what there is") from None


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        prompt = given
    elif given is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one, as in flaxgpt generate "Hello, I am"')
    else:
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character to continue from")
    return prompt


def _stop_ids(cfg: GPTConfig, tokenizer: Tokenizer, stops: tuple[str, ...]) -> list[int]:
    if not stops:
        # A tokenizer may have more, such as padding, than the model was trained with.
        return [token for token in tokenizer.special_tokens.values() if token < cfg.vocab_size]
    ids = []
    for stop in stops:
        tokens = [int(stop)] if stop.isdecimal() else tokenizer.encode(stop, allowed_special="all")
        if len(tokens) != 1:
            raise ValueError(f"--stop {stop!r} is {len(tokens)} tokens ({tokens}): give one token")
        ids += tokens
    return ids


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total) that moves a bar on standard error, if a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
