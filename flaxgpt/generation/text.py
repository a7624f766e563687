"""`generate_text`: text in, text out, with a tokenizer on both sides of the decoding loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxgpt._checks import check_stop_ids
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.batch import generate
from flaxgpt.generation.beam_options import EarlyStopping
from flaxgpt.generation.hooks import LogitsFn
from flaxgpt.tokenizer import Tokenizer, text_ids
from flaxgpt.typing import Params


def generate_text(
    cfg: GPTConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Continue every text and return the new text only.

    Ids without text, such as the padding of a vocabulary, are never chosen. Arguments after
    `prompts` are those of `flaxgpt.generate`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        tokenizer: the tokenizer that the model was trained with.
        prompts: texts, none of them empty.
        max_new_tokens: new ids per text, 1 or more.

    Returns:
        One text per prompt. Bytes that are not UTF-8 become U+FFFD. A special token that ends a
        text, such as GPT-2's end of text as a stop id, is left out.

    Raises:
        ValueError: an argument is out of range, or a prompt has ids that the model lacks.
        TypeError: a prompt is not a string.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts; for one text, use [{prompts!r}]")
    check_config(cfg)
    stop_ids = check_stop_ids(stop_ids, cfg.vocab_size)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    rows = generate(
        cfg,
        params,
        encoded,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=key,
        stop_ids=stop_ids,
        logits_fn=logits_fn,
        min_new_tokens=min_new_tokens,
        beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        allowed=text_ids(tokenizer, cfg.vocab_size),
        dtype=dtype,
    )
    return [
        "".join(tokenizer.decode_stream(drop_stop_tokens(tokenizer, row, stop_ids), after=prompt))
        for prompt, row in zip(encoded, rows, strict=True)
    ]


def drop_stop_tokens(
    tokenizer: Tokenizer, ids: Iterable[int], stop_ids: Sequence[int]
) -> Iterator[int]:
    """Yield the ids that are text: all except special tokens that stopped the row."""
    silent = set(tokenizer.special_tokens.values()) & set(stop_ids)
    return (token for token in ids if token not in silent)
