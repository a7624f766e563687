"""What `generate` is asked to capture and to patch, checked, and the values it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from flaxgpt.config import GPTConfig
from flaxgpt.generation.recording import is_weights
from flaxgpt.model.intermediates import Intervention, check_patches, selected_places
from flaxgpt.platform import Platform

_MOST_BYTES = 2**32  # that the loop may record


@dataclasses.dataclass(frozen=True, eq=False)
class ObservedIds:
    """The new ids of a row, and intermediate values of the model while it chose them.

    Attributes:
        ids: the new ids.
        activations: by name, the values at every position that the model read: those of prompt and
            new ids without the last one. Up to rounding, they are what `flaxgpt.activations`
            returns for these ids, without the batch axis: [T, D], [N, T, H], attention weights
            [N, T, T], logits [T, V].
    """

    ids: list[int]
    activations: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Watch:
    """The intermediate values to record and to replace while ids are generated.

    Attributes:
        names: the intermediate that each name to record stands for; None to record nothing.
        patches: by intermediate, the function to apply, as a pytree of what it binds.
    """

    names: Mapping[str, str] | None = None
    patches: Mapping[str, Partial] = dataclasses.field(default_factory=dict)

    @property
    def places(self) -> tuple[str, ...]:
        """The intermediates to record."""
        return tuple(sorted(set((self.names or {}).values())))

    def platform(self, platform: Platform) -> Platform:
        """Return a platform's choices with which intermediate values can be watched."""
        if not self.places and not self.patches:
            return platform
        return dataclasses.replace(platform, fused_qkv=False, least_rows=())

    def check_length(self, longest: int, max_new_tokens: int, context_length: int) -> None:
        """Raise ValueError if values are recorded, but no single pass would read all ids."""
        if self.names is not None and longest + max_new_tokens > context_length + 1:
            raise ValueError(
                f"capture needs texts within the context: a prompt of {longest} ids and "
                f"max_new_tokens={max_new_tokens} exceed context_length={context_length}, beyond "
                "which the window moves and the values of an id change: set max_new_tokens to at "
                f"most {context_length + 1 - longest}"
                if longest <= context_length
                else f"capture needs prompts within the context: {longest} ids exceed "
                f"context_length={context_length}, so crop the prompts first"
            )

    def size(self, cfg: GPTConfig, rows: int, slots: int, dtype: Any) -> int:
        """Return the bytes that the values to record take."""
        return sum(_bytes(cfg, place, rows, slots, dtype) for place in self.places)

    def check_size(self, cfg: GPTConfig, rows: int, slots: int, dtype: Any) -> None:
        """Raise ValueError if the values to record are too large."""
        needed = self.size(cfg, rows, slots, dtype)
        if needed > _MOST_BYTES:
            raise ValueError(
                f"capture needs {needed / 2**30:.1f} GiB for {rows} rows of up to {slots} ids, "
                f"more than the limit of {_MOST_BYTES // 2**30} GiB: capture fewer names (such as "
                "those of one block), or generate fewer rows or ids per call"
            )

    def rows(
        self, rows: list[list[int]], seen: Mapping[str, Any], start: Sequence[int], first: int
    ) -> list[ObservedIds]:
        """Return the rows with what was recorded of them.

        Args:
            rows: the new ids of each row.
            seen: the record of the loop, by intermediate.
            start: the column in which each row begins.
            first: the column of the first new id.
        """
        spans = [slice(s, first + len(ids) - 1) for s, ids in zip(start, rows, strict=False)]
        found: list[dict[str, np.ndarray]] = [{} for _ in rows]
        for place, buffer in seen.items():
            whole = np.asarray(buffer)
            for i, span in enumerate(spans):
                value = whole[i, ..., span, :]
                found[i][place] = (value[..., span] if is_weights(place) else value).copy()
        names = (self.names or {}).items()
        return [
            ObservedIds(ids, {name: values[place] for name, place in names})
            for ids, values in zip(rows, found, strict=True)
        ]


def check_watch(
    cfg: GPTConfig,
    capture: Iterable[str] | None,
    patches: Mapping[str, Intervention] | None,
    *,
    return_logprobs: bool = False,
    window_step: int = 1,
) -> Watch:
    """Return what to record and to replace, or raise ValueError."""
    names = None
    if capture is not None:
        if return_logprobs:
            raise ValueError(
                'return_logprobs does not work with capture: capture "logits", whose '
                "`jax.nn.log_softmax` has the log-probabilities"
            )
        if window_step != 1:
            raise ValueError(
                "window_step does not work with capture, which needs texts within the context: "
                "leave it out"
            )
        names = selected_places(cfg, "capture", capture)
    functions = {} if patches is None else check_patches(cfg, patches)
    return Watch(names, {name: _as_partial(name, f) for name, f in functions.items()})


def _as_partial(name: str, function: Any) -> Partial:
    patch = function if isinstance(function, Partial) else Partial(function)
    try:
        hash(patch.func)
    except TypeError as error:
        raise ValueError(
            f"the patch of {name} is a {type(patch.func).__name__}, which has no hash: use a "
            "function, or bind its arrays with jax.tree_util.Partial(function, array)"
        ) from error
    return patch


def _bytes(cfg: GPTConfig, place: str, rows: int, slots: int, dtype: Any) -> int:
    """Return the bytes that the record of an intermediate takes."""
    size = jnp.dtype(dtype).itemsize
    match place.rpartition("/")[2]:
        case "weights":
            return 4 * rows * cfg.n_heads * slots * slots
        case "logits":
            return 4 * rows * slots * cfg.vocab_size
        case "wide" | "active":
            return size * rows * slots * cfg.ff_dim
    return size * rows * slots * cfg.emb_dim
