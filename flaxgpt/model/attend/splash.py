"""Attention by JAX's splash kernel for TPU, which never stores the weights [T, S].

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) is a flash attention (Dao et al.
2022) that skips blocks of invisible keys. Block sizes were chosen by the TPU compiler's estimates.
It has a rule for reverse-mode derivatives only: no `jax.jvp`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from flaxgpt.model.visibility import Visibility
from flaxgpt.sharding import per_device

_LANES = 128  # the kernel reads queries and keys in multiples of these
_LARGEST_BLOCK = 512


def splash_attend(
    query: jax.Array,  # [B, N, T, H]
    keys: jax.Array,  # [B, N, T, H]
    values: jax.Array,  # as keys
    visibility: Visibility,  # without `offset`
    *,
    interpret: bool,  # whether to run the kernel as JAX operations, for platforms other than TPU
) -> jax.Array:  # [B, N, T, H]
    """Return the mean of the values, weighted by how well keys match each query."""
    attend = partial(_of_rows, window=visibility.window, interpret=interpret)
    padding = () if visibility.start is None else (visibility.start,)
    letters = ("BNTH",) * 3 + ("B",) * len(padding)
    return per_device(attend, letters, "BNTH")(query, keys, values, *padding)


def _of_rows(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array | None = None,
    *,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    heads, length, size = query.shape[1:]
    # Padding follows the text, so no query of the text sees it.
    width = -(-length // _LANES) * _LANES
    query, keys, values = (
        jnp.pad(x, ((0, 0), (0, 0), (0, width - length), (0, 0))) for x in (query, keys, values)
    )
    mask: masks.Mask = masks.CausalMask((width, width))
    if window is not None:
        mask = masks.LocalMask((width, width), (window - 1, 0), 0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(width),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    query = query * jnp.asarray(size**-0.5, query.dtype)  # exact for sizes such as 64
    # A query sees the keys of its own segment: text that of text, padding that of padding.
    segments = None
    if start is not None:
        is_text = jnp.arange(width)[None] >= start[:, None]
        segments = kernel.SegmentIds(*(is_text.astype(jnp.int32),) * 2)
    return jax.vmap(attend)(query, keys, values, segments)[:, :, :length]


def _block_sizes(width: int) -> kernel.BlockSizes:
    block = max(size for size in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if width % size == 0)
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
        # Positions along the lanes: a head of 64 elements would fill them by half, and the arrays
        # that are kept for the backward pass would take twice the memory.
        q_layout=kernel.QKVLayout.SEQ_MINOR,
        k_layout=kernel.QKVLayout.SEQ_MINOR,
        v_layout=kernel.QKVLayout.SEQ_MINOR,
    )
