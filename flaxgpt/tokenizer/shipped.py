"""The vocabularies inside the package: GPT-2's and that of the `tales` model."""

from __future__ import annotations

import base64
import functools
import importlib.resources

from flaxgpt.tokenizer.bpe import GPT2_PATTERN, BPETokenizer

TOKENIZER_NAMES = ("gpt2", "tales")


@functools.cache
def shipped_tokenizer(name: str) -> BPETokenizer:
    """Return the tokenizer that flaxgpt ships under one of `TOKENIZER_NAMES`."""
    # tiktoken's loader would copy the file to a temporary folder and trust that copy later.
    file = importlib.resources.files("flaxgpt") / "vocab" / f"{name}.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return BPETokenizer(GPT2_PATTERN, ranks, {"<|endoftext|>": len(ranks)})
