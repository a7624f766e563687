"""Generation: prompts to new token ids or text.

sampling     logits to ids
hooks        functions that change logits first
grammar      text that matches a regular expression
log_probs    how likely the new ids were
observed     intermediate values to record and to replace
recording    how the loop does it
decoding     the loop, with the model injected
beams        the loop of beam search, also with the model injected
speculation  the loop that verifies several drafted ids at once, also with the model injected
lookup       drafts from earlier text
draft_model  drafts from a smaller model
programs     `decoding` and `beams` with the GPT put in, compiled
speculative_programs  `speculation` with the GPT put in
prompt_reading  prompts, read a few rows at a time
loop_params  parameters as the loop reads them
prefix       what prompts begin with, read before
prompts      prompts and options to arrays
abstract     the same without arrays, to compile for other devices
beam_options the options of beam search, and its results
drafting     the options of drafts
prefilling   `prefill`, which makes a prefix
prefix_store prefixes that repeat
batch        `generate`
streaming    `stream`
stop_strings where a text ends
text         `generate_text` and `stream_text`
"""

from flaxgpt.generation.batch import generate
from flaxgpt.generation.beam_options import Beam
from flaxgpt.generation.grammar import Grammar, compile_grammar
from flaxgpt.generation.log_probs import ScoredIds
from flaxgpt.generation.observed import ObservedIds
from flaxgpt.generation.prefilling import prefill
from flaxgpt.generation.prefix import Prefix
from flaxgpt.generation.prefix_store import PrefixStore
from flaxgpt.generation.sampling import Sampling
from flaxgpt.generation.streaming import stream
from flaxgpt.generation.text import generate_text, stream_text

__all__ = [
    "Beam",
    "Grammar",
    "ObservedIds",
    "Prefix",
    "PrefixStore",
    "Sampling",
    "ScoredIds",
    "compile_grammar",
    "generate",
    "generate_text",
    "prefill",
    "stream",
    "stream_text",
]
