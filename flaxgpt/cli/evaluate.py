"""`flaxgpt eval`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

from flaxgpt._checks import check_size
from flaxgpt.cli.common import load_with_tokenizer, progress, say
from flaxgpt.data import read_ids, scan_texts, write_ids
from flaxgpt.evaluation import evaluate_text


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measure how well a model predicts text: loss, perplexity, bits per byte.

    Windows of the model's context overlap, so that what is counted has at least half a context
    before it.

    Example: flaxgpt eval --data book.txt
    """

    data: tuple[str, ...]
    """Text files, UTF-8, taken as one text."""

    model: str = "tales"
    """As for generate: "tales", "book", a folder, a run, a safetensors file or a hub id."""

    stride: int | None = None
    """Tokens from one window to the next, 1 to the context; half the context unless given."""

    errors: Literal["strict", "replace"] = "strict"
    """What to do about bytes that are not UTF-8: refuse the file, or read them as U+FFFD."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in."""

    def run(self) -> None:
        """Measures and prints; bad values are found before loading."""
        if self.stride is not None:
            check_size("--stride", self.stride)
        with progress("reading") as advance:
            text = scan_texts(
                [Path(path) for path in self.data], errors=self.errors, progress=advance
            )
        cfg, params, tokenizer = load_with_tokenizer(self.model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.npy"
            with progress("tokenizing") as advance:
                write_ids(path, text, tokenizer, progress=advance)
            with progress("measuring") as advance:
                found = evaluate_text(
                    cfg,
                    params,
                    read_ids(path).ids,
                    stride=self.stride,
                    tokenizer=tokenizer,
                    dtype=self.dtype,
                    progress=advance,
                )
        say(f"loss           {found.loss:.4f} nats per token\n")
        say(f"perplexity     {found.perplexity:.3f}\n")
        say(f"bits per byte  {found.bits_per_byte:.4f}\n")
        say(
            f"of {found.tokens} tokens ({found.bytes} bytes) in {found.windows} windows of "
            f"{cfg.context_length}, stride {found.stride}\n"
        )
