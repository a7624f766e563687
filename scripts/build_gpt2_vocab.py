"""Build flaxgpt/vocab/gpt2.tiktoken from OpenAI's two GPT-2 vocabulary files.

    python scripts/build_gpt2_vocab.py [FOLDER] [--out FILE]

FOLDER is tiktoken's cache folder, which contains encoder.json and vocab.bpe from
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ under the SHA-1 of their URLs.
The output is deterministic, and any other input is rejected.
"""

import argparse
import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from flaxgpt._files import write_file_atomically
from flaxgpt.tokenizer.huggingface import byte_letters

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# tiktoken_ext/openai_public.py, gpt2().
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_verified(folder: Path, name: str) -> str:
    """Return the text of one of OpenAI's files.

    Raises:
        FileNotFoundError: `folder` does not contain it.
        ValueError: the contents are not what OpenAI published.
    """
    path = folder / hashlib.sha1((ADDRESS + name).encode()).hexdigest()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} ({name}) does not exist; pass a folder that tiktoken.get_encoding('gpt2') has "
            "used as its TIKTOKEN_CACHE_DIR"
        )
    contents = path.read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{path} ({name}) has SHA-256 {found}; expected {SHA256[name]}")
    return contents.decode("utf-8")


def ranked_lines(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> bytes:
    """Return the bytes and the tokens that merges make, in tiktoken's text format.

    A line is the base64 of a token, a space and its id; the lines are sorted by id. tiktoken merges
    by id, so the ids must increase in the order of the merges.
    """
    letters = byte_letters()
    tokens = [*letters, *(first + second for first, second in merges)]
    return b"".join(
        base64.b64encode(bytes(letters[letter] for letter in token)) + b" %d\n" % vocab[token]
        for token in sorted(tokens, key=vocab.__getitem__)
    )


def build(folder: Path) -> bytes:
    """Return GPT-2's vocabulary in tiktoken's text format."""
    vocab = json.loads(read_verified(folder, "encoder.json"))
    _, *lines = read_verified(folder, "vocab.bpe").splitlines()  # the first is the version
    pairs = (line.split(" ") for line in lines)
    return ranked_lines(vocab, ((first, second) for first, second in pairs))


def main() -> None:
    shared = ROOT / os.environ.get("FLAXGPT_SHARED", "../shared")
    parser = argparse.ArgumentParser(description="Build the GPT-2 vocabulary that flaxgpt ships.")
    parser.add_argument("folder", type=Path, nargs="?", default=shared / "tiktoken_cache")
    parser.add_argument("--out", type=Path, default=ROOT / "flaxgpt" / "vocab" / "gpt2.tiktoken")
    arguments = parser.parse_args()
    contents = build(arguments.folder)
    write_file_atomically(arguments.out, contents)
    print(f"{arguments.out}: {len(contents)} bytes, sha256 {hashlib.sha256(contents).hexdigest()}")


if __name__ == "__main__":
    main()
