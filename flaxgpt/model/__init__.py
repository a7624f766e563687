"""The model, bottom up: `layers`, `visibility`, `attend`, `attention`, `block`, `gpt`.

`intermediates` names the values within it, and `visits` reads and replaces them.

Dimension letters mean the same in every signature, comment and einsum of the project:

    B  batch: rows computed together        N  attention heads (`n_heads`)
    T  query length: ids passed in one call  H  size of one head (`head_dim`), D = N * H
    S  key length: slots of a cache         F  width inside the feed-forward layer, 4 * D
    D  residual stream (`emb_dim`)          L  transformer blocks (`n_layers`)
    V  vocabulary (`vocab_size`)
"""

from flaxgpt.model.attention import MultiHeadAttention
from flaxgpt.model.block import TransformerBlock
from flaxgpt.model.gpt import GPT, extend, forward, init, logits, param_shapes, states
from flaxgpt.model.layers import Embedding, FeedForward, LayerNorm, Linear

__all__ = [
    "GPT",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "TransformerBlock",
    "extend",
    "forward",
    "init",
    "logits",
    "param_shapes",
    "states",
]
