"""The first and last steps of scripts/build_tales: learn the vocabulary, package the trained model.

    python scripts/build_tales.py vocabulary train.txt    writes flaxgpt/vocab/tales.tiktoken
    python scripts/build_tales.py package RUN val.txt     writes flaxgpt/models/tales

The vocabulary is a byte-level BPE learned with Hugging Face's `tokenizers` and stored in tiktoken's
format. The weights are rounded to bfloat16, and all results on the card are measured with them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from build_gpt2_vocab import ranked_lines

import flaxgpt
from flaxgpt._files import write_file_atomically
from flaxgpt.data import read_ids
from flaxgpt.evaluation import evaluate_text
from flaxgpt.runs import read_run
from flaxgpt.runs.journal import read_metrics
from flaxgpt.training.optimizer import learning_rate

PACKAGE = Path(__file__).resolve().parent.parent / "flaxgpt"
VOCABULARY = PACKAGE / "vocab" / "tales.tiktoken"
MODEL = PACKAGE / "models" / "tales"
PROCESSOR = "one NVIDIA H100"  # the machine that trained the model, for the card
SIZE = 4096  # with <|endoftext|>

CARD = """# tales

A GPT with {parameters:,} parameters, trained from scratch by flaxgpt on children's classics. It is
included in the package, so it generates text without a download:
`flaxgpt generate "Once upon a time"`.

| | |
| --- | --- |
| architecture | GPT-2 with weight tying: {n_layers} blocks, width {emb_dim}, {n_heads} heads |
| context window | {context_length} tokens |
| tokenizer | byte-level BPE, {vocab_size} tokens, learned from the training text |
| training data | {train_ids:,} tokens ({train_bytes} of text) of children's classics in English |
| training | {steps:,} steps, batch size {batch_size}: {tokens:,} tokens, {epochs:.1f} epochs |
| optimizer | {optimizer}, peak rate {peak}, cosine decay to 0, dropout {drop_rate}, {dtype} |
| training time | {minutes:.1f} minutes at {rate:,.0f} tokens per second on {processor} |
| weights | bfloat16, {size} |
| license | training text: public domain; weights: Apache-2.0, like flaxgpt |

## Evaluation

Bits per byte on held-out text (other books, {val_bytes}). Each token is predicted from at least
half a context window of preceding text.

| | bits per byte |
| --- | --- |
| gzip -9 | {gzip:.3f} |
| xz -9 | {xz:.3f} |
| tales | {bits:.3f} |

The compressors have no training data; they see only the held-out file. The model's loss is
{loss:.4f} nats per token, a perplexity of {perplexity:.1f}.

## Training curve

| step | tokens (millions) | learning rate | validation loss (nats per token) |
| --- | --- | --- | --- |
{curve}
{remark}
## Samples

Temperature 0.8, seeds 0, 1 and 2, unedited:

{samples}

## Limitations

The model imitates the style of old tales and does little else. Most sentences are well formed, but
it loses track of characters and events within a paragraph. It does not answer questions and has no
factual knowledge. The books reflect the prejudices of their time, and the model may repeat them.

To train the model again from the text, run `scripts/build_tales`.
"""


def vocabulary(text: Path) -> None:
    """Learn the merges, with ties between equally frequent pairs broken deterministically."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    write_file_atomically(VOCABULARY, ranked_lines(model["vocab"], model["merges"]))
    print(f"{VOCABULARY}: {len(model['vocab'])} tokens")


def package(run: Path, val_text: Path) -> None:
    """Write the best model of a run, in bfloat16, and its card."""
    _, train_cfg = read_run(run)
    cfg, params, tokenizer = flaxgpt.load(run)
    assert tokenizer is not None
    coarse = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    (MODEL / "README.md").unlink(missing_ok=True)  # `save` refuses to delete a stranger's file
    flaxgpt.save(MODEL, cfg, coarse, tokenizer=tokenizer)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), coarse)

    ids = np.array(tokenizer.encode(val_text.read_text(encoding="utf-8")))
    found = evaluate_text(cfg, params, ids, tokenizer=tokenizer)
    raw = val_text.read_bytes()
    records = read_metrics(run / "metrics.jsonl")
    per_step = train_cfg.batch_size * cfg.context_length
    rates = {r["step"]: r["learning_rate"] for r in records if "learning_rate" in r}
    curve = [
        f"| {r['step']:,} | {r['step'] * per_step / 1e6:.2f} | {rates[r['step']]:.1e} "
        f"| {r['validation_loss']:.4f} |"
        for r in records
        if "validation_loss" in r
    ]
    scheduled = learning_rate(train_cfg)
    others = [
        step
        for step, rate in rates.items()
        if abs(rate - scheduled(step - 1)) > 1e-4 * train_cfg.learning_rate
    ]
    remark = ""
    if others:
        remark = f"""
Up to step {max(others):,}, the run followed a schedule with more steps. It was then resumed with
the settings listed above.
"""
    speed = statistics.median(r["tokens_per_s"] for r in records if "tokens_per_s" in r)
    samples = []
    for seed in range(3):
        prompt = "Once upon a time"
        text = flaxgpt.generate_text(
            cfg, params, tokenizer, [prompt], 150, temperature=0.8, key=jax.random.key(seed)
        )[0]
        samples.append("\n".join(f"> {line}".rstrip() for line in (prompt + text).split("\n")))
    train_ids = read_ids(run / "data" / "train.npy").ids.size
    tokens = train_cfg.steps * per_step
    card = CARD.format(
        parameters=sum(p.size for p in jax.tree.leaves(params)),
        train_ids=train_ids,
        train_bytes=_megabytes(sum(Path(path).stat().st_size for path in train_cfg.data)),
        tokens=tokens,
        epochs=tokens / train_ids,
        minutes=tokens / speed / 60,
        rate=speed,
        processor=PROCESSOR,
        remark=remark,
        size=_megabytes((MODEL / "model.safetensors").stat().st_size),
        val_bytes=_megabytes(len(raw)),
        gzip=8 * len(gzip.compress(raw, 9)) / len(raw),
        xz=8 * len(lzma.compress(raw, preset=9)) / len(raw),
        bits=found.bits_per_byte,
        loss=found.loss,
        perplexity=found.perplexity,
        curve="\n".join(curve),
        samples="\n\n---\n\n".join(samples),
        **cfg.to_dict(),
        **{
            name: getattr(train_cfg, name) for name in ("steps", "batch_size", "optimizer", "dtype")
        },
        peak=train_cfg.learning_rate,
    )
    (MODEL / "README.md").write_text(card, encoding="utf-8")
    print(f"{MODEL}: {found.bits_per_byte:.4f} bits per byte")


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["vocabulary", text]:
            vocabulary(Path(text))
        case ["package", run, val_text]:
            package(Path(run), Path(val_text))
        case _:
            sys.exit(__doc__)
