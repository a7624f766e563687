"""Floating-point operations of a model: by part, with and without attention scores."""

from __future__ import annotations

import dataclasses
from typing import Any

from flaxgpt._checks import check_extent, check_positive
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.model.attend import query_blocks


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Operations of matrix products; a multiplication and its addition are two.

    Embeddings are looked up and add none. Norms, softmax and GELU, some 1 % of a large model, are
    left out, as they are from every published figure.

    Attributes:
        projections: forward, of query, key, value and output.
        scores: forward, of queries with keys and of weights with values, each query with all keys.
            A causal model needs half of it; flaxgpt computes `scores_computed`.
        scores_computed: as `scores`, without the blocks of later keys that `forward` leaves out.
        feed_forward: forward.
        head: forward; the same whether tied or not.
    """

    projections: int
    scores: int
    scores_computed: int
    feed_forward: int
    head: int

    @property
    def forward(self) -> int:
        """With scores: nanoGPT's sizing and PaLM's model FLOPs."""
        return self.forward_without_scores + self.scores

    @property
    def forward_without_scores(self) -> int:
        """Two a weight and token: the book's table."""
        return self.projections + self.feed_forward + self.head

    @property
    def training(self) -> int:
        """Forward and backward, with scores: the backward pass takes two products for each one."""
        return 3 * self.forward

    @property
    def training_without_scores(self) -> int:
        """Forward and backward, without scores: six a weight and token."""
        return 3 * self.forward_without_scores

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values, ready for JSON."""
        names = ("forward", "forward_without_scores", "training", "training_without_scores")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def flops(cfg: GPTConfig, batch: int, length: int) -> FlopCount:
    """Returns the operations of one call of `forward` and of one training step.

    Published figures differ by what they count. The book's (chapter 4's performance analysis: 2 x
    1,024 ids, qkv bias, 5.1e11 for 124M) is `forward_without_scores`; nanoGPT's
    (transformer_sizing.ipynb: 291,648,307,200 for 1,024 ids) is `forward`.

    >>> import flaxgpt
    >>> gpt2 = flaxgpt.GPTConfig.preset("gpt2")
    >>> flaxgpt.flops(gpt2, batch=1, length=1024).forward
    291648307200

    Args:
        cfg: the architecture.
        batch: rows (B).
        length: ids a row (T), at most `cfg.context_length`.

    Raises:
        ValueError: a batch or length that the model cannot have.
    """
    check_config(cfg)
    batch, length = check_extent(cfg.context_length, batch, length)
    tokens, width, depth = batch * length, cfg.emb_dim, cfg.n_layers

    def product(pairs: int) -> int:  # D wide: scores, then the mean of the values
        return depth * batch * 2 * 2 * pairs * width

    return FlopCount(
        projections=depth * tokens * 2 * 4 * width * width,
        scores=product(length * length),
        scores_computed=product(sum((stop - start) * stop for start, stop in query_blocks(length))),
        feed_forward=depth * tokens * 2 * 2 * width * 4 * width,
        head=tokens * 2 * width * cfg.vocab_size,
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
    """Returns the share of a device's peak that a measured rate makes use of.

    Model FLOPs utilisation as PaLM defines it (Chowdhery et al. 2022, appendix B): what the model
    needs, not what was computed, so recomputed activations do not count.

    >>> import flaxgpt
    >>> gpt2 = flaxgpt.GPTConfig.preset("gpt2")
    >>> round(flaxgpt.mfu(gpt2, 170_000, 312e12, length=1024), 2)  # of an A100 in bfloat16
    0.47

    Args:
        cfg: the architecture.
        tokens_per_second: as measured, over all devices.
        peak_flops: operations a second that the devices could do in the dtype used, from their
            maker's data sheet.
        length: ids a row (T).
        training: whether the rate is of training steps, not of forward passes.
        scores: whether attention scores count.

    Raises:
        ValueError: a rate or peak that is not a positive number, or a length that does not fit.
    """
    rate = check_positive("tokens_per_second", tokens_per_second)
    peak = check_positive("peak_flops", peak_flops)
    count = flops(cfg, 1, length)
    forward = count.forward if scores else count.forward_without_scores
    each = forward * (3 if training else 1) / length
    return each * rate / peak
