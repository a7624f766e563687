"""From logits and keys to ids: greedy, temperature, top-k, top-p. Knows no model.

Temperature, k and p are traced, so changing them compiles nothing. `lax.top_k` needs a static k,
and a full sort of GPT-2's vocabulary takes half as long as a decoding step on CPU (11 ms per row
against 20 ms). So the cutoff is found by bisection over the bit patterns of the logits: at most 32
passes over the row, 1 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from flaxgpt._checks import check_allowed, check_sampling, check_size, check_stop_ids
from flaxgpt.generation.grammar import Grammar

# Devices read smaller numbers as 0, which every sum of probabilities would reach.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Any larger temperature makes all ids equally likely too, but the quotients, read as 0, would lose
# the order that top-k needs.
_HOTTEST = 1e20
NOT_A_NUMBER = -1  # stands for the id of a row whose logits hold NaN


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How new ids are chosen, and what ends a row. Validates itself.

    Attributes:
        temperature: 0 chooses the most likely id; otherwise logits are divided by it before
            sampling.
        top_k: sample from the k most likely ids only; None for all.
        top_p: sample from the most likely ids that together reach this probability; None for all.
        key: a JAX random key, from which row i uses `fold_in(key, i)`, or one key per row. Each id
            folds in the number of ids chosen before it. Required if temperature > 0.
        stop_ids: ids that end a row.
        allowed: bool [V], ids that may be chosen; None for all. Top-k and top-p count only these.
        logits_fn: a function that changes logits first; see `flaxgpt.generation.hooks`.
        min_new_tokens: new ids before which no stop id is chosen.
        match: the grammar of the new ids, whose stop ids are those of the rows.

    Raises:
        ValueError: a value is out of range, or sampling has no key.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    key: jax.Array | None = None
    stop_ids: Sequence[int] = ()
    allowed: ArrayLike | None = None
    logits_fn: Any = None
    min_new_tokens: int = 0
    match: Grammar | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        object.__setattr__(self, "stop_ids", check_stop_ids(self.stop_ids))
        if self.allowed is not None:
            object.__setattr__(self, "allowed", check_allowed(self.allowed))
        if self.min_new_tokens != 0:
            least = check_size("min_new_tokens", self.min_new_tokens)
            object.__setattr__(self, "min_new_tokens", least)
        if self.logits_fn is not None:
            object.__setattr__(self, "logits_fn", as_partial(self.logits_fn))
        if self.match is not None:
            object.__setattr__(self, "stop_ids", self._stop_ids_of_match())
        key = self.key
        if key is None:
            if self.temperature > 0:
                raise ValueError(
                    f"temperature={self.temperature} samples at random and needs a key, such as "
                    "key=jax.random.key(0); temperature=0 needs none"
                )
        elif not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
            try:
                typed = jax.random.wrap_key_data(jnp.asarray(key))  # from jax.random.PRNGKey
            except TypeError as error:
                raise ValueError(
                    f"key={key!r} must be a JAX random key, such as jax.random.key(0)"
                ) from error
            object.__setattr__(self, "key", typed)

    def _stop_ids_of_match(self) -> tuple[int, ...]:
        """Return the stop ids of `match`, or raise ValueError for what does not work with it."""
        match = check_grammar(self.match)
        if self.stop_ids and set(self.stop_ids) != set(match.stop_ids):
            raise ValueError(
                f"stop_ids={self.stop_ids} are not those of match, {match.stop_ids}: leave them "
                "out, or compile the grammar for them"
            )
        if self.allowed is not None:
            raise ValueError(
                "allowed does not work with match, whose ids it could exclude: leave it out, and "
                "write what is allowed into the pattern"
            )
        if self.min_new_tokens:
            raise ValueError(
                "min_new_tokens does not work with match: leave it out, and write the least length "
                "into the pattern, as in .{20,}"
            )
        return match.stop_ids

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if an option does not fit the vocabulary."""
        check_sampling(self.temperature, self.top_k, self.top_p, vocab_size)
        check_stop_ids(self.stop_ids, vocab_size)
        if self.allowed is not None:
            check_allowed(self.allowed, vocab_size)
        if self.match is not None and self.match.vocab_size != vocab_size:
            raise ValueError(
                f"match is a grammar for vocab_size={self.match.vocab_size}, but the model has "
                f"vocab_size={vocab_size}: compile it for the model"
            )


def check_grammar(match: Any) -> Grammar:
    """Return a grammar, or raise ValueError for anything else."""
    if not isinstance(match, Grammar):
        raise ValueError(
            f"match={match!r} must be a grammar: use flaxgpt.generation.compile_grammar, or "
            "generate_text, which takes a pattern"
        )
    return match


def as_partial(logits_fn: Any) -> Partial:
    """Return a hook as a pytree, whose arrays are traced and whose function is static."""
    if not callable(logits_fn):
        raise ValueError(
            f"logits_fn={logits_fn!r} must be a function of (ids, length, logits), such as "
            "flaxgpt.generation.hooks.penalize_repetition(1.2)"
        )
    return logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)


def mask(logits: jax.Array, allowed: ArrayLike | None) -> jax.Array:
    """Return logits [B, V] with -inf for ids that are not allowed; NaN stays, to be found."""
    if allowed is None:
        return logits
    return jnp.where(jnp.isnan(logits) | jnp.asarray(allowed)[None], logits, -jnp.inf)


def sample(
    logits: jax.Array,  # float32 [B, V]
    keys: jax.Array,  # [B], consumed here
    temperature: jax.Array,  # float32 []; 0 is greedy and ignores the rest
    top_k: jax.Array,  # int32 [], see `keep_likely`
    top_p: jax.Array,  # float32 []
) -> jax.Array:  # int32 [B]
    """Choose one id per row: the most likely one at temperature 0, otherwise at random.

    Of equally likely ids, the lowest is chosen at temperature 0. Rows whose logits hold NaN get
    `NOT_A_NUMBER`.
    """

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def random() -> jax.Array:
        # Relative to the largest logit, which stays finite however small the temperature.
        relative = logits - logits.max(axis=-1, keepdims=True)
        relative /= jnp.clip(temperature, _TINY, _HOTTEST)
        kept = keep_likely(relative, top_k, top_p)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    ids = lax.cond(temperature > 0, random, greedy)
    return jnp.where(jnp.isnan(logits).any(axis=-1), NOT_A_NUMBER, ids)


def keep_likely(
    logits: jax.Array,  # float32 [B, V], already divided by the temperature
    top_k: jax.Array,  # int32 []; V or more keeps all
    top_p: jax.Array,  # float32 []; 1 or more keeps all
) -> jax.Array:  # float32 [B, V]
    """Return the logits with unlikely ones set to -inf: first top-k, then top-p of the rest.

    Top-k keeps the k-th largest logit and all that are not below it. Top-p keeps an id if the more
    likely ids have less than this probability together, so the most likely id always stays. Order
    and meaning are those of Hugging Face's `TopKLogitsWarper` and `TopPLogitsWarper`, except that
    equal logits are kept or dropped together (there, top-p splits them in sorting order).
    """
    rank = ordered(logits)

    def reaches_k(cut: jax.Array) -> jax.Array:
        return (rank >= cut).sum(axis=-1, keepdims=True) >= top_k

    lowest = highest_cut(reaches_k, rank, skip=top_k >= logits.shape[-1])
    kept = jnp.where(rank >= lowest, logits, -jnp.inf)
    probs = jax.nn.softmax(kept, axis=-1)

    def reaches_p(cut: jax.Array) -> jax.Array:
        reached = jnp.where(rank >= cut, probs, 0.0).sum(axis=-1, keepdims=True)
        return reached >= jnp.maximum(top_p, _TINY)

    return jnp.where(rank >= highest_cut(reaches_p, rank, skip=top_p >= 1), kept, -jnp.inf)


def ordered(x: jax.Array) -> jax.Array:
    """Return int32 that compare as the floats do (IEEE 754: flip the magnitude of negatives)."""
    x = jnp.where(x == 0, 0.0, x)  # -0.0 and 0.0 have different bits
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def highest_cut(
    holds: Callable[[jax.Array], jax.Array], rank: jax.Array, skip: jax.Array
) -> jax.Array:
    """Return the highest cutoff [B, 1] for which `holds`, by bisection over all int32.

    `holds` must be true for low cutoffs and false for high ones. `skip` returns the lowest int32.
    """
    shape = (*rank.shape[:-1], 1)
    info = jnp.iinfo(jnp.int32)
    low = jnp.full(shape, info.min, jnp.int32)
    high = jnp.where(skip, low, jnp.full(shape, info.max, jnp.int32))

    def middle(low: jax.Array, high: jax.Array) -> jax.Array:
        return (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow

    def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        cut = middle(low, high)
        true = holds(cut)
        return jnp.where(true, cut, low), jnp.where(true, high, cut)

    def is_open(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (middle(*bounds) > bounds[0]).any()

    return lax.while_loop(is_open, narrow, (low, high))[0]
