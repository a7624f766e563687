"""Functions that change logits before an id is chosen, for `generate(..., logits_fn=)`.

A hook is a pure function `logits_fn(ids, length, logits) -> logits` of the text so far:

    ids      int32 [B, W], the prompt and new ids of each row, then -1
    length   int32 [B], ids in each row
    logits   float32 [B, V], those of the next id, before temperature; -inf for ids not `allowed`

It is traced into the decoding loop. The functions here make hooks as `jax.tree_util.Partial`, so
other values of the same kind compile nothing new. `chain` applies several in order.

>>> import jax.numpy as jnp
>>> hook = chain(ban([2]), penalize_repetition(2.0))
>>> ids, length = jnp.array([[0, 1, -1]]), jnp.array([2])
>>> hook(ids, length, jnp.array([[4.0, -1.0, 3.0, 1.0]])).tolist()
[[2.0, -2.0, -inf, 1.0]]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from flaxgpt._checks import check_allowed, check_size, check_stop_ids
from flaxgpt.generation.sampling import as_partial, highest_cut, mask, ordered

LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`logits_fn(ids, length, logits) -> logits`; see the module."""


def chain(*hooks: LogitsFn) -> Partial:
    """Return the hook that applies all of these, the first one first."""
    return Partial(_chain, tuple(as_partial(hook) for hook in hooks))


def _chain(hooks: tuple[Partial, ...], ids: Any, length: Any, logits: jax.Array) -> jax.Array:
    for hook in hooks:
        logits = hook(ids, length, logits)
    return logits


def within(limit: LogitsFn, hook: LogitsFn) -> Partial:
    """Return a hook that applies `hook` to what `limit` leaves: ids it excludes stay excluded.

    In `chain`, a filter such as `min_p` may keep only ids that a later hook excludes.
    """
    return Partial(_within, as_partial(limit), as_partial(hook))


def _within(limit: Partial, hook: Partial, ids: Any, length: Any, logits: jax.Array) -> jax.Array:
    limited = limit(ids, length, logits)
    changed = hook(ids, length, limited)
    if getattr(changed, "shape", None) != limited.shape:
        return changed  # which the loop refuses
    return jnp.where(limited == -jnp.inf, -jnp.inf, changed)


def penalize_repetition(penalty: float) -> Partial:
    """Make ids less likely that the row has already: logits over `penalty`, times it if negative.

    From Keskar et al. 2019 (CTRL), section 4.1, as Hugging Face's `repetition_penalty`.

    Args:
        penalty: above 0; 1 changes nothing, and less than 1 favors repetition.

    Raises:
        ValueError: the penalty is out of range.
    """
    return Partial(_penalize_repetition, np.float32(_positive("penalty", penalty)))


def _penalize_repetition(
    penalty: jax.Array, ids: jax.Array, length: jax.Array, logits: jax.Array
) -> jax.Array:
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(_present(ids, logits.shape), changed, logits)


def _present(ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a mask of the ids that occur in each row, bool [B, V]."""
    rows = jnp.arange(shape[0])[:, None]
    # A scatter counts negative indices from the end, so they are moved out of range first.
    places = jnp.where(ids < 0, shape[1], ids)
    return jnp.zeros(shape, bool).at[rows, places].set(True, mode="drop")


def no_repeat_ngram(size: int) -> Partial:
    """Never choose an id that would repeat `size` ids in a row, as in Paulus et al. 2017.

    Hugging Face's `no_repeat_ngram_size`. The prompt counts too.

    Args:
        size: ids in a sequence, 1 or more.

    Raises:
        ValueError: the size is out of range.
    """
    return Partial(_NoRepeat(check_size("size", size)))


@dataclasses.dataclass(frozen=True)
class _NoRepeat:
    """The hook for one size, on which shapes depend. Equal for equal sizes, so it compiles once."""

    size: int

    def __call__(self, ids: jax.Array, length: jax.Array, logits: jax.Array) -> jax.Array:
        before = self.size - 1  # ids that must match the latest ones
        places = max(0, ids.shape[1] - before)  # where a sequence can begin
        starts = jnp.arange(places)[None]
        matches = starts + before < length[:, None]
        for k in range(before):
            at = jnp.maximum(length - before + k, 0)[:, None]
            latest = jnp.take_along_axis(ids, at, axis=1)
            matches &= ids[:, k : k + places] == latest
        follows = jnp.where(matches, ids[:, before : before + places], -1)
        return jnp.where(_present(follows, logits.shape), -jnp.inf, logits)


def ban(ids: Sequence[int]) -> Partial:
    """Never choose these ids. One outside the vocabulary makes the logits NaN.

    Raises:
        ValueError: `ids` is empty or has something else than ids.
    """
    banned = check_stop_ids(ids)
    if not banned:
        raise ValueError("ids must have one or more ids to ban")
    return Partial(_ban, np.array(banned, np.int32))


def _ban(banned: jax.Array, ids: Any, length: Any, logits: jax.Array) -> jax.Array:
    return _at(logits, banned).set(-jnp.inf, mode="drop")


def bias(values: Mapping[int, float]) -> Partial:
    """Add a number to the logits of some ids. One outside the vocabulary makes the logits NaN.

    Raises:
        ValueError: a key is no id, or a value is not finite.
    """
    ids = check_stop_ids(list(values))
    if not ids:
        raise ValueError("values must have one or more ids, as in {50256: -2.0}")
    added = np.array([values[key] for key in values], np.float32)
    if not np.isfinite(added).all():
        raise ValueError(f"values={dict(values)} must be finite; to exclude an id, use ban")
    return Partial(_bias, np.array(ids, np.int32), added)


def _bias(
    biased: jax.Array, added: jax.Array, ids: Any, length: Any, logits: jax.Array
) -> jax.Array:
    return _at(logits, biased).add(added[None], mode="drop")


def _at(logits: jax.Array, ids: jax.Array) -> Any:
    """Return an update of the logits of some ids; all are NaN if one is outside the vocabulary."""
    known = (ids < logits.shape[1]).all()
    return jnp.where(known, logits, jnp.nan).at[:, ids]


def allow(allowed: ArrayLike) -> Partial:
    """Choose among these ids only.

    Args:
        allowed: bool [V], at least one of them true.

    Raises:
        ValueError: it is not such an array.
    """
    return Partial(_allow, np.asarray(check_allowed(allowed)))


def _allow(allowed: jax.Array, ids: Any, length: Any, logits: jax.Array) -> jax.Array:
    return mask(logits, allowed)


def least_length(lengths: ArrayLike, stop_ids: Sequence[int]) -> Partial:
    """Never choose a stop id in a row that has fewer ids than this, prompt included.

    `generate(..., min_new_tokens=)` does the same with lengths counted from each prompt.

    Args:
        lengths: int [] or [B].
        stop_ids: the ids that end a row.

    Raises:
        ValueError: `stop_ids` is empty or has something else than ids.
    """
    return Partial(_least_length, np.asarray(lengths, np.int32), ban(stop_ids))


def _least_length(
    lengths: jax.Array, end: Partial, ids: jax.Array, length: jax.Array, logits: jax.Array
) -> jax.Array:
    return jnp.where((length < lengths)[:, None], end(ids, length, logits), logits)


def min_p(share: float, temperature: float = 1.0) -> Partial:
    """Keep ids that are at least this share as likely as the most likely one.

    Nguyen et al. 2024, as Hugging Face's `min_p`, which applies it after temperature.

    Args:
        share: above 0, at most 1.
        temperature: that of sampling.

    Raises:
        ValueError: an argument is out of range.
    """
    share = _share("share", share)
    cut = math.log(share) * _positive("temperature", temperature)
    return Partial(_min_p, np.float32(cut))


def _min_p(cut: jax.Array, ids: Any, length: Any, logits: jax.Array) -> jax.Array:
    best = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits >= best + cut, logits, -jnp.inf)


def typical(mass: float, temperature: float = 1.0) -> Partial:
    """Keep the ids whose information is closest to the entropy, up to this probability.

    Locally typical sampling (Meister et al. 2022), as Hugging Face's `typical_p`.

    Args:
        mass: above 0, at most 1.
        temperature: that of sampling.

    Raises:
        ValueError: an argument is out of range.
    """
    mass, temperature = _share("mass", mass), _positive("temperature", temperature)
    return Partial(_typical, np.float32(mass), np.float32(temperature))


def _typical(
    mass: jax.Array, temperature: jax.Array, ids: Any, length: Any, logits: jax.Array
) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits / temperature)
    probs = jnp.exp(log_probs)
    entropy = -jnp.where(probs > 0, probs * log_probs, 0.0).sum(axis=-1, keepdims=True)
    rank = ordered(-jnp.abs(-log_probs - entropy))

    def reaches(cut: jax.Array) -> jax.Array:
        return jnp.where(rank >= cut, probs, 0.0).sum(axis=-1, keepdims=True) >= mass

    cut = highest_cut(reaches, rank, skip=mass >= 1)
    return jnp.where(rank >= cut, logits, -jnp.inf)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a finite number above 0")
    return float(value)


def _share(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r} must be above 0 and at most 1")
    return float(value)
