"""Generation: prompts to new token ids or text."""

from flaxgpt.generation.batch import generate, stream
from flaxgpt.generation.text import generate_text

__all__ = ["generate", "generate_text", "stream"]
