"""`PrefixStore`: prefixes that were read before, and what new ones have in common with them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flaxgpt._checks import check_dtype, check_params, check_size
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.prefilling import check_prefix_ids, read_prefix
from flaxgpt.generation.prefix import Prefix
from flaxgpt.model import param_shapes
from flaxgpt.typing import Params


class PrefixStore:
    """Prefixes for prompts that repeat, in whole or at the beginning.

    `store.prefill(ids)` returns what `flaxgpt.prefill` returns, up to rounding. It reads only the
    ids that follow the longest beginning that a stored prefix shares. The prefixes that were used
    least recently are dropped when all of them together need more memory than the limit.

    A store serves one set of parameters, which must not change meanwhile, and one thread.
    """

    def __init__(
        self,
        cfg: GPTConfig,
        params: Params,
        *,
        max_bytes: int = 2**30,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        """Make an empty store.

        Args:
            cfg: the configuration.
            params: parameters of that configuration.
            max_bytes: bytes of keys and values to keep at most.
            dtype: dtype to compute in.

        Raises:
            ValueError: an argument is out of range, or `params` do not fit.
        """
        check_config(cfg)
        check_params(param_shapes(cfg), params)
        self._cfg, self._params, self._dtype = cfg, params, check_dtype(dtype)
        self._max_bytes = check_size("max_bytes", max_bytes)
        self._stored: dict[tuple[int, ...], Prefix] = {}  # the least recently used first

    def __len__(self) -> int:
        """Return the number of stored prefixes."""
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are stored."""
        return sum(prefix.nbytes for prefix in self._stored.values())

    def prefill(self, ids: ArrayLike | Sequence[int]) -> Prefix:
        """Return the prefix for ids, and store it unless it is larger than the limit.

        Args:
            ids: int [T], or a list of ids: 1 or more, at most `cfg.context_length`.

        Returns:
            A `flaxgpt.Prefix`; the same object for the same ids, while it is stored.

        Raises:
            ValueError: `ids` are not a flat list of ids that the model can read at once.
        """
        row = check_prefix_ids(self._cfg, ids)
        prefix = self._stored.get(tuple(row.tolist()))
        if prefix is None:
            known = max(self._stored.values(), key=lambda other: other.shared(row), default=None)
            prefix = read_prefix(self._cfg, self._params, row, self._dtype, known)
            if known is not None and known.shared(row):
                self._use(known)
        self._use(prefix)
        return prefix

    def _use(self, prefix: Prefix) -> None:
        """Store a prefix as the one used last, and drop others for it."""
        if prefix.nbytes > self._max_bytes:
            return
        self._stored.pop(prefix.ids, None)
        self._stored[prefix.ids] = prefix
        while self.nbytes > self._max_bytes:
            del self._stored[next(iter(self._stored))]
