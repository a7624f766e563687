"""`flaxgpt generate`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Literal

import jax
import tyro

import flaxgpt
from flaxgpt._checks import check_sampling, check_size
from flaxgpt.cli.common import load_with_tokenizer, say
from flaxgpt.config import GPTConfig
from flaxgpt.generation.text import drop_stop_tokens
from flaxgpt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt and print the text as it comes.

    Examples:
      flaxgpt generate "Once upon a time"
      flaxgpt generate "Hello, I am" --model book --temperature 0 --max-new-tokens 6
    """

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """Text to continue; read from standard input if absent or "-"."""

    model: str = "tales"
    """"tales" (a small model that comes along), "book" (its untrained 124M model, seed 123), a
    folder, a run of flaxgpt train, a safetensors file or a hub id."""

    max_new_tokens: int = 100
    """Tokens to add at most."""

    temperature: float = 0.8
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

        cfg, params, tokenizer = load_with_tokenizer(self.model)
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
            say(("\n" if i else "") + (prompt if self.echo else ""))
            new_ids = drop_stop_tokens(tokenizer, tokens, stop_ids)
            for piece in tokenizer.decode_stream(new_ids, after=ids):
                say(piece)
            say("\n")


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        prompt = given
    elif given is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one, as in flaxgpt generate "Once upon a time"')
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
