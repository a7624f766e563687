"""Hugging Face's layout: the tensors and config of transformers' `GPT2LMHeadModel`."""

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
# (path in the block, module, third). GPT-2's Conv1D computes x @ weight + bias, so its weights are
# [in, out].
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
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": cfg.drop_rates.attn,
        "bos_token_id": end_of_text,
        "embd_pdrop": cfg.drop_rates.emb,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": cfg.emb_dim,
        "n_head": cfg.n_heads,
        "n_inner": None,
        "n_layer": cfg.n_layers,
        "n_positions": cfg.context_length,
        "resid_pdrop": cfg.drop_rates.shortcut,
        "tie_word_embeddings": cfg.tie_embeddings,
        "vocab_size": cfg.vocab_size,
    }
    # transformers' GPT-2 always has this bias and ignores the key; the file holds zeros.
    return values if cfg.qkv_bias else {**values, "qkv_bias": False}


HUGGINGFACE = Layout(
    title="Hugging Face's",
    entries=(
        Entry(TOKEN_EMBEDDING, "transformer.wte.weight"),
        Entry("pos_emb/weight", "transformer.wpe.weight"),
        *(Entry(f"{path}/scale", f"{module}.weight") for path, module in _NORMS.items()),
        *(Entry(f"{path}/shift", f"{module}.bias") for path, module in _NORMS.items()),
        *(
            Entry(block_path(f"{path}/{kind}"), f"{_BLOCK}{module}.{kind}", kind == "weight", third)
            for path, module, third in _LINEAR
            for kind in ("weight", "bias")
        ),
        Entry(HEAD, "lm_head.weight"),
    ),
    constants=(_BLOCK + "attn.bias", _BLOCK + "attn.masked_bias"),
    prefix="transformer.",
    writes_tied_head=False,
    tie_key="tie_word_embeddings",
    write_config=_write_config,
    metadata={"format": "pt"},
)
