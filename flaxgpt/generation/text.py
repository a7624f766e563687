"""`generate_text` and `stream_text`: a tokenizer on both sides of the decoding loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flaxgpt._checks import check_stop_ids
from flaxgpt.config import GPTConfig, check_config
from flaxgpt.generation.batch import generate
from flaxgpt.generation.beam_options import BeamOptions, EarlyStopping, refuse_with_beams
from flaxgpt.generation.drafting import Draft, Drafting
from flaxgpt.generation.grammar import Grammar, compile_grammar
from flaxgpt.generation.hooks import LogitsFn
from flaxgpt.generation.observed import check_watch
from flaxgpt.generation.prefix import Prefix
from flaxgpt.generation.sampling import Sampling, check_grammar
from flaxgpt.generation.stop_strings import StopStrings
from flaxgpt.generation.streaming import stream_rows
from flaxgpt.model.intermediates import Intervention
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
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: str | Grammar | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    stop: Sequence[str] = (),
    include_stop: bool = False,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Continue every text and return the new text only.

    Ids without text, such as the padding of a vocabulary, are never chosen. Arguments that are not
    listed here are those of `flaxgpt.generate`.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        tokenizer: the tokenizer that the model was trained with.
        prompts: texts, none of them empty.
        max_new_tokens: new ids per text, 1 or more.
        match: a regular expression in the syntax of Python's `re`, such as "[0-9]{1,3}". Each new
            text is a whole match that fits `max_new_tokens`, whatever the model prefers. A text
            ends at one of `stop_ids`, by default those of the tokenizer, which are left out. Or a
            `Grammar`, from `flaxgpt.generation.compile_grammar`, which has the syntax.
        stop: strings that end a text, wherever they begin and end within its tokens. Only new text
            is searched: a string that begins in the prompt does not count. Of several strings, the
            one that ends first in the text counts, and of those that end at the same place, the
            longest. `min_new_tokens` does not delay them. Generation ends when every text has
            ended. Not for beam search.
        include_stop: whether a text includes the string that ended it.

    Returns:
        One text per prompt, or `samples` of them one after another. Bytes that are not UTF-8
        become U+FFFD. A special token that ends a text, such as GPT-2's end of text as a stop id,
        is left out.

    Raises:
        ValueError: an argument is out of range, a prompt has ids that the model lacks, or no match
            fits `max_new_tokens`.
        TypeError: a prompt is not a string.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts; for one text, use [{prompts!r}]")
    check_config(cfg)
    stop_ids = check_stop_ids(stop_ids, cfg.vocab_size)
    stops = StopStrings(stop, include_stop)
    grammar = _grammar(match, tokenizer, cfg.vocab_size, stop_ids, stops)
    allowed = None if grammar else text_ids(tokenizer, cfg.vocab_size)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    rows: Sequence[Iterable[int]]
    options = BeamOptions(beams, length_penalty, early_stopping)
    if options.is_search:
        refuse_with_beams(match=match)
    if stops.strings:
        if options.is_search:
            refuse_with_beams(stop=stops.strings)
        sampling = Sampling(
            temperature, top_k, top_p, key, stop_ids, allowed, logits_fn, min_new_tokens, grammar
        )
        watch = check_watch(cfg, None, patches)
        rows = stream_rows(
            cfg,
            params,
            encoded,
            max_new_tokens,
            sampling,
            dtype,
            window_step=window_step,
            watch=watch,
            samples=samples,
            prefix=prefix,
            drafting=Drafting(lookup, draft, draft_length),
        )
    else:
        rows = generate(
            cfg,
            params,
            encoded,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            key=key,
            samples=samples,
            stop_ids=stop_ids,
            logits_fn=logits_fn,
            min_new_tokens=min_new_tokens,
            match=grammar,
            beams=beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            allowed=allowed,
            patches=patches,
            lookup=lookup,
            draft=draft,
            draft_length=draft_length,
            window_step=window_step,
            prefix=prefix,
            dtype=dtype,
        )
    repeated = [prompt for prompt in encoded for _ in range(samples)]
    return [
        "".join(_pieces(tokenizer, prompt, row, stop_ids, stops, grammar))
        for prompt, row in zip(repeated, rows, strict=True)
    ]


def stream_text(
    cfg: GPTConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    logits_fn: LogitsFn | None = None,
    min_new_tokens: int = 0,
    match: str | Grammar | None = None,
    stop: Sequence[str] = (),
    include_stop: bool = False,
    patches: Mapping[str, Intervention] | None = None,
    lookup: int | None = None,
    draft: Draft | None = None,
    draft_length: int = 4,
    window_step: int = 1,
    prefix: Prefix | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[str]:
    """Continue one text and yield the new text as it is generated.

    The pieces join to the text of `generate_text(cfg, params, tokenizer, [prompt], ...)` with the
    same arguments, unless two ids are equally likely up to rounding; see there for the arguments
    not listed here. Arguments are checked at the call, before the first piece is requested.

    Args:
        cfg: the configuration, static.
        params: parameters of that configuration.
        tokenizer: the tokenizer that the model was trained with.
        prompt: a text, not empty.
        max_new_tokens: new ids at most, 1 or more.
        key: a JAX random key, used as `generate` uses it for row 0, or an array of one key.
        stop: strings that end the text, as in `generate_text`. Text that could become one of them
            is held back until it cannot.
        include_stop: whether the text includes the string that ended it.

    Yields:
        Nonempty pieces of text, none of which is ever taken back: whole characters, and nothing
        that belongs to a stop string unless `include_stop` is True.

    Raises:
        ValueError: an argument is invalid, or, while iterating, the logits become NaN.
    """
    if not isinstance(prompt, str):
        raise ValueError(
            f"stream_text takes one text, got {prompt!r}: use generate_text for several texts, and "
            "stream for ids"
        )
    check_config(cfg)
    stop_ids = check_stop_ids(stop_ids, cfg.vocab_size)
    stops = StopStrings(stop, include_stop)
    grammar = _grammar(match, tokenizer, cfg.vocab_size, stop_ids, stops)
    allowed = None if grammar else text_ids(tokenizer, cfg.vocab_size)
    ids = tokenizer.encode(prompt)
    sampling = Sampling(
        temperature, top_k, top_p, key, stop_ids, allowed, logits_fn, min_new_tokens, grammar
    )
    watch = check_watch(cfg, None, patches)
    (row,) = stream_rows(
        cfg,
        params,
        [ids],
        max_new_tokens,
        sampling,
        dtype,
        window_step=window_step,
        watch=watch,
        prefix=prefix,
        drafting=Drafting(lookup, draft, draft_length),
    )
    return _pieces(tokenizer, ids, row, stop_ids, stops, grammar)


def _grammar(
    match: str | Grammar | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    stop_ids: Sequence[int],
    stops: StopStrings,
) -> Grammar | None:
    """Return the grammar of the new text, or None."""
    if match is not None and stops.strings:
        raise ValueError(
            "stop does not work with match, which could not be whole: leave it out, and write how "
            "the text ends into the pattern"
        )
    if isinstance(match, str):
        return compile_grammar(match, tokenizer, vocab_size, stop_ids)
    return None if match is None else check_grammar(match)


def _pieces(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    new: Iterable[int],
    stop_ids: Sequence[int],
    stops: StopStrings,
    grammar: Grammar | None,
) -> Iterator[str]:
    """Yield the text of new ids after a prompt, up to a stop string."""
    ids = grammar.text_of(new) if grammar else drop_stop_tokens(tokenizer, new, stop_ids)
    return stops.cut(tokenizer.decode_stream(ids, after=prompt))


def drop_stop_tokens(
    tokenizer: Tokenizer, ids: Iterable[int], stop_ids: Sequence[int]
) -> Iterator[int]:
    """Yield the ids that are text: all except special tokens that stopped the row."""
    silent = set(tokenizer.special_tokens.values()) & set(stop_ids)
    return (token for token in ids if token not in silent)
