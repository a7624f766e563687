"""`flaxgpt generate`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Annotated, Literal

import jax
import tyro

import flaxgpt
from flaxgpt._checks import check_sampling, check_size
from flaxgpt.cli.common import load_with_tokenizer, say
from flaxgpt.cli.hook_options import HookOptions
from flaxgpt.cli.streams import check_text, read_prompt
from flaxgpt.config import GPTConfig
from flaxgpt.generation.beam_options import BeamOptions
from flaxgpt.generation.drafting import Draft
from flaxgpt.generation.prompts import bucket
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.typing import Params


@dataclasses.dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt, and print the text as it is generated.

    Examples:
      flaxgpt generate "Once upon a time"
      flaxgpt generate "Hello, I am" --model book --temperature 0 --max-new-tokens 6
      flaxgpt generate "The king" --temperature 0 --beams 4
      flaxgpt generate "Do you like it? " --match "(Yes|No), [a-z ]{5,40}[.]"
    """

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """Text to continue; read from standard input if omitted or "-"."""

    model: str = "tales"
    """"tales" (a small model in the package), "book" (the book's untrained 124M model, seed 123), a
    folder, a run of flaxgpt train, a safetensors file or a hub id."""

    max_new_tokens: int = 100
    """Maximum number of tokens to generate."""

    temperature: float = 0.8
    """0 for greedy decoding; higher values give more varied text."""

    top_k: int | None = None
    """Sample only from this many of the most likely tokens."""

    top_p: float | None = None
    """Sample only from the most likely tokens whose probabilities add up to this value."""

    beams: int = 1
    """Beam search with this many beams, printed when it is done; requires --temperature 0."""

    length_penalty: float = 1.0
    """With --beams: above 0 favors longer texts, 0 and below shorter ones."""

    lookup: int | None = None
    """Draft this many tokens per step from earlier text, such as 8; faster if the text repeats."""

    draft: str | None = None
    """A small model with the same tokenizer that drafts 4 tokens per step, named as in --model."""

    seed: int = 0
    """Random seed; the same seed gives the same text on the same machine."""

    n: int = 1
    """Number of continuations, printed with an empty line between them."""

    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Token that ends the text, as text or id (repeatable); by default, those of the model."""

    stop_text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text that ends the new text and is left out; $'\\n\\n' is an empty line in bash."""

    include_stop: bool = False
    """Print the --stop-text that ended the text too."""

    window_step: int = 1
    """Past the context, the number of tokens per reading of the last ones; higher is faster."""

    hooks: Annotated[HookOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=HookOptions
    )

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation."""

    int8: bool = False
    """Round the weights to int8: a quarter of the memory, and faster on CPU, but less exact."""

    echo: bool = True
    """Print the prompt before its continuation."""

    def run(self) -> None:
        """Print the continuations; options are checked before the model is loaded."""
        check_size("--max-new-tokens", self.max_new_tokens)
        check_size("--n", self.n)
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_size("--beams", self.beams)
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"--beams {self.beams} searches for the most likely text, and does not sample: add "
                "--temperature 0"
            )
        options = BeamOptions(self.beams, self.length_penalty)
        options.check_sampling(self.temperature, self.top_k, self.top_p)
        self.hooks.check(self.temperature, self.max_new_tokens)
        check_size("--window-step", self.window_step)
        if self.beams > 1:
            self.hooks.refuse_with("--beams")
            if self.window_step > 1:
                raise ValueError("--window-step does not work with --beams: leave one of them out")
        self._check_drafts()
        stop = self._stop_strings()
        if stop:
            self.hooks.refuse_with("--stop-text", ["match"])
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} must be from 0 to {2**32 - 1}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"--n {self.n} at --temperature 0 would print the same text {self.n} times: "
                "set a --temperature such as 0.8"
            )
        prompt = self.prompt
        if prompt is None and sys.stdin.isatty():
            raise ValueError('no prompt: give one, as in flaxgpt generate "Once upon a time"')
        if prompt is None or prompt == "-":
            prompt = read_prompt()
        prompt = check_text("the prompt", prompt)
        if not prompt:
            raise ValueError("the prompt is empty: give at least one character to continue from")

        cfg, params, tokenizer = load_with_tokenizer(self.model, int8=self.int8)
        draft = self._load_draft(tokenizer, prompt)
        stop_ids = _stop_ids(cfg, tokenizer, self.stop)
        key = jax.random.key(self.seed)
        prefix = self._prefix(cfg, params, tokenizer, prompt)
        for i in range(self.n):
            pieces: Iterable[str]
            if self.beams > 1:
                pieces = flaxgpt.generate_text(
                    cfg,
                    params,
                    tokenizer,
                    [prompt],
                    self.max_new_tokens,
                    stop_ids=stop_ids,
                    beams=self.beams,
                    length_penalty=self.length_penalty,
                    dtype=self.dtype,
                )
            else:
                pieces = flaxgpt.stream_text(
                    cfg,
                    params,
                    tokenizer,
                    prompt,
                    self.max_new_tokens,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    key=jax.random.fold_in(key, i)[None],  # the key of row i in `generate`
                    stop_ids=stop_ids,
                    logits_fn=self.hooks.logits_fn(self.temperature),
                    min_new_tokens=self.hooks.min_new_tokens,
                    match=self.hooks.pattern,
                    stop=stop,
                    include_stop=self.include_stop,
                    lookup=self.lookup,
                    draft=draft,
                    window_step=self.window_step,
                    prefix=prefix,
                    dtype=self.dtype,
                )
            say(("\n" if i else "") + (prompt if self.echo else ""))
            for piece in pieces:
                say(piece)
            say("\n")

    def _load_draft(self, tokenizer: Tokenizer, prompt: str) -> Draft | None:
        if self.draft is None:
            return None
        cfg, params, own = load_with_tokenizer(self.draft, int8=self.int8)
        if own.encode(prompt) != tokenizer.encode(prompt):
            raise ValueError(
                f"--draft {self.draft} splits the prompt into other tokens than --model "
                f"{self.model}: use a model with the same tokenizer"
            )
        return cfg, params

    def _check_drafts(self) -> None:
        if self.lookup is not None:
            check_size("--lookup", self.lookup)
        names = [name for name in ("lookup", "draft") if getattr(self, name) is not None]
        if len(names) == 2:
            raise ValueError("--lookup and --draft both draft tokens: leave one of them out")
        if names and self.beams > 1:
            raise ValueError(f"--{names[0]} does not work with --beams: leave one of them out")

    def _prefix(
        self, cfg: GPTConfig, params: Params, tokenizer: Tokenizer, prompt: str
    ) -> flaxgpt.Prefix | None:
        """Return the prompt, read once for all continuations, or None if that saves nothing."""
        ids = tokenizer.encode(prompt)
        fewest = bucket(1)  # ids that each continuation reads anyway
        if self.n == 1 or not fewest < len(ids) <= cfg.context_length:
            return None
        return flaxgpt.prefill(cfg, params, ids, dtype=self.dtype)

    def _stop_strings(self) -> list[str]:
        stop = [check_text("--stop-text", text) for text in self.stop_text]
        if "" in stop:
            raise ValueError(
                "--stop-text '' is empty: give at least one character, or leave it out"
            )
        if stop and self.beams > 1:
            raise ValueError("--stop-text does not work with --beams: leave one of them out")
        if self.include_stop and not stop:
            raise ValueError(
                "--include-stop has no effect without --stop-text: add one, or leave it out"
            )
        return stop


def _stop_ids(cfg: GPTConfig, tokenizer: Tokenizer, stops: tuple[str, ...]) -> list[int]:
    if not stops:
        # A tokenizer may have tokens that the model does not have.
        return [token for token in tokenizer.stop_ids if token < cfg.vocab_size]
    ids = []
    for stop in stops:
        tokens = [int(stop)] if stop.isdecimal() else tokenizer.encode(stop, allowed_special="all")
        if len(tokens) != 1:
            raise ValueError(
                f"--stop {stop!r} is {len(tokens)} tokens ({tokens}): give a single token, or use "
                "--stop-text, which takes any text"
            )
        ids += tokens
    return ids
