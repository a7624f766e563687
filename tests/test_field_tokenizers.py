"""Inputs from the field: files and options as other programs and people leave them."""

import dataclasses
import functools
import json
import lzma
import tempfile
import warnings
from pathlib import Path
from types import MappingProxyType

import hypothesis
import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

import flaxgpt
from command import call
from flaxgpt import GPTConfig
from flaxgpt.cli.generate import _stop_ids
from flaxgpt.generation.text import drop_stop_tokens
from flaxgpt.runs import train
from flaxgpt.runs.folder import Run
from flaxgpt.runs.loop import _sample
from flaxgpt.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    UnreadableTokenizerWarning,
    load_tokenizer,
    text_ids,
)
from flaxgpt.tokenizer.folder import read_tokenizer, save_tokenizer
from flaxgpt.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


@functools.cache
def folder_tokenizer(name):
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), tokenizer_folders()[1][name]["files"])
        return load_tokenizer(folder)


# The folders that transformers wrote with a tokenizer.json.
WRITTEN = [
    name
    for name, folder in tokenizer_folders()[1].items()
    if name.startswith("v") and "tokenizer.json" in folder["files"]
]
texts = st.lists(
    st.text() | st.sampled_from([*tokenizer_folders()[0][-40:], " ", "\n", "word"]),
    max_size=6,
).map("".join)


class TestTokenizerFolders:
    """Tokenizers have the ids that transformers has, or are refused."""

    NEWER = ("v5-llama-added",)
    REFUSED = ("edited-generic-prefix", "edited-llama-no-prefix")

    @pytest.mark.parametrize("name", tokenizer_folders()[1])
    def test_ids_and_decoded_texts_are_those_of_a_version_of_transformers(self, name, tmp_path):
        if name in self.NEWER and tokenizers.__version__ < "0.23":
            pytest.skip("tokenizers 0.22 drops spaces beside added tokens from the decoded text")
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

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "reference"),
        [
            *((name, name) for name in WRITTEN),
            ("v4-slow-gpt2", "v4-gpt2"),
        ],
    )
    @hypothesis.given(text=texts)
    def test_ids_of_any_text_are_those_of_the_library(self, name, reference, text):
        # transformers has applied the settings to each tokenizer.json that it wrote.
        library = tokenizers.Tokenizer.from_str(
            tokenizer_folders()[1][reference]["files"]["tokenizer.json"]
        )
        ids = library.encode(text, add_special_tokens=False).ids
        tokenizer = folder_tokenizer(name)
        assert tokenizer.encode(text, allowed_special="all") == ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
        if not any(token in text for token in tokenizer.special_tokens):
            assert tokenizer.encode(text) == ids

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

    @pytest.mark.parametrize(
        ("file", "contents", "message"),
        [
            ("special_tokens_map.json", {"pad_token": 5}, "'pad_token' holds '5'"),
            ("added_tokens.json", {"<b>": "x"}, "token '<b>' has id 'x'"),
            ("added_tokens.json", {"<b>": -1}, "token '<b>' has id -1"),
            ("added_tokens.json", {"<b>": 330, "<c>": 330}, "330 belongs to both '<b>' and '<c>'"),
            ("added_tokens.json", {"<b>": 331}, "'<b>' has id 331, but the library gives it 330"),
            ("added_tokens.json", {"<b>": 3}, "'<b>' has id 3, but the library gives it 330"),
        ],
    )
    @pytest.mark.parametrize("folder", ["v4-slow-gpt2", "edited-gpt2-prefix"])
    def test_a_damaged_file_beside_the_vocabulary_is_named(
        self, tmp_path, folder, file, contents, message
    ):
        write_folder(folder, tmp_path)
        write_files(tmp_path, {file: contents})
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
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


@functools.cache
def small_model(vocab_size):
    cfg = GPTConfig(vocab_size, context_length=8, emb_dim=4, n_heads=1, n_layers=1)
    return cfg, flaxgpt.init(cfg, jax.random.key(0))


def write_model(folder, vocab_size, files):
    """Save a model without a tokenizer, and write or change files beside it."""
    flaxgpt.save(folder, *small_model(vocab_size))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if "token_id" not in key}
    write_files(folder, files | {"config.json": config | files.get("config.json", {})})


class TestStopIds:
    """The ids that end a text come from the model's files."""

    @pytest.mark.parametrize(
        ("files", "stop_ids"),
        [
            ({}, (0,)),
            ({"config.json": {"eos_token_id": 7}}, (7,)),
            ({"config.json": {"eos_token_id": [7, 8, 7]}}, (7, 8)),
            ({"generation_config.json": {"eos_token_id": 7}}, (7,)),
            ({"generation_config.json": {"eos_token_id": [8, 7]}}, (8, 7)),
            (
                {
                    "generation_config.json": {"eos_token_id": 9},
                    "config.json": {"eos_token_id": 7},
                },
                (9,),
            ),
            ({"generation_config.json": {"eos_token_id": None}}, (0,)),
            ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, (7,)),
            # The default of GPT2Config, whatever the vocabulary.
            ({"config.json": {"bos_token_id": 50256, "eos_token_id": 50256}}, (0,)),
            ({"config.json": {"eos_token_id": [50256, 7]}}, (7,)),
            ({"tokenizer_config.json": {"eos_token": "the"}}, None),
            ({"tokenizer_config.json": {"eos_token": "!"}}, (1,)),
            ({"special_tokens_map.json": {"eos_token": {"content": "!"}}}, (1,)),
            ({"tokenizer_config.json": {"pad_token": "!", "bos_token": "#"}}, (0,)),
            (
                {
                    "tokenizer_config.json": {"eos_token": "!"},
                    "config.json": {"eos_token_id": 7, "bos_token_id": 8, "pad_token_id": 9},
                },
                (7,),
            ),
        ],
    )
    @pytest.mark.parametrize("folder", ["v4-slow-gpt2", "edited-gpt2-prefix"])
    def test_they_are_read_from_the_first_file_that_has_them(
        self, tmp_path, folder, files, stop_ids
    ):
        vocabulary = dict(tokenizer_folders()[1][folder]["files"])
        vocabulary.pop("tokenizer_config.json", None)
        vocabulary.pop("config.json", None)
        write_model(tmp_path, 340, vocabulary | files)
        expected = (330,) if stop_ids is None else stop_ids  # "the" becomes an added token
        assert flaxgpt.load(tmp_path)[2].stop_ids == expected
        assert load_tokenizer(tmp_path).stop_ids == expected

    @pytest.mark.parametrize("folder", ["v4-bert-cased", "v5-bert-uncased", "v4-slow-bert"])
    def test_separators_and_padding_do_not_end_a_text(self, tmp_path, folder):
        write_files(tmp_path, tokenizer_folders()[1][folder]["files"])
        tokenizer = load_tokenizer(tmp_path)
        assert {"[CLS]", "[SEP]", "[PAD]"} < tokenizer.special_tokens.keys()
        assert tokenizer.stop_ids == ()

    @pytest.mark.parametrize(
        ("name", "stop_ids"), [("gpt2", (50256,)), ("tales", (4095,))], ids=str
    )
    def test_those_of_the_package_end_with_the_end_of_text(self, name, stop_ids):
        assert load_tokenizer(name).stop_ids == stop_ids

    def test_those_of_gpt2s_tokenizer_come_from_the_model_too(self, tmp_path):
        write_model(tmp_path, 50257, {"generation_config.json": {"eos_token_id": [50256, 198]}})
        assert flaxgpt.load(tmp_path)[2].stop_ids == (50256, 198)

    @pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
    @pytest.mark.parametrize("value", ["</s>", 1.5, True, ["a"], {}], ids=repr)
    def test_a_value_that_is_no_id_is_named(self, tmp_path, file, value):
        save_tokenizer(CharTokenizer("ab"), tmp_path)
        write_files(tmp_path, {file: {"eos_token_id": value}})
        with pytest.raises(ValueError, match=f"{file}: 'eos_token_id' is .*; expected an id or"):
            read_tokenizer(tmp_path)

    SAVED = (
        lambda: load_tokenizer("gpt2"),
        lambda: load_tokenizer("gpt2").with_stop_ids([198, 50256]),
        lambda: load_tokenizer("gpt2").with_stop_ids([]),
        lambda: CharTokenizer("abc"),
        lambda: CharTokenizer("abc", (1,)),
        lambda: byte_tokenizer({"<|endoftext|>": 256}),
        lambda: byte_tokenizer({"<|endoftext|>": 256, "</s>": 300}, [300, 10]),
        lambda: byte_tokenizer({"<|endoftext|>": 256}, []),
        lambda: folder_tokenizer("v4-gpt2"),
        lambda: folder_tokenizer("v4-gpt2").with_stop_ids([]),
        lambda: folder_tokenizer("v4-gpt2-prefix").with_stop_ids([5, 6]),
        lambda: folder_tokenizer("v4-generic-strip"),
        lambda: folder_tokenizer("v4-slow-bert"),
        lambda: folder_tokenizer("v4-unigram"),
        lambda: folder_tokenizer("v4-llama-added"),
    )

    @pytest.mark.parametrize("layout", ["huggingface", "book"])
    @pytest.mark.parametrize("make", SAVED)
    def test_a_saved_tokenizer_is_loaded_equal(self, tmp_path, make, layout):
        tokenizer = make()
        model = small_model(max(tokenizer.vocab_size, 60))
        flaxgpt.save(tmp_path / "model", *model, layout=layout, tokenizer=tokenizer)
        again = flaxgpt.load(tmp_path / "model")[2]
        assert again == tokenizer and again.stop_ids == tokenizer.stop_ids
        save_tokenizer(tokenizer, tmp_path / "run")
        assert read_tokenizer(tmp_path / "run") == tokenizer

    @pytest.mark.slow
    @pytest.mark.parametrize("folder", ["v4-gpt2", "v5-gpt2-added"])
    def test_a_training_run_keeps_them(self, tmp_path, folder):
        tokenizer = folder_tokenizer(folder).with_stop_ids([5, 6])
        model = small_model(400)
        flaxgpt.save(tmp_path / "model", *model, tokenizer=tokenizer)
        (tmp_path / "text.txt").write_text("the man sat " * 40, encoding="utf-8")
        recipe = TrainConfig(
            data=(str(tmp_path / "text.txt"),),
            init_from=str(tmp_path / "model"),
            steps=1,
            batch_size=1,
            sample_every=0,
        )
        train(model[0], recipe, tmp_path / "run")
        assert flaxgpt.load(tmp_path / "run")[2] == tokenizer

    @pytest.mark.parametrize(
        ("stop_ids", "saved"), [([], None), ([5], 5), ([5, 6], [5, 6])], ids=repr
    )
    def test_the_saved_configuration_has_them(self, tmp_path, stop_ids, saved):
        tokenizer = folder_tokenizer("v4-gpt2").with_stop_ids(stop_ids)
        flaxgpt.save(tmp_path / "model", *small_model(50257), tokenizer=tokenizer)
        config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
        assert (config["bos_token_id"], config["eos_token_id"]) == (0, saved)

    def test_the_command_line_stops_at_them_alone(self, tmp_path):
        cfg, params = small_model(256)
        ids = flaxgpt.generate(cfg, params, [[97]], 8)[0]
        # <s> is beyond the model's vocabulary.
        tokenizer = byte_tokenizer({"<s>": 256}, [ids[3], 256])
        for stop_ids, new in (([], ids), ([ids[3], 256], ids[: ids.index(ids[3]) + 1])):
            saved = tokenizer.with_stop_ids(stop_ids)
            flaxgpt.save(tmp_path / "model", cfg, params, tokenizer=saved)
            options = ("--temperature", 0, "--max-new-tokens", 8, "--model", tmp_path / "model")
            expected = "a" + tokenizer.decode(new) + "\n"
            assert call("generate", "a", *options).stdout.decode() == expected

    def test_the_command_line_does_not_stop_at_other_special_tokens(self):
        tokenizer = folder_tokenizer("v4-gpt2-added")
        cfg = small_model(340)[0]
        assert tokenizer.special_tokens.keys() > {"<|endoftext|>", "<pad>"}
        assert _stop_ids(cfg, tokenizer, ()) == [tokenizer.special_tokens["<|endoftext|>"]]
        assert _stop_ids(cfg, folder_tokenizer("v4-bert-cased"), ()) == []
        assert _stop_ids(cfg, tokenizer, ("<note>", "<pad>")) == [332, 330]


def byte_tokenizer(special_tokens, stop_ids=None):
    ranks = {bytes([byte]): byte for byte in range(256)}
    return BPETokenizer(".|\n", ranks, special_tokens, stop_ids)


class TestMissingTokenizers:
    """`load` says that a model comes without a tokenizer, and does not guess one."""

    @pytest.mark.parametrize("vocab_size", [65, 128, 50256, 50258, 50260, 50304, 51200])
    def test_a_model_of_another_size_without_a_tokenizer_is_a_warning(self, tmp_path, vocab_size):
        write_model(tmp_path, vocab_size, {})
        message = f"no tokenizer for its {vocab_size} tokens: add vocab.json and merges.txt, .* to"
        with pytest.warns(UnreadableTokenizerWarning, match=message):
            assert flaxgpt.load(tmp_path)[2] is None

    @pytest.mark.parametrize(
        "files",
        [
            {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
            {"config.json": {"tokenizer_class": "T5Tokenizer"}},
            {"tokenizer_config.json": {"do_lower_case": True}},
            {"tokenizer_config.json": {"unk_token": "[UNK]", "sep_token": "[SEP]"}},
            {"tokenizer_config.json": {"additional_special_tokens": ["<|user|>"]}},
            {"tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<pad>"}}}},
            {"special_tokens_map.json": {"eos_token": "</s>"}},
            {"special_tokens_map.json": {"cls_token": {"content": "[CLS]", "lstrip": False}}},
            {"added_tokens.json": {"<note>": 50256}},
            {"config.json": {"bos_token_id": 1, "eos_token_id": 2}},
            {"vocab.txt": "[PAD]\n"},
            {"spiece.model": ""},
            {"tokenizer.tiktoken": ""},
            {"my_vocab.json": "{}"},
            {"meta.pkl": ""},
            {"chars.vocab": ""},
            {"tokenizer.pkl": ""},
        ],
        ids=str,
    )
    def test_gpt2s_tokenizer_is_not_assumed_if_the_folder_says_otherwise(self, tmp_path, files):
        write_model(tmp_path, 50257, files)
        with pytest.warns(UnreadableTokenizerWarning, match=r"no tokenizer: .*; add|save_pretrai"):
            assert flaxgpt.load(tmp_path)[2] is None

    @pytest.mark.parametrize(
        "files",
        [
            {},
            {"tokenizer_config.json": {"model_max_length": 1024, "tokenizer_class": None}},
            {"tokenizer_config.json": {"eos_token": "<|endoftext|>", "add_prefix_space": False}},
            {"special_tokens_map.json": {"unk_token": "<|endoftext|>"}},
            {"config.json": {"bos_token_id": 50256, "eos_token_id": 50256}},
            {"config.json": {"eos_token_id": 198}},
            {"generation_config.json": {"eos_token_id": 50256}, "chat_template.jinja": ""},
            {"encoder.json": "{}", "vocab.bpe": ""},  # OpenAI's names for GPT-2's vocabulary
        ],
        ids=str,
    )
    def test_gpt2s_tokenizer_is_assumed_if_everything_agrees(self, tmp_path, files):
        write_model(tmp_path, 50257, files)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = flaxgpt.load(tmp_path)[2]
        assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]

    @pytest.mark.parametrize("folder", ["v4-slow-bert", "v4-bert-cased", "v4-unigram"])
    def test_a_tokenizer_in_the_folder_is_used_whatever_the_vocabulary_size(self, tmp_path, folder):
        write_model(tmp_path, 50257, tokenizer_folders()[1][folder]["files"])
        assert flaxgpt.load(tmp_path)[2] == folder_tokenizer(folder)


class PlainTokenizer:
    """A tokenizer as users write one: without stop ids, and with a gap in its vocabulary."""

    vocab_size = 120
    special_tokens = MappingProxyType({})

    def encode(self, text, *, allowed_special=()):
        return list(text.encode("ascii"))

    def decode(self, ids):
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids, *, after=()):
        return (self.token_bytes(id).decode() for id in ids)

    def token_bytes(self, id):
        if not 32 <= id < 120:
            raise ValueError(f"id {id} is not in the vocabulary")
        return bytes([id])


class TestPaddedVocabularies:
    """A model can have more ids than its tokenizer: ids without text are never generated."""

    TOKENIZERS = (
        lambda: PlainTokenizer(),
        lambda: CharTokenizer("abcdefghij"),
        lambda: byte_tokenizer({"</s>": 300}),
        lambda: folder_tokenizer("v4-gpt2"),
        lambda: folder_tokenizer("v4-slow-bert"),
        lambda: folder_tokenizer("v4-unigram"),
        lambda: folder_tokenizer("v4-llama"),
    )
    options = pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 1.0},
            {"temperature": 5.0, "top_k": 40},
            {"temperature": 1.0, "top_p": 0.9},
            {"temperature": 0.0, "stop_ids": [1]},
        ],
        ids=str,
    )

    @staticmethod
    def keyed(options):
        return options | ({"key": jax.random.key(1)} if options.get("temperature") else {})

    @pytest.mark.slow
    @options
    @pytest.mark.parametrize("make", TOKENIZERS)
    def test_texts_have_no_replacement_character_for_a_missing_token(self, make, options):
        tokenizer = make()
        cfg, params = small_model(512)
        mask = text_ids(tokenizer, 512)
        options, prompts = self.keyed(options), ["a", "abc"]
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        # 20 ids are more than the context.
        rows = flaxgpt.generate(cfg, params, encoded, 20, allowed=mask, **options)
        assert all(mask[id] for row in rows for id in row)
        ids = flaxgpt.stream(cfg, params, encoded[0], 20, allowed=mask, **options)
        assert list(ids) == rows[0]
        texts = flaxgpt.generate_text(cfg, params, tokenizer, prompts, 20, **options)
        silent = drop_stop_tokens(tokenizer, rows[1], options.get("stop_ids", ()))
        assert texts[1] == "".join(tokenizer.decode_stream(silent, after=encoded[1]))

    def test_an_unrestricted_model_would_choose_them(self):
        cfg, params = small_model(512)
        assert any(id >= 120 for id in flaxgpt.generate(cfg, params, [[97]], 20)[0])

    @pytest.mark.parametrize("options", [{}, {"stop_ids": [1]}], ids=str)
    def test_greedy_ids_are_those_of_a_model_without_the_others(self, options):
        cfg, params = small_model(512)
        small = dataclasses.replace(cfg, vocab_size=256)
        rows = {name: {"weight": params[name]["weight"][:256]} for name in ("tok_emb", "out_head")}
        cut = params | rows
        allowed = np.arange(512) < 256
        expected = flaxgpt.generate(small, cut, [[97], [5, 6]], 20, **options)
        assert flaxgpt.generate(cfg, params, [[97], [5, 6]], 20, allowed=allowed, **options) == (
            expected
        )

    def test_top_k_counts_the_allowed_ids(self):
        cfg, params = small_model(512)
        allowed = np.zeros(512, bool)
        allowed[[7, 300]] = True
        options = {"temperature": 100.0, "top_k": 2, "key": jax.random.key(0)}
        (row,) = flaxgpt.generate(cfg, params, [[97]], 40, allowed=allowed, **options)
        assert set(row) == {7, 300}

    def test_a_mask_of_everything_changes_nothing(self):
        cfg, params = small_model(512)
        allowed = np.ones(512, bool)
        expected = flaxgpt.generate(cfg, params, [[97]], 20)
        assert flaxgpt.generate(cfg, params, [[97]], 20, allowed=allowed) == expected

    @pytest.mark.parametrize(
        ("allowed", "message"),
        [
            (np.zeros(512, bool), "allowed is False for every id: allow at least one"),
            (np.ones(511, bool), r"allowed of shape \(511,\) and dtype bool must be bool \[512\]"),
            (np.ones((1, 512), bool), r"allowed of shape \(1, 512\)"),
            (np.ones(512, int), "dtype int64 must be bool"),
            ([1, 2, 3], "dtype int64 must be bool"),
            ("abc", "must be bool"),
        ],
    )
    def test_an_invalid_mask_is_an_error(self, allowed, message):
        cfg, params = small_model(512)
        with pytest.raises(ValueError, match=message):
            flaxgpt.generate(cfg, params, [[97]], 3, allowed=allowed)
        with pytest.raises(ValueError, match=message):
            flaxgpt.stream(cfg, params, [97], 3, allowed=allowed)

    @pytest.mark.parametrize(
        ("make", "size", "ids"),
        [
            (lambda: CharTokenizer("abc"), 3, None),
            (lambda: CharTokenizer("abc"), 2, None),
            (lambda: CharTokenizer("abc"), 5, [0, 1, 2]),
            (lambda: byte_tokenizer({}), 256, None),
            (lambda: byte_tokenizer({"</s>": 258}), 260, [*range(256), 258]),
            (lambda: byte_tokenizer({"</s>": 258}), 258, [*range(256)]),
            (PlainTokenizer, 128, [*range(32, 120)]),
            (lambda: load_tokenizer("gpt2"), 50257, None),
            (lambda: load_tokenizer("gpt2"), 50304, [*range(50257)]),
        ],
    )
    def test_text_ids_are_those_of_tokens(self, make, size, ids):
        mask = text_ids(make(), size)
        assert mask is None if ids is None else np.flatnonzero(mask).tolist() == ids

    def test_a_tokenizer_without_any_id_of_the_model_is_an_error(self):
        with pytest.raises(ValueError, match="none of the model's 30 ids has a token"):
            text_ids(PlainTokenizer(), 30)

    @pytest.mark.parametrize("make", TOKENIZERS[1:])
    def test_an_id_without_a_token_decodes_to_one_u_fffd(self, make):
        tokenizer = make()
        ids = tokenizer.encode("abc")
        text = tokenizer.decode(ids) + "\ufffd\ufffd" + tokenizer.decode(ids)
        padded = [*ids, tokenizer.vocab_size, 10**12, *ids]
        assert tokenizer.decode(padded) == text
        assert "".join(tokenizer.decode_stream(padded)) == text

    @pytest.mark.parametrize("layout", ["huggingface", "book"])
    def test_the_command_line_generates_text_alone(self, tmp_path, layout):
        tokenizer = CharTokenizer("abcdefghij")
        flaxgpt.save(tmp_path / "model", *small_model(512), layout=layout, tokenizer=tokenizer)
        for options in (("--temperature", 0), ("--top-k", 50), ("--n", 3)):
            process = call("generate", "abc", "--model", tmp_path / "model", *options)
            assert process.returncode == 0
            lines = process.stdout.decode().split()
            assert all(len(line) == 103 and set(line) <= set("abcdefghij") for line in lines)

    def test_the_logit_lens_of_a_padded_model_is_drawn(self, tmp_path):
        flaxgpt.save(tmp_path / "model", *small_model(512), tokenizer=CharTokenizer("abcdefghij"))
        out = tmp_path / "lens.png"
        process = call("plot", "lens", "abc", "--model", tmp_path / "model", "--out", out)
        assert process.returncode == 0 and out.exists()

    def test_the_samples_of_a_training_run_are_text_alone(self):
        recipe = TrainConfig(sample_prompt="abc", sample_tokens=30)
        cfg, params = small_model(512)
        run = Run(Path(), cfg, recipe, CharTokenizer("abcdefghij"), None, None, None, None)
        text = _sample(run, params)
        assert len(text) == 33 and set(text) <= set("abcdefghij")
