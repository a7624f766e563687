"""The architecture of a GPT: `GPTConfig`, its presets, and the names of its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from flaxgpt._checks import check_keys, check_rate, check_size, unknown_name


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

    Raises:
        ValueError: a size or rate is out of range. The message says what to change.
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
        sizes = dict(zip(("emb_dim", "n_heads", "n_layers"), PRESETS[name], strict=True))
        released = name.startswith("gpt2")
        return cls(**sizes, qkv_bias=released, tie_embeddings=released)

    def to_dict(self) -> dict[str, Any]:
        """Return the book's plain dict plus flaxgpt's keys that are set, ready for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """Read the book's plain dict or the contents of a Hugging Face GPT-2 `config.json`.

        Args:
            values: the book's keys (`emb_dim`, ...) or Hugging Face's (`n_embd`, ...). Hugging Face
                keys that do not change the mathematics are ignored.

        Raises:
            ValueError: a key is unknown, or a Hugging Face option is not supported.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be a dict of settings, got {type(values).__name__}")
        if "model_type" in values or "n_embd" in values:
            return cls(**_from_huggingface(values))
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
_SWITCHES = ("qkv_bias", "tie_embeddings")
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

_HUGGINGFACE_NAMES = {  # theirs: (ours, the default of transformers' GPT2Config)
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("context_length", 1024),
    "n_embd": ("emb_dim", 768),
    "n_head": ("n_heads", 12),
    "n_layer": ("n_layers", 12),
    "tie_word_embeddings": ("tie_embeddings", True),
    "qkv_bias": ("qkv_bias", True),  # flaxgpt's own key: transformers' GPT-2 always has the bias
    "embd_pdrop": ("drop_rate_emb", 0.1),
    "attn_pdrop": ("drop_rate_attn", 0.1),
    "resid_pdrop": ("drop_rate_shortcut", 0.1),
}

# Options that change the mathematics, with the values that give the model of chapter 4.
_HUGGINGFACE_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


def _from_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    ours = {
        our_name: values.get(their_name, default)
        for their_name, (our_name, default) in _HUGGINGFACE_NAMES.items()
    }
    ours["emb_dim"] = check_size("n_embd", ours["emb_dim"])
    for option, allowed in (_HUGGINGFACE_FIXED | {"n_inner": (4 * ours["emb_dim"], None)}).items():
        if option in values and values[option] not in allowed:
            raise ValueError(
                f"the Hugging Face option {option}={values[option]!r} is not supported: flaxgpt "
                f"implements only {option}={allowed[0]!r}"
            )
    if ours["drop_rate_emb"] == ours["drop_rate_attn"] == ours["drop_rate_shortcut"]:
        ours["drop_rate"] = ours["drop_rate_emb"]  # one rate everywhere is the book's drop_rate
        for name in _SPECIFIC_RATES:
            del ours[name]
    return ours
