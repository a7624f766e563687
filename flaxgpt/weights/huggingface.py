"""Layouts with GPT-2's names for modules: Hugging Face's, in PyTorch and in Flax, and nanoGPT's."""

from __future__ import annotations

from typing import Any

from flaxgpt.config import GPTConfig
from flaxgpt.weights.table import HEAD, TOKEN_EMBEDDING, Entry, Layout, block_path

_END_OF_TEXT = 50256  # the id in GPT-2's vocabulary
_BLOCK = "transformer.h.{l}."
_NORMS = {
    block_path("norm1"): _BLOCK + "ln_1",
    block_path("norm2"): _BLOCK + "ln_2",
    "final_norm": "transformer.ln_f",
}
# (path in the block, module, third). In PyTorch, Hugging Face's Conv1D computes x @ weight + bias,
# so its weights are [in, out]. All others are [out, in], except the head in Flax.
_LINEAR = (
    ("att/W_query", "attn.c_attn", 0),
    ("att/W_key", "attn.c_attn", 1),
    ("att/W_value", "attn.c_attn", 2),
    ("att/out_proj", "attn.c_proj", None),
    ("ff/layers_0", "mlp.c_fc", None),
    ("ff/layers_2", "mlp.c_proj", None),
)


def _write_config(cfg: GPTConfig) -> dict[str, Any]:
    end_of_text = _END_OF_TEXT if cfg.vocab_size > _END_OF_TEXT else None
    values = {
        "activation_function": "gelu_new" if cfg.activation == "gelu_tanh" else cfg.activation,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": cfg.drop_rates.attn,
        "bos_token_id": end_of_text,
        "embd_pdrop": cfg.drop_rates.emb,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": cfg.norm_eps,
        "model_type": "gpt2",
        "n_embd": cfg.emb_dim,
        "n_head": cfg.n_heads,
        "n_inner": None,
        "n_layer": cfg.n_layers,
        "n_positions": cfg.context_length,
        "resid_pdrop": cfg.drop_rates.shortcut,
        "scale_attn_by_inverse_layer_idx": cfg.scale_attn_by_layer,
        "tie_word_embeddings": cfg.tie_embeddings,
        "vocab_size": cfg.vocab_size,
    }
    # transformers' GPT-2 always has all biases and ignores these keys; the file holds zeros.
    switches = {"qkv_bias": cfg.qkv_bias, "bias": cfg.bias}
    return values | {name: False for name, is_on in switches.items() if not is_on}


def _entries(
    *,
    embedding: str = "weight",  # names of parameters
    matrix: str = "weight",
    scale: str = "weight",
    transposed: bool = False,  # whether the matrices of blocks are [in, out]
    head_transposed: bool = False,
) -> tuple[Entry, ...]:
    return (
        Entry(TOKEN_EMBEDDING, f"transformer.wte.{embedding}"),
        Entry("pos_emb/weight", f"transformer.wpe.{embedding}"),
        *(Entry(f"{path}/scale", f"{module}.{scale}") for path, module in _NORMS.items()),
        *(Entry(f"{path}/shift", f"{module}.bias") for path, module in _NORMS.items()),
        *(
            Entry(block_path(f"{path}/weight"), f"{_BLOCK}{module}.{matrix}", transposed, third)
            for path, module, third in _LINEAR
        ),
        *(
            Entry(block_path(f"{path}/bias"), f"{_BLOCK}{module}.bias", False, third)
            for path, module, third in _LINEAR
        ),
        Entry(HEAD, f"lm_head.{matrix}", head_transposed),
    )


_MASKS = (_BLOCK + "attn.bias", _BLOCK + "attn.masked_bias")

HUGGINGFACE = Layout(  # transformers' GPT2LMHeadModel
    title="Hugging Face's",
    entries=_entries(transposed=True),
    constants=_MASKS,
    prefix="transformer.",
    has_all_biases=True,
    tie_key="tie_word_embeddings",
    write_config=_write_config,
    metadata={"format": "pt"},
)

NANOGPT = Layout(  # its GPT in model.py, after the conversion that `flaxgpt.load` explains
    title="nanoGPT's",
    entries=_entries(),
    constants=_MASKS,
)

FLAX = Layout(  # transformers' FlaxGPT2LMHeadModel, which version 5 no longer has
    title="Hugging Face's in Flax",
    entries=_entries(embedding="embedding", matrix="kernel", scale="scale", head_transposed=True),
    prefix="transformer.",
    has_all_biases=True,
    tie_key="tie_word_embeddings",
)
