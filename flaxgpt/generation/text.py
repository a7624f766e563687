"""Text in, text out: the tokenizer on both sides of the decoding loop."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxgpt._checks import check_stop_ids
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.batch import generate
from flaxgpt.tokenizer import Tokenizer
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
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Continues every text and returns the new text alone.

    Arguments after `prompts` are those of `flaxgpt.generate`, which see.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        tokenizer: the one that the model was trained with.
        prompts: texts, none empty.
        max_new_tokens: new ids a text, 1 or more.

    Returns:
        One text a prompt. Bytes that are not UTF-8 become U+FFFD; a special token that ends a text
        (a stop id such as GPT-2's end of text) is left out.

    Raises:
        ValueError: an argument out of its range, or a tokenizer whose ids the model does not have.
        TypeError: a prompt that is no text.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts: for one, [{prompts!r}]")
    check_config(cfg)
    stop_ids = check_stop_ids(cfg.vocab_size, stop_ids)
    rows = generate(
        cfg,
        params,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=key,
        stop_ids=stop_ids,
        dtype=dtype,
    )
    return [tokenizer.decode(list(spoken(tokenizer, row, stop_ids))) for row in rows]


def spoken(tokenizer: Tokenizer, ids: Iterable[int], stop_ids: Sequence[int]) -> Iterator[int]:
    """Yields the ids that are text: all but a special token that stopped the row."""
    silent = set(tokenizer.special_tokens.values()) & set(stop_ids)
    return (token for token in ids if token not in silent)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Gives text as ids arrive, holding back a character until all its bytes are there.

    Args:
        tokenizer: what the ids belong to.
        ids: any iterable, such as a generator that is still sampling.

    Yields:
        Pieces of text, none empty, which joined are `tokenizer.decode(ids)`. A character that is
        still incomplete when the ids end becomes U+FFFD.

    Raises:
        ValueError: an id is not in the vocabulary; says which and where.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for place, id in enumerate(ids):
        try:
            piece = decoder.decode(tokenizer.token_bytes(id))
        except ValueError as error:
            raise ValueError(f"at index {place} of the stream: {error}") from None
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
