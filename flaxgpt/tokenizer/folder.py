"""Tokenizers in model folders: flaxgpt's own file, and Hugging Face's."""

import base64
import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxgpt._files import write_file_atomically
from flaxgpt.tokenizer import (
    GPT2_PATTERN,
    TOKENIZER_NAMES,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

FILE_NAME = "flaxgpt_tokenizer.json"


class UnreadableTokenizerWarning(UserWarning):
    """A model was loaded without its tokenizer, which flaxgpt cannot read."""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `flaxgpt_tokenizer.json` into `folder`, which is made if need be.

    A tokenizer that ships with flaxgpt is written as its name, any other as its whole vocabulary.

    Raises:
        ValueError: `tokenizer` is neither a `BPETokenizer` nor a `CharTokenizer`.
    """
    recipe = tokenizer_recipe(tokenizer)
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, (json.dumps(recipe) + "\n").encode("utf-8"))


def tokenizer_recipe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `save_tokenizer` writes of a tokenizer: a JSON object that defines it.

    Returns:
        Under "kind" the name of a tokenizer that ships with flaxgpt, else "characters" or "bpe",
        with the whole vocabulary beside it.

    Raises:
        ValueError: `tokenizer` is neither a `BPETokenizer` nor a `CharTokenizer`.
    """
    recipe = _whole_recipe(tokenizer)
    for name in TOKENIZER_NAMES:
        if recipe == _whole_recipe(load_tokenizer(name)):
            return {"kind": name}
    return recipe


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads a folder's `flaxgpt_tokenizer.json`, else what `tokenizer_from_huggingface` finds.

    Returns:
        The tokenizer, or None where the folder holds none.

    Raises:
        ValueError: the file is broken or of an unknown kind; names the file.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return tokenizer_from_huggingface(folder)
    with _blaming(path):
        recipe = _json_object(path)
        kind = recipe.get("kind")
        if kind in TOKENIZER_NAMES:
            return load_tokenizer(kind)
        if kind == "characters":
            return CharTokenizer(_entry(recipe, "characters", str))
        if kind == "bpe":
            return BPETokenizer(
                _entry(recipe, "pattern", str),
                {
                    base64.b64decode(token, validate=True): id
                    for token, id in _entry(recipe, "ranks", dict).items()
                },
                _entry(recipe, "special_tokens", dict),
            )
        kinds = ", ".join(map(repr, (*TOKENIZER_NAMES, "characters", "bpe")))
        raise ValueError(f"kind is {kind!r}; expected one of {kinds}")


def tokenizer_from_huggingface(folder: Path) -> BPETokenizer | None:
    """Builds GPT-2's kind of tokenizer from the files Hugging Face keeps beside a model.

    `tokenizer.json` is read where there is one, else `vocab.json` with `merges.txt` and, if
    present, `added_tokens.json`. Tokens that no merge makes, and all added tokens, become special
    tokens: unlike in transformers, text encodes to them only when `encode` is asked to.

    Returns:
        The tokenizer, or None where the folder has neither.

    Raises:
        ValueError: a file is broken, or describes a tokenizer that would give other ids here than
            in transformers; names the file and what is wrong.
    """
    whole = Path(folder) / "tokenizer.json"
    if whole.exists():
        with _blaming(whole):
            return _byte_level_bpe(*_from_tokenizer_json(_json_object(whole)))
    vocab_path, merges_path = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    if not vocab_path.exists() and not merges_path.exists():
        return None
    for path, other in ((vocab_path, merges_path), (merges_path, vocab_path)):
        if not path.exists():
            raise ValueError(f"{path} is missing, though {other.name} is there; both are needed")
    added_path = Path(folder) / "added_tokens.json"
    added = {}
    if added_path.exists():
        with _blaming(added_path):
            added = _json_object(added_path)
    with _blaming(vocab_path):
        vocab = _json_object(vocab_path)
    with _blaming(merges_path):
        merges = read_merges(merges_path.read_text(encoding="utf-8"))
    with _blaming(f"{vocab_path} with {merges_path.name}"):
        return _byte_level_bpe(vocab, merges, added)


def read_merges(text: str) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt` (or of OpenAI's `vocab.bpe`), first merged first.

    Raises:
        ValueError: a line is not two tokens with a space between.
    """
    merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        # Only the first line can be a comment: "# #" is a merge like any other.
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"line {number} is {line!r}; expected two tokens, a space between")
        merges.append((parts[0], parts[1]))
    return merges


def byte_level_ranks(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> dict[bytes, int]:
    """The tokens that merges make, as bytes with their ids: what `tiktoken.Encoding` merges by.

    The two say the same thing differently. Hugging Face merges the *pairs* listed, earliest
    first; tiktoken merges whatever makes a *token*, lowest id first. They agree on every text if
    ids rise in merge order and every token, encoded by the listed pairs alone, comes out whole
    (then no other pair can ever stand where it would make that token). Both are checked here.

    Args:
        vocab: tokens in GPT-2's printable spelling of bytes, and their ids.
        merges: the pairs, in order.

    Raises:
        ValueError: a byte or a merged token has no id, or tiktoken would encode otherwise.
    """
    spelling = _printable_bytes()
    absent = [byte for byte, letter in spelling.items() if letter not in vocab]
    if absent:
        raise ValueError(
            f"{len(absent)} of the 256 bytes have no token, the first {spelling[absent[0]]!r} "
            f"(0x{absent[0]:02x}); expected a byte-level vocabulary, which holds all"
        )
    made = {letter: vocab[letter] for letter in spelling.values()}
    order = {pair: place for place, pair in enumerate(merges)}
    highest = -1
    for first, second in merges:
        token, merge = first + second, f"merge {first!r} {second!r}"
        for part in (first, second):
            if part not in made:
                raise ValueError(f"{merge} needs {part!r}, which no earlier merge makes")
        if token not in vocab:
            raise ValueError(f"{merge} makes {token!r}, which is not in the vocabulary")
        if vocab[token] <= highest:
            raise ValueError(
                f"{merge} makes id {vocab[token]} after id {highest}; expected ids to rise in the "
                "order of the merges, as in GPT-2: tiktoken merges by id"
            )
        highest = made[token] = vocab[token]
        if (alone := _merged(token, order)) != [token]:
            raise ValueError(
                f"{merge} makes {token!r}, yet that encodes to {alone}, so tiktoken, which knows "
                "tokens but no pairs, would encode some texts otherwise"
            )
    byte_of = {letter: byte for byte, letter in spelling.items()}
    return {bytes(byte_of[letter] for letter in token): id for token, id in made.items()}


def _merged(token: str, order: Mapping[tuple[str, str], int]) -> list[str]:
    parts = list(token)
    while len(parts) > 1:
        places = [order.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        earliest = min(places)
        if earliest == math.inf:
            break
        at = places.index(earliest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _printable_bytes() -> dict[int, str]:
    # GPT-2 spells bytes as printable characters, so that a token is a word without spaces in a
    # text file: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def _byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, int]
) -> BPETokenizer:
    for token, id in vocab.items():
        if type(id) is not int or id < 0:
            raise ValueError(f"token {token!r} has id {id!r}; expected an integer from 0 on")
    ranks = byte_level_ranks(vocab, merges)
    made = set(_printable_bytes().values()) | {first + second for first, second in merges}
    special_tokens = {token: id for token, id in vocab.items() if token not in made} | dict(added)
    for token, id in special_tokens.items():
        if vocab.get(token, id) != id:
            raise ValueError(
                f"added token {token!r} has id {id}, but {vocab[token]} in the vocabulary"
            )
        # In ASCII a token's printable spelling is its text; elsewhere there is no telling which
        # of the two a token was meant in unless it is listed as added.
        if token not in added and not token.isascii():
            raise ValueError(
                f"token {token!r} (id {id}) is made by no merge, nor is it an added token; "
                "expected merges for the whole vocabulary"
            )
    return BPETokenizer(GPT2_PATTERN, ranks, special_tokens)


def _from_tokenizer_json(
    data: dict[str, Any],
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    model = _entry(data, "model", dict)
    # What GPT-2's own files say (None: or nothing); all else would give other ids or other text.
    for path, expected in (
        ("model.type", ["BPE", None]),
        ("model.dropout", [None, 0]),
        ("model.continuing_subword_prefix", [None, ""]),
        ("model.end_of_word_suffix", [None, ""]),
        ("normalizer", [None]),
        ("pre_tokenizer.type", ["ByteLevel"]),
        ("pre_tokenizer.add_prefix_space", [False]),
        ("pre_tokenizer.use_regex", [True, None]),
        ("post_processor.type", ["ByteLevel", "TemplateProcessing", None]),
        ("post_processor.special_tokens", [{}, None]),  # a template can add no others
        ("decoder.type", ["ByteLevel"]),
    ):
        found: Any = data
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found not in expected:
            raise ValueError(
                f"{path} is {json.dumps(found)[:100]}; only {json.dumps(expected[0])} is supported"
            )

    added = {}
    for token in _entry({"added_tokens": [], **data}, "added_tokens", list):
        content = _entry(token, "content", str)
        for trait in ("lstrip", "rstrip", "single_word"):
            if token.get(trait):
                raise ValueError(f"added token {content!r} has {trait}, which is not supported")
        added[content] = _entry(token, "id", int)

    # A pair is "a b" in older files, ["a", "b"] in newer ones.
    merges = []
    for place, merge in enumerate(_entry(model, "merges", list)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise ValueError(f"model.merges[{place}] is {merge!r}; expected two tokens")
        merges.append((parts[0], parts[1]))
    return _entry(model, "vocab", dict), merges, added


def _whole_recipe(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, CharTokenizer):
        return {"kind": "characters", "characters": tokenizer.characters}
    if isinstance(tokenizer, BPETokenizer):
        return {
            "kind": "bpe",
            "pattern": tokenizer.pattern,
            "ranks": {
                base64.b64encode(token).decode("ascii"): id for token, id in tokenizer.ranks.items()
            },
            "special_tokens": tokenizer.special_tokens,
        }
    raise ValueError(
        f"cannot save a tokenizer of type {type(tokenizer).__name__}; "
        "expected a BPETokenizer or a CharTokenizer"
    )


def _json_object(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"holds a JSON {type(data).__name__}; expected an object")
    return data


def _entry(data: object, key: str, kind: type) -> Any:
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} is {str(value)[:60]!r}; expected {kind.__name__}")
    return value


@contextlib.contextmanager
def _blaming(path: Path | str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
