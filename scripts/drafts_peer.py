"""Time Hugging Face's `generate` with and without prompt lookup, for scripts/drafts.py.

Reads JSON objects from standard input, one per line: first the model and the text, then one per
call. Prints how many seconds each call took. The weights are random, and a logits processor makes
the model write the text, as there.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Serve calls until standard input ends."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

    task = json.loads(sys.stdin.readline())
    cfg, text = task["cfg"], task["ids"]
    config = GPT2Config(
        vocab_size=cfg["vocab_size"],
        n_positions=cfg["context_length"],
        n_embd=cfg["emb_dim"],
        n_head=cfg["n_heads"],
        n_layer=cfg["n_layers"],
    )
    model = GPT2LMHeadModel(config).eval().to(getattr(torch, task["dtype"]))
    prompt = torch.tensor([text[: -task["new_tokens"]]] * task["batch"])

    class Write(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            right = text[min(input_ids.shape[1], len(text) - 1)]
            scores = scores.clone()
            scores[:, right] = 1e9
            return scores

    for line in sys.stdin:
        options = {}
        if lookup := json.loads(line)["lookup"]:
            options["prompt_lookup_num_tokens"] = lookup
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=task["new_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([Write()]),
                **options,
            )
        seconds = time.perf_counter() - start
        assert out[0].tolist() == text
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
