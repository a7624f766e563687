"""Configurations of other libraries in the words of `GPTConfig`: Hugging Face's and nanoGPT's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from flaxgpt._checks import check_size, listed

_SPECIFIC_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")


def translate(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `GPTConfig`, or None if the settings are not of another library.

    Raises:
        ValueError: an option is not supported, or a key of nanoGPT's is unknown.
    """
    if "block_size" in values:
        return _from_nanogpt(values)
    if values.keys() & {"model_type", "architectures", "n_embd", *_ALIASES}:
        return _from_huggingface(values)
    return None


# nanoGPT: `GPTConfig` in its model.py, saved as `model_args`

_NANOGPT = {  # theirs: (ours, their default)
    "block_size": ("context_length", 1024),
    "vocab_size": ("vocab_size", 50304),
    "n_layer": ("n_layers", 12),
    "n_head": ("n_heads", 12),
    "n_embd": ("emb_dim", 768),
    "dropout": ("drop_rate", 0.0),
    "bias": ("bias", True),
    # Not nanoGPT's key: its models of before June 2023 have the tanh form.
    "activation": ("activation", "gelu"),
}


def _from_nanogpt(values: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := [key for key in values if key not in _NANOGPT]:
        raise ValueError(
            f"unknown nanoGPT settings {unknown}: expected its model_args, {list(_NANOGPT)}"
        )
    ours = {name: values.get(key, default) for key, (name, default) in _NANOGPT.items()}
    return ours | {"qkv_bias": ours["bias"], "tie_embeddings": True}


# Hugging Face: transformers' `GPT2Config`

_ALIASES = {  # its `attribute_map`; where both names stand, the alias wins
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

_HUGGINGFACE = {  # theirs: (ours, their default)
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("context_length", 1024),
    "n_embd": ("emb_dim", 768),
    "n_head": ("n_heads", 12),
    "n_layer": ("n_layers", 12),
    "tie_word_embeddings": ("tie_embeddings", True),
    "embd_pdrop": ("drop_rate_emb", 0.1),
    "attn_pdrop": ("drop_rate_attn", 0.1),
    "resid_pdrop": ("drop_rate_shortcut", 0.1),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "activation_function": ("activation", "gelu_new"),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_layer", False),
    # flaxgpt's own keys: transformers' GPT-2 always has all biases, which are zero then.
    "qkv_bias": ("qkv_bias", True),
    "bias": ("bias", True),
}

_ACTIVATIONS = {  # of transformers/activations.py, by their formula
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

_FIXED: dict[str, tuple[Any, ...]] = {  # options that change the function: the values supported
    "model_type": ("gpt2",),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

# Keys that do not change the function. `reorder_and_upcast_attn` changes rounding in float16 only.
_HARMLESS = """
    architectures transformers_version dtype torch_dtype model_max_length name_or_path
    initializer_range reorder_and_upcast_attn n_ctx n_special predict_special_tokens use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id is_decoder cross_attention_hidden_size tie_encoder_decoder
    chunk_size_feed_forward gradient_checkpointing torchscript use_bfloat16 tf_legacy_loss
    return_dict output_attentions output_hidden_states output_past
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    num_labels id2label label2id problem_type finetuning_task task_specific_params tokenizer_class
    prefix max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attn_implementation
"""


def _from_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {_ALIASES.get(key, key): value for key, value in values.items() if key not in _ALIASES}
    known |= {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES}
    ours = {name: known.get(key, default) for key, (name, default) in _HUGGINGFACE.items()}
    ours["emb_dim"] = check_size("n_embd", ours["emb_dim"])
    if ours["activation"] not in _ACTIVATIONS:
        raise _unsupported("activation_function", ours["activation"], list(_ACTIVATIONS))
    ours["activation"] = _ACTIVATIONS[ours["activation"]]
    fixed = _FIXED | {"n_inner": (None, 4 * ours["emb_dim"])}
    for key, supported in fixed.items():
        if key in known and known[key] not in supported:
            raise _unsupported(key, known[key], supported)
    # Keys with an underscore in front are transformers' notes to itself.
    others = [
        key for key in known if key not in _HUGGINGFACE | fixed and key not in _HARMLESS.split()
    ]
    if others := [key for key in others if not key.startswith("_")]:
        warnings.warn(
            f"config.json has {listed(others)}, unknown to flaxgpt: if the model depends on it, "
            "results will differ from transformers'",
            stacklevel=2,
        )
    if ours["drop_rate_emb"] == ours["drop_rate_attn"] == ours["drop_rate_shortcut"]:
        ours["drop_rate"] = ours["drop_rate_emb"]  # one rate everywhere is the book's drop_rate
        for name in _SPECIFIC_RATES:
            del ours[name]
    return ours


def _unsupported(key: str, value: Any, supported: Any) -> ValueError:
    return ValueError(
        f"the Hugging Face option {key}={value!r} is not supported: expected "
        f"{' or '.join(map(repr, supported))}"
    )
