"""GPT-2, as in chapter 4 of "Build a Large Language Model (From Scratch)", in JAX and Flax."""

from flaxgpt import _interrupt

_interrupt.exit_quietly_until_ready()

# ruff: noqa: E402
from flaxgpt.cache import KVCache, init_cache
from flaxgpt.config import GPTConfig
from flaxgpt.evaluation import score
from flaxgpt.generation import (
    Prefix,
    PrefixStore,
    Sampling,
    generate,
    generate_text,
    prefill,
    stream,
    stream_text,
)
from flaxgpt.inspection import (
    activation_names,
    activations,
    count_params,
    flops,
    logit_lens,
    memory,
    mfu,
    patch,
)
from flaxgpt.model import GPT, extend, forward, init, logits, states
from flaxgpt.planning import GenerateTask, TrainTask, plan
from flaxgpt.sharding import ShardRules, make_mesh, shard, shard_rules
from flaxgpt.tokenizer import load_tokenizer
from flaxgpt.weights import book_params, dequantize, load, quantize, save

__version__ = "0.1.0"

__all__ = [  # in the order in which data flows
    "GPTConfig",
    "init",
    "book_params",
    "load",
    "save",
    "quantize",
    "dequantize",
    "load_tokenizer",
    "GPT",
    "forward",
    "states",
    "logits",
    "score",
    "KVCache",
    "init_cache",
    "extend",
    "prefill",
    "Prefix",
    "PrefixStore",
    "Sampling",
    "generate",
    "stream",
    "generate_text",
    "stream_text",
    "count_params",
    "flops",
    "mfu",
    "memory",
    "activation_names",
    "activations",
    "patch",
    "logit_lens",
    "GenerateTask",
    "TrainTask",
    "plan",
    "make_mesh",
    "ShardRules",
    "shard_rules",
    "shard",
]
