"""The options of `flaxgpt generate` that change which tokens are chosen, through hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flaxgpt._checks import check_positive, check_size
from flaxgpt.cli.streams import check_text
from flaxgpt.generation import hooks
from flaxgpt.generation.grammar.regex import byte_automaton
from flaxgpt.generation.hooks import LogitsFn


@dataclasses.dataclass(frozen=True)
class HookOptions:
    """Which tokens may follow a text; see `flaxgpt.generation.hooks`."""

    match: str | None = None
    """Regular expression that the whole new text matches, such as '(yes|no), [0-9]{1,3}'."""

    min_p: float | None = None
    """Sample only from tokens that have at least this share of the highest probability."""

    repetition_penalty: float | None = None
    """Above 1 makes tokens less likely that the text has already; typically 1.1 to 1.3."""

    no_repeat_ngram: int | None = None
    """Never repeat a sequence of this many tokens."""

    min_new_tokens: int = 0
    """Number of tokens before which no stop token is chosen."""

    @property
    def pattern(self) -> str | None:
        """The regular expression, or None."""
        return None if self.match is None else check_text("--match", self.match)

    def check(self, temperature: float, max_new_tokens: int) -> None:
        """Raise ValueError if a value is out of range or has no effect."""
        if self.pattern is not None:
            byte_automaton(self.pattern)
        if self.min_p is not None:
            if not 0 < self.min_p <= 1:
                raise ValueError(f"--min-p {self.min_p} must be above 0 and at most 1")
            if temperature == 0:
                raise ValueError(
                    "--min-p has no effect at --temperature 0, which chooses the most likely "
                    "token: set a --temperature such as 0.8, or leave --min-p out"
                )
        if self.repetition_penalty is not None:
            check_positive("--repetition-penalty", self.repetition_penalty)
        if self.no_repeat_ngram is not None:
            check_size("--no-repeat-ngram", self.no_repeat_ngram)
        if check_size("--min-new-tokens", self.min_new_tokens, least=0) > max_new_tokens:
            raise ValueError(
                f"--min-new-tokens {self.min_new_tokens} exceeds --max-new-tokens {max_new_tokens}"
            )
        if self.min_new_tokens and self.match is not None:
            raise ValueError(
                "--min-new-tokens does not work with --match: leave it out, and write the least "
                "length into the pattern, as in .{20,}"
            )

    def refuse_with(self, flag: str, names: Sequence[str] = ()) -> None:
        """Raise ValueError if one of these options is set, by default any, beside another one."""
        for field in dataclasses.fields(self):
            is_set = getattr(self, field.name) != field.default
            if is_set and (not names or field.name in names):
                name = field.name.replace("_", "-")
                raise ValueError(f"--{name} does not work with {flag}: leave one of them out")

    def logits_fn(self, temperature: float) -> LogitsFn | None:
        """Return the hook for the options that are set, or None."""
        chosen = []
        if self.repetition_penalty is not None:
            chosen.append(hooks.penalize_repetition(self.repetition_penalty))
        if self.no_repeat_ngram is not None:
            chosen.append(hooks.no_repeat_ngram(self.no_repeat_ngram))
        if self.min_p is not None:
            chosen.append(hooks.min_p(self.min_p, temperature))
        return hooks.chain(*chosen) if chosen else None
