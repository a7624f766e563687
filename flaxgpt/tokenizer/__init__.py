"""Tokenizers: text to token ids and back.

GPT-2's and flaxgpt's own vocabularies are computed by tiktoken (`bpe`), those in Hugging Face's
files by the `tokenizers` library (`huggingface`, `reading`, `settings`); `characters` assigns one
id per character.
"""

from flaxgpt.tokenizer.bpe import GPT2_PATTERN, TOKENIZER_NAMES, BPETokenizer
from flaxgpt.tokenizer.characters import CharTokenizer
from flaxgpt.tokenizer.folder import UnreadableTokenizerWarning, load_tokenizer
from flaxgpt.tokenizer.huggingface import HuggingFaceTokenizer
from flaxgpt.tokenizer.protocol import Tokenizer, text_ids

__all__ = [
    "GPT2_PATTERN",
    "TOKENIZER_NAMES",
    "BPETokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "UnreadableTokenizerWarning",
    "load_tokenizer",
    "text_ids",
]
