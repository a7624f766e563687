"""The layouts that flaxgpt reads, some of which it also writes. A new one is listed here."""

from flaxgpt.weights.book import BOOK, INT8
from flaxgpt.weights.huggingface import FLAX, HUGGINGFACE, NANOGPT

LAYOUTS = {"huggingface": HUGGINGFACE, "book": BOOK}  # by the names that `save` takes
READABLE = (*LAYOUTS.values(), NANOGPT, FLAX, INT8)
