"""Hugging Face's layout: names and shapes of transformers' `GPT2LMHeadModel`, and its config."""

from __future__ import annotations

from typing import Any

from flaxgpt.config import GPTConfig
from flaxgpt.weights.table import Layout, Row

_END_OF_TEXT = 50256  # in GPT-2's vocabulary


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
    # Unknown to transformers, whose GPT-2 always has this bias: the file then holds zeros.
    return values if cfg.qkv_bias else {**values, "qkv_bias": False}


_ATT = "trf_blocks_{l}/att"
_FF = "trf_blocks_{l}/ff"
_FUSED = "transformer.h.{l}.attn.c_attn"

HUGGINGFACE = Layout(
    name="huggingface",
    # GPT-2's Conv1D computes x @ weight + bias, so its weights are [in, out].
    rows=(
        Row("tok_emb/weight", "transformer.wte.weight"),
        Row("pos_emb/weight", "transformer.wpe.weight"),
        Row("trf_blocks_{l}/norm1/scale", "transformer.h.{l}.ln_1.weight"),
        Row("trf_blocks_{l}/norm1/shift", "transformer.h.{l}.ln_1.bias"),
        Row(f"{_ATT}/W_query/weight", f"{_FUSED}.weight", transposed=True, third=0),
        Row(f"{_ATT}/W_key/weight", f"{_FUSED}.weight", transposed=True, third=1),
        Row(f"{_ATT}/W_value/weight", f"{_FUSED}.weight", transposed=True, third=2),
        Row(f"{_ATT}/W_query/bias", f"{_FUSED}.bias", third=0),
        Row(f"{_ATT}/W_key/bias", f"{_FUSED}.bias", third=1),
        Row(f"{_ATT}/W_value/bias", f"{_FUSED}.bias", third=2),
        Row(f"{_ATT}/out_proj/weight", "transformer.h.{l}.attn.c_proj.weight", transposed=True),
        Row(f"{_ATT}/out_proj/bias", "transformer.h.{l}.attn.c_proj.bias"),
        Row("trf_blocks_{l}/norm2/scale", "transformer.h.{l}.ln_2.weight"),
        Row("trf_blocks_{l}/norm2/shift", "transformer.h.{l}.ln_2.bias"),
        Row(f"{_FF}/layers_0/weight", "transformer.h.{l}.mlp.c_fc.weight", transposed=True),
        Row(f"{_FF}/layers_0/bias", "transformer.h.{l}.mlp.c_fc.bias"),
        Row(f"{_FF}/layers_2/weight", "transformer.h.{l}.mlp.c_proj.weight", transposed=True),
        Row(f"{_FF}/layers_2/bias", "transformer.h.{l}.mlp.c_proj.bias"),
        Row("final_norm/scale", "transformer.ln_f.weight"),
        Row("final_norm/shift", "transformer.ln_f.bias"),
        Row("out_head/weight", "lm_head.weight"),
    ),
    constants=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
    prefix="transformer.",
    writes_tied_head=False,
    tie_key="tie_word_embeddings",
    write_config=_write_config,
    metadata={"format": "pt"},
)
