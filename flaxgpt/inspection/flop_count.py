"""Floating-point operations by part, with and without attention scores, and MFU."""

from __future__ import annotations

import dataclasses
from typing import Any

from flaxgpt._checks import check_context, check_positive, check_size
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.model.attend import query_blocks


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Operations of the matrix products of a forward pass; a multiply-add is two operations.

    Norms, softmax and GELU, about 1 % of a large model, are not counted, as in all published
    figures.

    Attributes:
        projections: query, key, value and output projections.
        scores: queries with keys and weights with values, all pairs (a causal model needs half).
        scores_computed: `scores` without the blocks of later keys that `forward` skips.
        feed_forward: feed-forward layers.
        head: output head, tied or not.
        forward: forward pass with scores: nanoGPT's count and PaLM's model FLOPs.
        forward_without_scores: forward pass without scores, 2 per weight and token: the book's.
        training: forward and backward pass with scores; backward has two products for each one.
        training_without_scores: the same without scores, 6 per weight and token.
    """

    projections: int
    scores: int
    scores_computed: int
    feed_forward: int
    head: int
    forward: int
    forward_without_scores: int
    training: int
    training_without_scores: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return dataclasses.asdict(self)


def flops(cfg: GPTConfig, batch: int, length: int) -> FlopCount:
    """Count the operations of a forward pass and of a training step.

    The book's figure (performance analysis of chapter 4) is `forward_without_scores`, and nanoGPT's
    (transformer_sizing.ipynb) is `forward`.

    >>> import flaxgpt
    >>> gpt2 = flaxgpt.GPTConfig.preset("gpt2")
    >>> flaxgpt.flops(gpt2, batch=1, length=1024).forward
    291648307200

    Args:
        cfg: the configuration.
        batch: number of rows (B).
        length: ids per row (T), at most `cfg.context_length`.

    Returns:
        The operations by part.

    Raises:
        ValueError: `batch` or `length` is out of range.
    """
    check_config(cfg)
    batch, length = check_size("batch", batch), check_context(cfg.context_length, length)
    depth, tokens, width = cfg.n_layers, batch * length, cfg.emb_dim
    projections = depth * tokens * 2 * 4 * width * width
    pair = depth * batch * 2 * 2 * width  # its score, then its term in the mean of the values
    scores = pair * length * length
    feed_forward = depth * tokens * 2 * 2 * width * cfg.ff_dim
    head = tokens * 2 * width * cfg.vocab_size
    weights = projections + feed_forward + head
    return FlopCount(
        projections=projections,
        scores=scores,
        scores_computed=pair * sum((stop - start) * stop for start, stop in query_blocks(length)),
        feed_forward=feed_forward,
        head=head,
        forward=weights + scores,
        forward_without_scores=weights,
        training=3 * (weights + scores),
        training_without_scores=3 * weights,
    )


def mfu(
    cfg: GPTConfig,
    tokens_per_second: float,
    peak_flops: float,
    *,
    length: int,
    training: bool = True,
    scores: bool = True,
) -> float:
    """Return the model FLOPs utilization: the share of a device's peak that a throughput uses.

    As in PaLM (Chowdhery et al. 2022, appendix B), recomputed activations do not count.

    >>> import flaxgpt
    >>> gpt2 = flaxgpt.GPTConfig.preset("gpt2")
    >>> round(flaxgpt.mfu(gpt2, 170_000, 312e12, length=1024), 2)  # A100, bfloat16
    0.47

    Args:
        cfg: the configuration.
        tokens_per_second: measured throughput of all devices.
        peak_flops: peak operations per second of all devices, in the dtype used.
        length: ids per row (T).
        training: whether the throughput is of training steps or of forward passes.
        scores: whether to count attention scores.

    Returns:
        The utilization, from 0 to 1.

    Raises:
        ValueError: the throughput or peak is not a positive number, or `length` is out of range.
    """
    rate = check_positive("tokens_per_second", tokens_per_second)
    peak = check_positive("peak_flops", peak_flops)
    count = flops(cfg, 1, length)
    forward = count.forward if scores else count.forward_without_scores
    return forward * (3 if training else 1) / length * rate / peak
