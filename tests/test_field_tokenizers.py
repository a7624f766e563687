"""Inputs from the field: files and options as other programs and people leave them."""

import functools
import json
import lzma
from pathlib import Path

import pytest

from flaxgpt.tokenizer import load_tokenizer

FOLDERS = Path(__file__).parent / "golden" / "tokenizer_folders.json.xz"


@functools.cache
def tokenizer_folders():
    """Folders of tokenizers by name, and the ids and texts of versions of transformers."""
    contents = json.loads(lzma.decompress(FOLDERS.read_bytes()))
    return contents["texts"], {folder["name"]: folder for folder in contents["folders"]}


def write_files(folder, files):
    for name, contents in files.items():
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (folder / name).write_text(text, encoding="utf-8")


def write_folder(name, folder, **changes):
    """Write one of `tokenizer_folders`, with changes to its tokenizer_config.json."""
    write_files(folder, tokenizer_folders()[1][name]["files"])
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    write_files(folder, {"tokenizer_config.json": values | changes})


class TestTokenizerFolders:
    """Tokenizers have the ids that transformers has, or are refused."""

    REFUSED = ("edited-generic-prefix", "edited-llama-no-prefix")

    @pytest.mark.parametrize("name", tokenizer_folders()[1])
    def test_ids_and_decoded_texts_are_those_of_a_version_of_transformers(self, name, tmp_path):
        write_folder(name, tmp_path)
        if name in self.REFUSED:
            with pytest.raises(ValueError, match=r"tokenizer_config.json: 'add_prefix_space' is"):
                load_tokenizer(tmp_path)
            return
        tokenizer = load_tokenizer(tmp_path)
        rows = []
        for text in tokenizer_folders()[0]:
            ids = tokenizer.encode(text, allowed_special="all")
            rows.append([ids, tokenizer.decode(ids)])
        assert rows in tokenizer_folders()[1][name]["rows"].values()

    @pytest.mark.parametrize(
        ("folder", "changes", "text", "first"),
        [
            ("v4-gpt2", {"add_prefix_space": True}, "the man", " the"),
            ("v5-gpt2", {"add_prefix_space": True}, "the man", " the"),
            ("v4-slow-gpt2", {"add_prefix_space": True}, "the man", " the"),
            ("v4-gpt2-prefix", {"add_prefix_space": False}, "the man", "t"),
            ("v4-bert-cased", {"do_lower_case": True}, "HE", "he"),
            ("v4-slow-bert", {"do_lower_case": True}, "HE", "he"),
            ("v4-bert-uncased", {"do_lower_case": False}, "HE", "[UNK]"),
            ("v4-bert-uncased", {"strip_accents": False}, "hé", "[UNK]"),
            ("v4-bert-cased", {"do_lower_case": False, "strip_accents": True}, "hé", "he"),
        ],
    )
    def test_a_setting_in_tokenizer_config_json_is_followed(
        self, tmp_path, folder, changes, text, first
    ):
        write_folder(folder, tmp_path, **changes)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode(text)[:1]) == first

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"add_prefix_space": "yes"}, "'add_prefix_space' is 'yes'; expected true or false"),
            ({"tokenizer_class": 5}, "'tokenizer_class' is 5; expected a name"),
            ({"eos_token": 5}, "'eos_token' holds '5'; expected a token"),
            ({"eos_token": {"content": "a", "lstrip": 1}}, "'eos_token' .* must be true or false"),
            ({"added_tokens_decoder": ["a"]}, "'added_tokens_decoder' must give a token for each"),
            ({"added_tokens_decoder": {"x": "a"}}, "'added_tokens_decoder' must give a token"),
            ({"added_tokens_decoder": {"9": None}}, "'added_tokens_decoder' holds 'None'"),
            (
                {"added_tokens_decoder": {"999": {"content": "<b>"}}},
                "added token '<b>' has id 999, but the library gives it 330",
            ),
            ({"extra_special_tokens": "<b>"}, "'extra_special_tokens' is '<b>'; expected a list"),
        ],
    )
    def test_a_setting_that_cannot_be_followed_is_named(self, tmp_path, changes, message):
        write_folder("v4-gpt2", tmp_path, **changes)
        with pytest.raises(ValueError, match="tokenizer_config.json: " + message):
            load_tokenizer(tmp_path)


class TestOrdinaryAddedTokens:
    """Added tokens that are not special are vocabulary like any other."""

    @pytest.mark.parametrize(
        "files",
        [
            {"added_tokens.json": {"<note>": 330}},
            {"tokenizer_config.json": {"added_tokens_decoder": {"330": {"content": "<note>"}}}},
            {
                "added_tokens.json": {"<note>": 330},
                "special_tokens_map.json": {"pad_token": "<|endoftext|>"},
            },
        ],
        ids=["added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"],
    )
    @pytest.mark.parametrize("folder", ["v4-slow-gpt2", "edited-gpt2-prefix"])
    def test_they_are_recognized_in_text_and_decoded(self, tmp_path, folder, files):
        write_files(tmp_path, tokenizer_folders()[1][folder]["files"])
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        write_files(tmp_path, files)
        tokenizer = load_tokenizer(tmp_path)
        assert "<note>" not in tokenizer.special_tokens
        ids = tokenizer.encode("a<note>b")
        assert 330 in ids and tokenizer.decode(ids) == "a<note>b"
