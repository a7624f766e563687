"""How likely a model finds ids: `score` in rows that fit the context, `measure` in a whole text.

`measure` lays windows of `context_length` ids over the text, each `stride` further than the last.
Of the first window every prediction counts, of the others only the last `stride`, so that each id
but the first is counted once, and seen to follow all ids before it or more than
`context_length - stride` of them. What is computed is a row for every `stride` predictions, which
is why the first window fills two rows here (context 4, stride 2):

    text      a b c d e f g h
    row 0     a b c d             predicts  b c
    row 1     a b c d                       d e
    row 2         c d e f                   f g
    row 3             e f g h               h, and one that is past the end and does not count

The output head, the largest product of a small model, sees those `stride` positions alone: of a
256-wide model of 6 layers and 4,096 ids, a batch takes 12 to 15 % less time on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, check_ids, check_params, check_size, check_vocabulary
from flaxgpt.cache import init_cache
from flaxgpt.config import GPTConfig
from flaxgpt.model.gpt import GPT, param_shapes
from flaxgpt.tokenizer import Tokenizer
from flaxgpt.typing import Params, Progress

# Numbers in the largest array of a batch. On a CPU 16 MiB: from 32 MiB on, glibc gets every array
# from the kernel anew, which costs the model above 20 to 30 % of its speed. Elsewhere 256 MiB.
_LARGEST_ON_CPU = 2**22
_LARGEST = 2**26


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `measure` found. A bit is ln 2 nats.

    Attributes:
        loss: mean of -ln p over the ids counted, in nats per token.
        tokens: ids counted, all but the first.
        bytes: UTF-8 bytes they stand for; None without a tokenizer.
        windows: windows laid over the text.
        stride: ids from one window to the next.
    """

    loss: float
    tokens: int
    bytes: int | None
    windows: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(loss): how many equally likely ids would be as hard to guess."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # e^710 is past float64

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, which tokenizers do not change; None without bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


def score(
    cfg: GPTConfig, params: Params, ids: ArrayLike, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns the log-probability of each id but the first, given the ids before it in its row.

    Pure, and transparent to `jit`, `grad` and `vmap`; it compiles itself when called outside of
    them. The book's loss (section 5.1) is `-score(...).mean()`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        ids: int [B, T], T from 2 to `cfg.context_length + 1`: the last id is only predicted.
        dtype: what is computed in: float32, bfloat16 or float16.

    Returns:
        float32 [B, T - 1], natural logarithms. Under `jit`, where ids cannot be looked at, one
        outside the vocabulary makes its own score NaN, and all of its row where others follow it.

    Raises:
        ValueError: rows of ids that are too short, too long, not integers or outside the
            vocabulary; params that do not fit the configuration.
    """
    check_params(param_shapes(cfg), params)
    checked = check_ids(cfg.vocab_size, ids)
    length = checked.shape[1]
    if length < 2:
        raise ValueError(
            "rows of 1 id have nothing to score, as the first is given: put an id before it, such "
            "as the tokenizer's end-of-text id"
        )
    if length > cfg.context_length + 1:
        raise ValueError(
            f"{length} ids a row exceed context_length + 1 = {cfg.context_length + 1}: `measure` "
            "takes texts of any length"
        )
    return _score(cfg, check_dtype(dtype), params, checked)


@partial(jax.jit, static_argnums=(0, 1))
def _score(cfg: GPTConfig, dtype: Any, params: Params, ids: jax.Array) -> jax.Array:
    return _log_probs(cfg, dtype, params, _states(cfg, dtype, params, ids[:, :-1]), ids[:, 1:])


def measure(
    cfg: GPTConfig,
    params: Params,
    ids: ArrayLike,
    *,
    stride: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    progress: Progress | None = None,
) -> Measurement:
    """Returns the loss of one text of any length, every id but the first predicted once.

    Compiles once for a configuration, stride, batch size and dtype, whatever the text's length.

    Args:
        cfg: the configuration.
        params: parameters of that configuration.
        ids: int [N], N at least 2; a `numpy.memmap` is read piece by piece.
        stride: ids from one window to the next, from 1 (each id sees all the context there can
            be, at `context_length` times the work) to `context_length` (windows side by side,
            whose first ids see little); half the context unless given.
        tokenizer: the one that made the ids, for bits per byte. Special tokens are not text: they
            count as tokens of no bytes.
        batch_size: rows computed together; as memory allows unless given. It does not change the
            result.
        dtype: what is computed in: float32, bfloat16 or float16. Sums are float64.
        progress: called with (ids counted, ids to count in all) after each batch.

    Returns:
        The loss, what follows from it, and what was counted.

    Raises:
        ValueError: a text of fewer than 2 ids, not of integers or not in the vocabulary of model
            and tokenizer; an argument out of its range; params that do not fit; a loss that is
            not finite.
    """
    check_params(param_shapes(cfg), params)
    context = cfg.context_length
    dtype = check_dtype(dtype)
    stride = max(1, context // 2) if stride is None else check_size("stride", stride)
    if stride > context:
        raise ValueError(f"stride={stride} exceeds context_length={context}: ids would be left out")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in [ids, *jax.tree.leaves(params)]):
        raise ValueError("measure runs on the host and not inside jit, grad or vmap: use `score`")
    text = _checked_text(cfg.vocab_size, ids)
    n_bytes = None if tokenizer is None else _count_bytes(tokenizer, text)

    # Row r counts the predictions made at ids `first[r]` up to `end[r]` of the text.
    total = text.size - 1
    end = np.r_[stride:context:stride, context : total + stride : stride]
    first = np.r_[0, end[:-1]]
    first, end = first[first < total], end[first < total]
    start = np.maximum(end - context, 0)  # of the row's window

    batch = _rows(cfg, stride, end.size) if batch_size is None else batch_size
    batch = check_size("batch_size", batch)
    nats, done = 0.0, 0
    for lowest in range(0, end.size, batch):
        row = np.arange(lowest, lowest + batch)
        padding = row >= end.size
        row[padding] = end.size - 1
        # What lies past the end repeats the last id; no id that counts looks at it.
        place = np.minimum(start[row, None] + np.arange(context + 1), total)
        at = (end[row] - stride)[:, None] + np.arange(stride)
        counted = (first[row, None] <= at) & (at < np.minimum(end[row], total)[:, None])
        counted[padding] = False
        windows, offset = text[place].astype(np.int32), (at[:, 0] - start[row]).astype(np.int32)
        found = np.asarray(_score_blocks(cfg, dtype, stride, params, windows, offset))[counted]
        if not np.isfinite(found).all():
            worst = np.flatnonzero(~np.isfinite(found))[0]
            raise ValueError(
                f"the log-probability of the id at [{at[counted][worst] + 1}] is {found[worst]}: "
                "the parameters hold NaN or infinity, or overflow in this dtype; float32 may help"
            )
        nats -= found.sum(dtype=np.float64)
        done += found.size
        if progress is not None:
            progress(done, total)
    return Measurement(
        loss=float(nats / total),
        tokens=done,
        bytes=n_bytes,
        windows=1 + max(0, math.ceil((total - context) / stride)),
        stride=stride,
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score_blocks(
    cfg: GPTConfig,
    dtype: Any,
    stride: int,
    params: Params,
    ids: jax.Array,  # int32 [B, context_length + 1]
    offset: jax.Array,  # int32 [B]: where in its row a block begins
) -> jax.Array:  # float32 [B, stride]
    block = jax.vmap(partial(lax.dynamic_slice_in_dim, slice_size=stride))
    states = _states(cfg, dtype, params, ids[:, :-1])
    return _log_probs(cfg, dtype, params, block(states, offset), block(ids[:, 1:], offset))


def _states(cfg: GPTConfig, dtype: Any, params: Params, ids: jax.Array) -> jax.Array:
    """Returns what the head needs, [B, T, D]."""
    # Filled whole, from slot 0 on, the cache is keys and values themselves: XLA leaves it out.
    cache = init_cache(cfg, ids.shape[0], ids.shape[1], dtype)
    model: Any = GPT(cfg, dtype, parent=None)
    states, _ = model.apply({"params": params}, ids, cache, method=GPT.trunk)
    return states


def _log_probs(
    cfg: GPTConfig, dtype: Any, params: Params, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """Returns log-probabilities float32 [B, T] of the ids [B, T] that follow states [B, T, D]."""
    model: Any = GPT(cfg, dtype, parent=None)
    logits = model.apply({"params": params}, states, method=GPT.head)  # [B, T, V]
    targets = targets.astype(jnp.int32)
    targets = jnp.where(targets < 0, cfg.vocab_size, targets)  # or they count from the end
    chosen = jnp.take_along_axis(
        logits, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )
    return chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _rows(cfg: GPTConfig, stride: int, rows: int) -> int:
    """Returns how many rows to compute together: a power of two for short texts."""
    logits = stride * cfg.vocab_size
    attention = cfg.n_heads * cfg.context_length**2
    feed_forward = 4 * cfg.emb_dim * cfg.context_length
    largest = _LARGEST_ON_CPU if jax.default_backend() == "cpu" else _LARGEST
    most = max(1, largest // max(logits, attention, feed_forward))
    return min(most, 1 << (rows - 1).bit_length())


def _checked_text(vocab_size: int, ids: ArrayLike) -> np.ndarray:
    """Returns ids as one array [N], not read as a whole, or raises ValueError."""
    text = np.asarray(ids)
    if text.ndim != 1:
        raise ValueError(f"ids of shape {text.shape} must be the ids of one text, [length]")
    if text.size < 2:
        raise ValueError(
            f"a text of length {text.size} leaves nothing to predict: give 2 ids or more, as the "
            "first has none before it"
        )
    if not np.issubdtype(text.dtype, np.integer):
        raise ValueError(f"ids of dtype {text.dtype} must be integers")
    for piece in _pieces(text):
        if piece.min() < 0 or piece.max() >= vocab_size:
            check_vocabulary(vocab_size, text)
    return text


def _count_bytes(tokenizer: Tokenizer, text: np.ndarray) -> int:
    """Returns the bytes of all ids but the first."""
    counts = np.zeros(int(max(piece.max() for piece in _pieces(text))) + 1, np.int64)
    for piece in _pieces(text[1:]):
        counts += np.bincount(piece.astype(np.int64), minlength=counts.size)
    special = set(tokenizer.special_tokens.values())
    n_bytes = 0
    for token in np.flatnonzero(counts).tolist():
        try:
            length = 0 if token in special else len(tokenizer.token_bytes(token))
        except ValueError as error:
            raise ValueError(f"the text was made with another tokenizer: {error}") from None
        n_bytes += int(counts[token]) * length
    return n_bytes


def _pieces(text: np.ndarray) -> list[np.ndarray]:
    """Returns views that together are the text, each small enough to copy."""
    return [text[begin : begin + 2**22] for begin in range(0, text.size, 2**22)]
