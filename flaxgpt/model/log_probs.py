"""Log-probabilities of given tokens: the one cross-entropy of the package."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_log_probs(
    logits: jax.Array,  # float32 [..., V]
    targets: jax.Array,  # int [...]
) -> jax.Array:  # float32 [...]
    """Return the natural log-probability of each target; NaN for one outside the vocabulary."""
    # take_along_axis counts negative indices from the end, so they are moved past it.
    indices = jnp.where(targets < 0, logits.shape[-1], targets.astype(jnp.int32))
    chosen = jnp.take_along_axis(
        logits, indices[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )
    return chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1)
