"""The architecture of a GPT: `GPTConfig`, its presets, and the names of its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from flaxgpt._checks import check_float32, check_keys, check_rate, check_size, unknown_name
from flaxgpt.foreign_configs import translate

Activation = Literal["gelu_tanh", "gelu"]


class DropRates(NamedTuple):
    """Dropout probabilities at the three places the book names (exercise 4.3)."""

    emb: float  # after the embeddings
    attn: float  # on the attention weights
    shortcut: float  # before each shortcut addition


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The architecture of a GPT-2, under the names of the book's `GPT_CONFIG_124M` (section 4.1).

    Frozen and hashable, so it can be a static argument of `jax.jit`. How a model is run (dtype,
    batch, cache length, attention implementation) is not part of it.

    Attributes:
        vocab_size: number of token ids (V).
        context_length: longest sequence the model supports; rows of the position table.
        emb_dim: width of the residual stream (D).
        n_heads: attention heads (N); must divide `emb_dim`.
        n_layers: transformer blocks (L).
        drop_rate: dropout probability, in [0, 1), wherever no more specific rate is set.
        qkv_bias: whether the query, key and value projections have a bias.
        tie_embeddings: whether the output head shares the token embedding, as in the released
            GPT-2. The book keeps them separate.
        drop_rate_emb: dropout after the embeddings; None means `drop_rate` (exercise 4.3).
        drop_rate_attn: dropout on the attention weights; None means `drop_rate`.
        drop_rate_shortcut: dropout before each shortcut addition; None means `drop_rate`.
        bias: whether linear layers and norms have a bias, except query, key and value, which follow
            `qkv_bias`. False as in nanoGPT's `bias=False`.
        activation: of the feed-forward layer: `gelu_tanh`, the tanh approximation of the book and
            GPT-2, or `gelu`, the exact form of nanoGPT.
        norm_eps: added to the variance in every norm.
        scale_attn_by_layer: whether block i, counted from 1, divides its attention scores by i, as
            Stanford's GPT-2 models do (`scale_attn_by_inverse_layer_idx` in Hugging Face's).

    Raises:
        ValueError: a value is out of range. The message says what to change.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_embeddings: bool = False
    drop_rate_emb: float | None = None
    drop_rate_attn: float | None = None
    drop_rate_shortcut: float | None = None
    bias: bool = True
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-5
    scale_attn_by_layer: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        if self.emb_dim % self.n_heads:
            divisors = [n for n in range(1, self.emb_dim + 1) if self.emb_dim % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_heads))
            raise ValueError(
                f"n_heads={self.n_heads} does not divide emb_dim={self.emb_dim}: each head takes "
                f"an equal share of the width; use n_heads={nearest}, for example"
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("drop_rate", *_SPECIFIC_RATES):
            if (rate := getattr(self, name)) is not None or name == "drop_rate":
                object.__setattr__(self, name, check_rate(name, rate))
        if self.activation not in get_args(Activation):
            raise unknown_name("activation", self.activation, get_args(Activation))
        object.__setattr__(self, "norm_eps", check_float32("norm_eps", self.norm_eps))
        if self.norm_eps == 0:
            raise ValueError(
                "norm_eps=0.0 would divide 0 by 0 where a vector is constant: try 1e-5"
            )
        if self.qkv_bias and not self.bias:
            raise ValueError("qkv_bias=True contradicts bias=False, a model without any bias")

    @property
    def drop_rates(self) -> DropRates:
        """Dropout at each place, with `drop_rate` where no specific rate is set."""
        rates = (getattr(self, name) for name in _SPECIFIC_RATES)
        return DropRates(*(self.drop_rate if rate is None else rate for rate in rates))

    @property
    def head_dim(self) -> int:
        """Size of one attention head (H)."""
        return self.emb_dim // self.n_heads

    @property
    def ff_dim(self) -> int:
        """Width inside the feed-forward layer (F): four times `emb_dim` (section 4.3)."""
        return 4 * self.emb_dim

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the transformer blocks in the parameter tree, in order."""
        return tuple(block_name(i) for i in range(self.n_layers))

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """Return a published configuration.

        Args:
            name: one of `book-124M`, `book-355M`, `book-774M`, `book-1558M` (exercise 4.2: untied,
                no qkv bias), `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` (as OpenAI released
                them: tied, with qkv bias; Radford et al. 2019, table 2).

        Raises:
            ValueError: the name is unknown. The message suggests the closest ones.
        """
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        emb_dim, n_heads, n_layers = PRESETS[name]
        released = name.startswith("gpt2")
        return cls(
            emb_dim=emb_dim,
            n_heads=n_heads,
            n_layers=n_layers,
            qkv_bias=released,
            tie_embeddings=released,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the book's plain dict plus flaxgpt's keys that are not defaults, for JSON."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)[_BOOK_KEYS:]}
        return {k: v for k, v in vars(self).items() if k not in defaults or v != defaults[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """Read the book's plain dict, Hugging Face's `config.json` of a GPT-2, or nanoGPT's.

        Args:
            values: the book's keys (`emb_dim`, ...), Hugging Face's (`n_embd`, ...), or nanoGPT's
                `model_args` (`block_size`, ...).

        Raises:
            ValueError: a value is not supported, or a key of the book or nanoGPT is unknown.

        Warns:
            UserWarning: a Hugging Face key is neither supported nor known to be harmless.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be a dict of settings, got {type(values).__name__}")
        if (ours := translate(values)) is not None:
            return cls(**ours)
        check_keys("config keys", values, cls)
        return cls(**values)


_BLOCK = "trf_blocks_"


def block_name(index: int | str) -> str:
    """Return the name of a block in the parameter tree, given its number or a placeholder."""
    return f"{_BLOCK}{index}"


def block_index(name: str) -> int | None:
    """Return the number of the block that `block_name` names, or None for any other name."""
    number = name.removeprefix(_BLOCK)
    return int(number) if name.startswith(_BLOCK) and number.isdecimal() else None


def check_config(cfg: GPTConfig) -> None:
    """Raise ValueError unless `cfg` is a GPTConfig."""
    if not isinstance(cfg, GPTConfig):
        remedy = "; convert it with GPTConfig.from_dict" if isinstance(cfg, Mapping) else ""
        raise ValueError(f"cfg must be a GPTConfig, got {type(cfg).__name__}{remedy}")


_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
_SWITCHES = ("qkv_bias", "tie_embeddings", "bias", "scale_attn_by_layer")
_BOOK_KEYS = 8  # the fields before this index are written always
_SPECIFIC_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")

PRESETS = {  # emb_dim, n_heads, n_layers
    "book-124M": (768, 12, 12),
    "book-355M": (1024, 16, 24),
    "book-774M": (1280, 20, 36),
    "book-1558M": (1600, 25, 48),
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 16, 24),
    "gpt2-large": (1280, 20, 36),
    "gpt2-xl": (1600, 25, 48),
}
