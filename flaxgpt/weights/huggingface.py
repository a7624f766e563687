"""Hugging Face's layout: the tensors and config of transformers' `GPT2LMHeadModel`."""

from __future__ import annotations

from typing import Any

from flaxgpt.config import GPTConfig
from flaxgpt.weights.table import HEAD, TOKEN_EMBEDDING, Entry, Layout, block_path

_END_OF_TEXT = 50256  # the id in GPT-2's vocabulary


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


_FUSED = "transformer.h.{l}.attn.c_attn"
# (path in the block, tensor, whether it is transposed). GPT-2's Conv1D computes x @ weight + bias,
# so its weights are [in, out].
_BLOCK = (
    ("norm1/scale", "ln_1.weight", False),
    ("norm1/shift", "ln_1.bias", False),
    ("att/out_proj/weight", "attn.c_proj.weight", True),
    ("att/out_proj/bias", "attn.c_proj.bias", False),
    ("norm2/scale", "ln_2.weight", False),
    ("norm2/shift", "ln_2.bias", False),
    ("ff/layers_0/weight", "mlp.c_fc.weight", True),
    ("ff/layers_0/bias", "mlp.c_fc.bias", False),
    ("ff/layers_2/weight", "mlp.c_proj.weight", True),
    ("ff/layers_2/bias", "mlp.c_proj.bias", False),
)

HUGGINGFACE = Layout(
    title="Hugging Face's",
    entries=(
        Entry(TOKEN_EMBEDDING, "transformer.wte.weight"),
        Entry("pos_emb/weight", "transformer.wpe.weight"),
        *(
            Entry(block_path(f"att/{name}/{kind}"), f"{_FUSED}.{kind}", kind == "weight", third)
            for third, name in enumerate(("W_query", "W_key", "W_value"))
            for kind in ("weight", "bias")
        ),
        *(
            Entry(block_path(path), f"transformer.h.{{l}}.{name}", transposed)
            for path, name, transposed in _BLOCK
        ),
        Entry("final_norm/scale", "transformer.ln_f.weight"),
        Entry("final_norm/shift", "transformer.ln_f.bias"),
        Entry(HEAD, "lm_head.weight"),
    ),
    constants=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
    prefix="transformer.",
    writes_tied_head=False,
    tie_key="tie_word_embeddings",
    write_config=_write_config,
    metadata={"format": "pt"},
)
