"""Text to token ids and back, and tokenizers in model folders."""

from flaxgpt.tokenizer.base import (
    GPT2_PATTERN,
    TOKENIZER_NAMES,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "GPT2_PATTERN",
    "TOKENIZER_NAMES",
    "BPETokenizer",
    "CharTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
