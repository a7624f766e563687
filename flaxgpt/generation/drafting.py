"""Where drafts come from: the options, checked, and what the programs make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, NamedTuple

import jax

from flaxgpt._checks import check_params, check_size, value_errors
from flaxgpt.config import GPTConfig
from flaxgpt.generation import speculative_programs as programs
from flaxgpt.generation.decoding import Request
from flaxgpt.generation.loop_params import loop_params
from flaxgpt.generation.programs import Program
from flaxgpt.generation.prompts import Prepared
from flaxgpt.generation.speculation import Counts
from flaxgpt.generation.speculative_programs import SpeculativeProgram
from flaxgpt.model import param_shapes
from flaxgpt.sharding import mesh_of, to_automatic
from flaxgpt.typing import Params

Draft = tuple[GPTConfig, Params]
"""A small model that drafts ids for a large one: its configuration and parameters."""

_DRAFT_LENGTH = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Drafting:
    """Whether ids are drafted, and how. Validates itself.

    Attributes:
        lookup: ids to draft from earlier text; None for none.
        draft: a small model that drafts ids; None for none.
        draft_length: how many it drafts.

    Raises:
        ValueError: a value is out of range, or both kinds of drafts are asked for.
    """

    lookup: int | None = None
    draft: Draft | None = None
    draft_length: int = _DRAFT_LENGTH

    def __post_init__(self) -> None:
        if self.lookup is not None:
            object.__setattr__(self, "lookup", check_size("lookup", self.lookup))
        object.__setattr__(self, "draft_length", check_size("draft_length", self.draft_length))
        if self.draft is None:
            if self.draft_length != _DRAFT_LENGTH:
                raise ValueError(
                    f"draft_length={self.draft_length} has no effect without a draft model: set "
                    "draft, or use lookup"
                )
            return
        if self.lookup is not None:
            raise ValueError(
                f"lookup={self.lookup} and draft are two sources of drafts: leave one of them out"
            )
        pair = self.draft
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], GPTConfig)):
            raise ValueError(
                "draft must be the configuration and the parameters of a model, as in "
                f'draft=flaxgpt.load("tales")[:2], got {type(pair).__name__}'
            )

    @property
    def is_on(self) -> bool:
        """Whether ids are drafted."""
        return self.lookup is not None or self.draft is not None

    @property
    def size(self) -> int:
        """Ids in a draft."""
        return self.draft_length if self.lookup is None else self.lookup

    def add_to(self, prepared: Prepared) -> Speculative:
        """Return the arguments of a program with drafts, or raise ValueError."""
        program, params, request, ids, start = prepared
        for option, value in (("capture", program.capture), ("patches", request.patches)):
            if value:
                raise ValueError(
                    f"{option} does not work with drafts, because the model also reads drafted ids "
                    f"that are rejected: leave out {option}, or lookup and draft"
                )
        name = "draft_length" if self.lookup is None else "lookup"
        if self.size >= program.cfg.context_length:
            raise ValueError(
                f"{name}={self.size} must be below context_length={program.cfg.context_length}; 4 "
                "to 10 ids are usual"
            )
        cfg = draft_params = None
        if self.draft is not None:
            cfg, draft_params = self.draft
            if self.size > cfg.context_length:
                raise ValueError(
                    f"draft_length={self.size} exceeds context_length={cfg.context_length} of the "
                    "draft model: 4 to 10 ids are usual"
                )
            draft_params = _placed(program, devices_of(params), cfg, draft_params)
        speculative = SpeculativeProgram(program, self.size, cfg)
        return Speculative(speculative, params, draft_params, request, ids, start)


def _placed(program: Program, devices: Any, cfg: GPTConfig, params: Params) -> Params:
    """Return the parameters of a small model as the loop reads them, or raise ValueError."""
    if cfg.vocab_size != program.cfg.vocab_size:
        raise ValueError(
            f"the draft model has vocab_size={cfg.vocab_size}, but the model has "
            f"{program.cfg.vocab_size}: use one with the same tokenizer"
        )
    with value_errors("the draft model"):
        check_params(param_shapes(cfg), params)
    params = to_automatic(params)
    if mesh_of(params) != program.mesh or devices_of(params) != devices:
        raise ValueError(
            "the draft model must be on the devices of the model: place it with jax.device_put, or "
            "with flaxgpt.shard on the same mesh"
        )
    return loop_params(program.platform, program.dtype, params)


def devices_of(params: Params) -> Any:
    """Return the devices of the first array, or None for arrays on the host."""
    leaf = jax.tree.leaves(params)[0]
    return leaf.devices() if isinstance(leaf, jax.Array) else None


class Speculative(NamedTuple):
    """The arguments of a program in `flaxgpt.generation.speculative_programs`."""

    program: SpeculativeProgram
    params: Params
    draft_params: Params | None
    request: Request
    ids: Any  # int32 [B, prompt_width], padded on the left
    start: Any  # int32 [B]

    def decode(self) -> tuple[Any, Counts]:
        """Run the loop and return its result, and what its steps were."""
        options = self.program.program.platform.decode_options
        return programs.compiled_decode(options)(*self)

    def steps(self) -> Generator[list[list[int]], None, Any]:
        """Yield the new ids of each row, one step at a time, within the context.

        Returns the `DecodeState` from which the plain steps continue, or None if there are none.
        """
        program, params, draft_params, request, _, _ = self
        state, step = programs.prefill(*self)
        request = dataclasses.replace(request, prefix=None, unread=None)  # read by now
        while True:
            new, gained, has_draft, is_unfinished = jax.device_get(step)
            yield [row[:count].tolist() for row, count in zip(new, gained, strict=True)]
            if not is_unfinished:
                is_last = request.final_length <= program.program.plan.context_length + 1
                return None if is_last else programs.without_drafts(program, request, state)
            advance = programs.verifying_step if has_draft else programs.plain_step
            state, step = advance(program, params, draft_params, request, state)
