"""The options of beam search, checked, and what it finds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np

from flaxgpt._checks import check_finite, check_size
from flaxgpt.generation.beams import Finished, Rules
from flaxgpt.generation.decoding import Request
from flaxgpt.generation.prompts import check_number
from flaxgpt.generation.sampling import NOT_A_NUMBER, Sampling

EarlyStopping = bool | Literal["never"]
"""When beam search is done with a row; see `generate`."""


def refuse_with_beams(**options: Any) -> None:
    """Raise ValueError for an option that is set and does not work in beam search."""
    for name, value in options.items():
        if value is not None and value is not False and value != 0:
            raise ValueError(
                f"{name} does not work with beam search: leave it out, or set beams to 1"
            )


@dataclasses.dataclass(frozen=True)
class Beam:
    """A continuation that beam search found.

    Attributes:
        ids: the new ids, with the stop id if it ends with one.
        score: the sum of the log-probabilities of `ids` over `len(ids) ** length_penalty`.
    """

    ids: list[int]
    score: float


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """How beam search chooses ids. Validates itself.

    Attributes:
        beams: continuations of each row that are extended in parallel.
        length_penalty: the power of its length that a continuation's log-probability is divided by.
        early_stopping: when a row is done; see `generate`.
        return_beams: how many continuations of each row are returned; None for the ids of the best.

    Raises:
        ValueError: a value is out of range, or has no effect without beams.
    """

    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    return_beams: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beams", check_size("beams", self.beams))
        penalty = check_finite("length_penalty", self.length_penalty)
        object.__setattr__(self, "length_penalty", penalty)
        early = self.early_stopping
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise ValueError(f'early_stopping={early!r} must be False, True or "never"')
        if self.return_beams is not None:
            count = check_size("return_beams", self.return_beams)
            object.__setattr__(self, "return_beams", count)
            if count > self.beams:
                raise ValueError(
                    f"return_beams={count} exceeds beams={self.beams}: search with "
                    f"beams={count} or more"
                )
        elif self.beams == 1 and (penalty != 1.0 or early is not False):
            name = "length_penalty" if penalty != 1.0 else "early_stopping"
            raise ValueError(
                f"{name}={getattr(self, name)!r} has no effect without beam search: set beams to "
                "2 or more"
            )

    @property
    def is_search(self) -> bool:
        """Whether beam search is needed; one beam alone is greedy decoding."""
        return self.beams > 1 or self.return_beams is not None

    def check_sampling(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        """Raise ValueError if an option would sample while beam search is selected."""
        if not self.is_search:
            return
        if temperature != 0:
            raise ValueError(
                f"temperature={temperature} samples at random, but beam search "
                f"(beams={self.beams}) does not: set temperature to 0, or omit beams and "
                "return_beams"
            )
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ValueError(
                    f"{name}={value} is an option of sampling, but beam search "
                    f"(beams={self.beams}) compares all ids: omit it, or restrict the ids with "
                    "`allowed`"
                )

    def check_sizes(self, sampling: Sampling, vocab_size: int, max_new_tokens: int) -> None:
        """Raise ValueError if there are too many beams for the ids, or scores leave float32."""
        choices = vocab_size if sampling.allowed is None else int(np.sum(sampling.allowed))
        if self.beams > choices:
            raise ValueError(
                f"beams={self.beams} exceeds the {choices} ids that may be chosen: use at most "
                f"{choices} beams"
            )
        if abs(self.length_penalty) * math.log10(max(2, max_new_tokens)) > 30:
            raise ValueError(
                f"length_penalty={self.length_penalty} is out of range: "
                f"max_new_tokens={max_new_tokens} to that power must be from 1e-30 to 1e30 for "
                "scores in float32, so use a value closer to 0"
            )

    def rules(self) -> Rules:
        """Return the options that the loop takes as arrays."""
        looks_ahead = self.early_stopping == "never" and self.length_penalty > 0
        return Rules(
            length_penalty=np.float32(self.length_penalty),
            stop_when_full=np.bool_(self.early_stopping is True),
            look_ahead=np.bool_(looks_ahead),
        )

    def found(self, finished: Finished, request: Request) -> list[list[Beam]]:
        """Return the best beams of each row, or raise ValueError if its logits became NaN."""
        results = jax.tree.map(np.asarray, finished)
        rows = []
        for i, nan_at in enumerate(results.nan_at[: request.rows].tolist()):
            if nan_at >= 0:
                check_number(NOT_A_NUMBER, i, nan_at)
            new = results.ids[i, : self.return_beams or 1, request.prompt_length :].tolist()
            lengths, scores = results.lengths[i].tolist(), results.scores[i].tolist()
            rows.append([Beam(ids[: lengths[n]], scores[n]) for n, ids in enumerate(new)])
        return rows
