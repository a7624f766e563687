"""Generation: prompts to new token ids or text.

sampling     logits to ids
decoding     the loop, with the model injected
programs     the loop with the GPT put in, compiled
prompts      prompts and options to arrays
abstract     the same without arrays, to compile for other devices
batch        `generate`
streaming    `stream`
text         `generate_text`
"""

from flaxgpt.generation.batch import generate
from flaxgpt.generation.sampling import Sampling
from flaxgpt.generation.streaming import stream
from flaxgpt.generation.text import generate_text

__all__ = ["Sampling", "generate", "generate_text", "stream"]
