"""What a GPT is: its sizes, its dropout rates, its two switches. How it is run is not here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from flaxgpt._checks import check_size


class _Inherited(float):
    """A rate that nobody set: `dataclasses.replace(cfg, drop_rate=...)` must move it along."""


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The architecture of a GPT-2, under the names of the book's `GPT_CONFIG_124M` (section 4.1).

    Frozen and hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        vocab_size: entries of the vocabulary (V).
        context_length: most ids the model can look at (rows of the position table).
        emb_dim: width of the residual stream (D).
        n_heads: attention heads (N); must divide `emb_dim`.
        n_layers: transformer blocks (L).
        drop_rate: dropout probability, in [0, 1), wherever no rate of its own is given.
        qkv_bias: whether the query, key and value projections have a bias.
        tie_embeddings: whether the output head is the token embedding itself, as in the released
            GPT-2 (the book keeps them apart).
        drop_rate_emb: dropout after the embeddings; `drop_rate` unless given (exercise 4.3).
        drop_rate_attn: dropout on attention weights; `drop_rate` unless given.
        drop_rate_shortcut: dropout before each shortcut addition; `drop_rate` unless given.

    Raises:
        ValueError: a size or rate that no model can have; the message says what to change.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_embeddings: bool = False
    drop_rate_emb: float = None  # type: ignore[assignment]  # filled in by __post_init__
    drop_rate_attn: float = None  # type: ignore[assignment]
    drop_rate_shortcut: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        if self.emb_dim % self.n_heads:
            fitting = [n for n in range(1, self.emb_dim + 1) if self.emb_dim % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.n_heads))
            raise ValueError(
                f"n_heads={self.n_heads} does not divide emb_dim={self.emb_dim}: every head takes "
                f"an equal share of the width; n_heads={nearest} would do"
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        object.__setattr__(self, "drop_rate", _rate("drop_rate", self.drop_rate))
        for name in _OWN_RATES:
            given = getattr(self, name)
            inherits = given is None or isinstance(given, _Inherited)
            value = _Inherited(self.drop_rate) if inherits else _rate(name, given)
            object.__setattr__(self, name, value)

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
        """Returns a published configuration.

        Args:
            name: one of `book-124M`, `book-355M`, `book-774M`, `book-1558M` (exercise 4.2: untied,
                no qkv bias), `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` (as OpenAI released
                them: tied, with qkv bias; Radford et al. 2019, table 2).

        Raises:
            ValueError: an unknown name; the message has the nearest ones.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"no preset {name!r}: {hint}There are {', '.join(PRESETS)}")
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
        """Returns the book's plain dict (and our further keys), ready for JSON.

        A rate that follows `drop_rate` is left out, so that reading it back keeps it following.
        """
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if not isinstance(v, _Inherited)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """Reads the book's plain dict or the contents of a Hugging Face GPT-2 `config.json`.

        Args:
            values: the book's keys (`emb_dim`, ...) or Hugging Face's (`n_embd`, ...). Of the
                latter, keys that do not change the mathematics are skipped.

        Raises:
            ValueError: an unknown key, or a Hugging Face option that this model does not have.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be a dict of settings, got {type(values).__name__}")
        if "model_type" in values or "n_embd" in values:
            return cls(**_from_huggingface(values))
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown config keys {unknown}: expected some of {known}")
        return cls(**values)


_BLOCK = "trf_blocks_"


def block_name(index: int | str) -> str:
    """Return the name of a transformer block in the parameter tree, such as `trf_blocks_0`.

    Args:
        index: the block's number, counted from 0, or a placeholder such as `*` or `{l}`.
    """
    return f"{_BLOCK}{index}"


def block_index(name: str) -> int | None:
    """Return the number of the block that `block_name` names, or None for any other name."""
    number = name.removeprefix(_BLOCK)
    return int(number) if name.startswith(_BLOCK) and number.isdecimal() else None


def check_config(cfg: GPTConfig) -> None:
    """Raises ValueError where something else was given as configuration."""
    if not isinstance(cfg, GPTConfig):
        remedy = ": GPTConfig.from_dict makes one of it" if isinstance(cfg, Mapping) else ""
        raise ValueError(f"cfg must be a GPTConfig, got {type(cfg).__name__}{remedy}")


_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
_SWITCHES = ("qkv_bias", "tie_embeddings")
_OWN_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")

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

_HUGGINGFACE_NAMES = {  # theirs: (ours, what transformers' GPT2Config takes where it is absent)
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("context_length", 1024),
    "n_embd": ("emb_dim", 768),
    "n_head": ("n_heads", 12),
    "n_layer": ("n_layers", 12),
    "tie_word_embeddings": ("tie_embeddings", True),
    "qkv_bias": ("qkv_bias", True),  # our own key: GPT-2 there always has the bias
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
    for option, allowed in _HUGGINGFACE_FIXED.items():
        if option in values and values[option] not in allowed:
            raise ValueError(
                f"the Hugging Face option {option}={values[option]!r} is not supported: this model "
                f"computes {option}={allowed[0]!r}, other values give another function"
            )
    ours = {
        our_name: values.get(their_name, default)
        for their_name, (our_name, default) in _HUGGINGFACE_NAMES.items()
    }
    ours["emb_dim"] = check_size("n_embd", ours["emb_dim"])
    n_inner = values.get("n_inner")
    if n_inner not in (None, 4 * ours["emb_dim"]):
        raise ValueError(
            f"the Hugging Face option n_inner={n_inner!r} is not supported: the feed-forward layer "
            f"is always 4 x n_embd = {4 * ours['emb_dim']} wide"
        )
    if ours["drop_rate_emb"] == ours["drop_rate_attn"] == ours["drop_rate_shortcut"]:
        ours["drop_rate"] = ours["drop_rate_emb"]  # one rate everywhere is the book's drop_rate
        for name in _OWN_RATES:
            del ours[name]
    return ours


def _rate(name: str, value: Any) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = float("nan")
    if isinstance(value, (bool, str)) or not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{name}={value!r} must be a probability from 0 up to, not including, 1 "
            "(at 1.0 dropout would erase everything); 0.0 turns it off"
        )
    return rate
