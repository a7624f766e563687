"""Builds flaxgpt/vocab/gpt2.tiktoken out of OpenAI's two GPT-2 vocabulary files.

    python scripts/build_gpt2_vocab.py [FOLDER] [--out FILE]

FOLDER is a cache folder of tiktoken's: it holds encoder.json and vocab.bpe of
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ under the SHA-1 of their
addresses. The same inputs give the same bytes, and other inputs are refused.
"""

import argparse
import base64
import hashlib
import json
import os
from pathlib import Path

from flaxgpt._files import write_file_atomically
from flaxgpt.tokenizer.folder import byte_level_ranks, read_merges

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# tiktoken_ext/openai_public.py, gpt2().
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_verified(folder: Path, name: str) -> str:
    """The text of one of OpenAI's files.

    Raises:
        FileNotFoundError: `folder` does not hold it.
        ValueError: its contents are not what OpenAI published.
    """
    path = folder / hashlib.sha1((ADDRESS + name).encode()).hexdigest()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} ({name}) is not there; give a folder that tiktoken.get_encoding('gpt2') "
            "filled as its TIKTOKEN_CACHE_DIR"
        )
    contents = path.read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{path} ({name}) has SHA-256 {found}; expected {SHA256[name]}")
    return contents.decode("utf-8")


def build(folder: Path) -> bytes:
    """The ranks in tiktoken's text format: base64 of the token, a space, its id, by rising id."""
    vocab = json.loads(read_verified(folder, "encoder.json"))
    ranks = byte_level_ranks(vocab, read_merges(read_verified(folder, "vocab.bpe")))
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )


def main() -> None:
    shared = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
    parser = argparse.ArgumentParser(description="Builds the GPT-2 vocabulary that flaxgpt ships.")
    parser.add_argument("folder", type=Path, nargs="?", default=shared / "tiktoken_cache")
    parser.add_argument("--out", type=Path, default=ROOT / "flaxgpt" / "vocab" / "gpt2.tiktoken")
    arguments = parser.parse_args()
    contents = build(arguments.folder)
    write_file_atomically(arguments.out, contents)
    print(f"{arguments.out}: {len(contents)} bytes, sha256 {hashlib.sha256(contents).hexdigest()}")


if __name__ == "__main__":
    main()
