"""`flaxgpt eval`."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Literal

from flaxgpt._checks import check_size
from flaxgpt.cli.common import load_with_tokenizer, progress, say
from flaxgpt.data import read_ids, scan_texts, write_ids
from flaxgpt.evaluation import evaluate_text


@dataclasses.dataclass(frozen=True)
class EvalCommand:
    """Evaluate a model on text: loss, perplexity and bits per byte.

    The text is split into overlapping windows of the context length. With the default stride, each
    token is predicted from at least half a context window, except at the start of the text.

    Example: flaxgpt eval --data book.txt
    """

    data: tuple[str, ...]
    """Text files in UTF-8 or JSON Lines, which may be compressed, or folders of them, evaluated as
    one text."""

    model: str = "tales"
    """A model, as for generate."""

    stride: int | None = None
    """Tokens between the starts of windows, from 1 to the context length; half of it by default."""

    errors: Literal["strict", "replace"] = "strict"
    """For bytes that are not UTF-8: report an error, or replace them with U+FFFD."""

    text_field: str = "text"
    """The field that holds the text in JSON Lines."""

    document_separator: str = ""
    """Text that separates documents in a file, such as <|endoftext|>."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the computation."""

    int8: bool = False
    """Round the weights to int8: a quarter of the memory, and faster on CPU, but less exact."""

    def run(self) -> None:
        """Evaluate, and print the results."""
        if self.stride is not None:
            check_size("--stride", self.stride)
        with progress("reading") as advance:
            text = scan_texts(
                self.data,
                errors=self.errors,
                text_field=self.text_field,
                document_separator=self.document_separator,
                progress=advance,
            )
        for note in text.notes:
            print(note, file=sys.stderr)
        cfg, params, tokenizer = load_with_tokenizer(self.model, int8=self.int8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.npy"
            with progress("tokenizing") as advance:
                write_ids(path, text, tokenizer, progress=advance)
            with progress("evaluating") as advance:
                found = evaluate_text(
                    cfg,
                    params,
                    read_ids(path).ids,
                    stride=self.stride,
                    tokenizer=tokenizer,
                    dtype=self.dtype,
                    progress=advance,
                )
        say(
            f"loss           {found.loss:.4f} nats per token\n"
            f"perplexity     {found.perplexity:.3f}\n"
            f"bits per byte  {found.bits_per_byte:.4f}\n"
            f"{found.tokens} tokens ({found.bytes} bytes) in {found.windows} windows of "
            f"{cfg.context_length}, stride {found.stride}\n"
        )
