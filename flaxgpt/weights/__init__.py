"""Weights: loading and saving models in Hugging Face's layout and the book's."""

from flaxgpt.weights.book_init import book_params
from flaxgpt.weights.loading import load, read_config, read_stored_bytes
from flaxgpt.weights.quantize import dequantize, quantize
from flaxgpt.weights.saving import save

__all__ = [
    "book_params",
    "dequantize",
    "load",
    "quantize",
    "read_config",
    "read_stored_bytes",
    "save",
]
