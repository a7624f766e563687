"""Build tests/golden/tokenizer_folders.json.xz: folders that transformers writes, and its ids.

Run it with the Python of one environment per version of transformers, with sentencepiece:

    python scripts/build_tokenizer_folders.py write FOLDERS TEXT  # transformers 4.46.3, then 5.24.0
    python scripts/build_tokenizer_folders.py read FOLDERS        # 4.46.3, 4.57.1 and 5.24.0
    python scripts/build_tokenizer_folders.py pack FOLDERS OUT    # any Python

TEXT is tests/data/verdict/the-verdict.txt, and OUT tests/golden/tokenizer_folders.json.xz.
"""

import json
import lzma
import random
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

TEXTS = [
    "Hello, I am",
    "the man",
    " the man",
    "The Man sat; THE END.",
    "  two  spaces\n\nand lines\r\n",
    "it's they'll I'D",
    "café e\u0301 ÀÉ naïve",
    "汉字と仮名、한국어。",
    "👍🏽 ok",
    "a<|user|>b <|user|> c  <|user|>  d",
    "say <note>, <note> and<note>s notes <NOTE>",
    "word wordy sword word",
    "x<pad></s>y <s> <unk> z",
    "[CLS] a [SEP] b [MASK] [PAD] [UNK]",
    "end<|endoftext|>start",
    "12345 1,000 tabs\tand\u00a0nbsp \u3000 wide",
    "",
    "ﬁ ½ ㎏ İ ß",
]
_FRAGMENTS = [
    *("the", "The", "man", "word", "words", " ", "  ", "\n", "\t", ",", ".", "'s", "-", "1", "23"),
    *("é", "e\u0301", "Ω", "字", "한", "👍", "🏽", "\u00a0", "\u200b", "\x07", "▁", "Ġ", "##", ">"),
    *(
        "<note>",
        "<|user|>",
        "<pad>",
        "</s>",
        "<unk>",
        "<0x41>",
        "[MASK]",
        "<|endoftext|>",
        "<",
        ">",
    ),
]
_random = random.Random(0)
TEXTS += ["".join(_random.choices(_FRAGMENTS, k=_random.randint(2, 12))) for _ in range(40)]


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def edit(folder: Path, name: str, changes: Any, drop: Collection[str] = ()) -> None:
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {key: value for key, value in (values | changes).items() if key not in drop}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def write(root: Path, text: Path) -> None:
    import tokenizers
    import transformers
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    prefix, no_prefix = {"add_prefix_space": True}, {"add_prefix_space": False}
    flags = {"content": "<|endoftext|>", "special": False, "lstrip": True}
    flags = {"added_tokens_decoder": {"0": flags}}
    roberta = {"tokenizer_class": "RobertaTokenizer", "add_bos_token": True}
    roberta |= {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    roberta |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "[MASK]"}
    version = "v" + transformers.__version__.split(".")[0]
    lines = text.read_text(encoding="utf-8").splitlines()[:60]

    def trained(model: Any, trainer: Any, **parts: Any) -> Any:
        tokenizer = Tokenizer(model)
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.train_from_iterator(lines, trainer)
        return tokenizer

    byte_level = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    bert_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def wordpiece(lowercase: bool) -> Any:
        return trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(
                vocab_size=200, special_tokens=bert_tokens, show_progress=False
            ),
            normalizer=normalizers.BertNormalizer(lowercase=lowercase),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
            decoder=decoders.WordPiece(),
        )

    unigram = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=150,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    llama = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
            show_progress=False,
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )

    def save(name: str, tokenizer: Any, **options: Any) -> Path:
        folder = root / f"{version}-{name}"
        tokenizer.save_pretrained(folder, **options)
        return folder

    parts = root / f"{version}-slow-gpt2"  # vocab.json and merges.txt, as GPT-2 was released
    parts.mkdir(parents=True)
    byte_level.model.save(str(parts))

    def gpt2(**options: Any) -> Any:
        if version == "v4":
            return transformers.GPT2TokenizerFast(tokenizer_object=byte_level, **options)
        definition = json.loads(byte_level.to_str())["model"]
        merges = [tuple(pair) for pair in definition["merges"]]
        return transformers.GPT2Tokenizer(vocab=definition["vocab"], merges=merges, **options)

    def bert(lowercase: bool, **options: Any) -> Any:
        tokenizer = wordpiece(lowercase)
        if version == "v4":
            return transformers.BertTokenizerFast(
                tokenizer_object=tokenizer, do_lower_case=lowercase, **options
            )
        vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
        return transformers.BertTokenizer(vocab=vocab, do_lower_case=lowercase, **options)

    def generic(tokenizer: Any, **options: Any) -> Any:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)

    save("gpt2", gpt2())
    save("gpt2-prefix", gpt2(add_prefix_space=True))
    tokenizer = gpt2(pad_token="<pad>", additional_special_tokens=["<|user|>"])
    tokenizer.add_tokens([AddedToken("<note>"), AddedToken("word", single_word=True)])
    save("gpt2-added", tokenizer)
    tokenizer = generic(byte_level, eos_token="</s>", bos_token="<|endoftext|>")
    tokenizer.add_tokens(
        [
            AddedToken("<|user|>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<note>", special=True, lstrip=True),
        ]
    )
    folder = save("generic-strip", tokenizer)
    cased = save("bert-cased", bert(False))
    save("bert-uncased", bert(True))
    tokenizer = bert(True, strip_accents=False)
    tokenizer.add_tokens([AddedToken("<note>", normalized=True)])
    save("bert-accents", tokenizer)
    save("unigram", generic(unigram, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"))
    save("llama", generic(llama, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    tokenizer = generic(llama, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<note>", normalized=True), AddedToken("<|user|>")])
    save("llama-added", tokenizer)
    if version == "v4":
        slow = transformers.GPT2Tokenizer(
            str(parts / "vocab.json"), str(parts / "merges.txt"), add_prefix_space=True
        )
        slow.add_tokens([AddedToken("<note>", lstrip=True)])
        slow.add_special_tokens({"pad_token": "<pad>"})
        save("slow-gpt2-added", slow)
        words = root / "words.txt"
        vocab = wordpiece(False).get_vocab()
        words.write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n", encoding="utf-8")
        save("slow-bert", transformers.BertTokenizer(str(words), do_lower_case=False))
        words.unlink()
        # Folders as older versions and people leave them.
        for name, changes in {
            "gpt2-prefix": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
            "gpt2-class": {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<eot>"},
            "generic-prefix": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_prefix_space": True,
            },
        }.items():
            folder = root / f"edited-{name}"
            folder.mkdir()
            byte_level.save(str(folder / "tokenizer.json"))
            edit(folder, "tokenizer_config.json", changes)
        for name, tokenizer, changes in [
            ("t5-class", unigram, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
            ("llama-class", llama, {"tokenizer_class": "LlamaTokenizer"}),
            ("llama-no-prefix", llama, {"tokenizer_class": "LlamaTokenizer"} | no_prefix),
            ("roberta-class", byte_level, roberta | prefix),
            ("flags", byte_level, {"tokenizer_class": "GPT2Tokenizer"} | flags),
            ("no-class", byte_level, {"eos_token": "<eot>"} | prefix),
        ]:
            folder = root / f"edited-{name}"
            folder.mkdir()
            tokenizer.save(str(folder / "tokenizer.json"))
            edit(folder, "tokenizer_config.json", changes)
            edit(folder, "config.json", {"model_type": "gpt2"})
        for name, changes in {
            "bert-default-case": {},
            "bert-lower": {"do_lower_case": True},
            "bert-chinese": {"do_lower_case": False, "tokenize_chinese_chars": False},
        }.items():
            folder = root / f"edited-{name}"
            shutil.copytree(cased, folder)
            drop = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
            edit(folder, "tokenizer_config.json", changes, set(drop) - set(changes))
        size = byte_level.get_vocab_size()
        for name, tokens_map in {
            "added": {},
            "added-special": {"additional_special_tokens": ["<|user|>"], "pad_token": "<pad>"},
            "map-flags": {"pad_token": {"content": "<pad>", "lstrip": True}},
        }.items():
            for kind in ("fast", "slow"):
                folder = root / f"edited-{kind}-{name}"
                folder.mkdir()
                if kind == "fast":
                    byte_level.save(str(folder / "tokenizer.json"))
                else:
                    byte_level.model.save(str(folder))
                edit(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
                ids = {"<note>": size, "<|user|>": size + 1}
                edit(folder, "added_tokens.json", ids)
                if tokens_map:
                    edit(folder, "special_tokens_map.json", tokens_map)
    config = {"model_type": "gpt2"}
    edit(parts, "config.json", config)
    print(version, tokenizers.__version__, "wrote", len(folders(root)))


def read(root: Path) -> None:
    import transformers

    found: dict[str, Any] = {}
    for folder in folders(root):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            rows = []
            for text in TEXTS:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
                rows.append([ids, tokenizer.decode(ids, **options)])
        except Exception as error:
            print(folder.name, type(error).__name__, str(error)[:200])
            continue
        found[folder.name] = rows
    path = root / f"ids-{transformers.__version__}.json"
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def pack(root: Path, out: Path) -> None:
    answers = {
        path.stem.removeprefix("ids-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(root.glob("ids-*.json"))
    }
    wanted = ("tokenizer", "vocab", "merges", "added", "special", "config")
    packed = []
    for folder in folders(root):
        files = {
            path.name: path.read_text(encoding="utf-8")
            for path in sorted(folder.iterdir())
            if path.name.startswith(wanted)
        }
        rows = {name: found[folder.name] for name, found in answers.items() if folder.name in found}
        packed.append({"name": folder.name, "files": files, "rows": rows})
    contents = json.dumps({"texts": TEXTS, "folders": packed}, ensure_ascii=False)
    out.write_bytes(lzma.compress(contents.encode()))


if __name__ == "__main__":
    steps: dict[str, Callable[..., None]] = {"write": write, "read": read, "pack": pack}
    steps[sys.argv[1]](*map(Path, sys.argv[2:]))
