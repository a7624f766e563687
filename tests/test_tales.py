"""The model in the package: its size, quality and loading time."""

import gzip
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxgpt
import golden
from command import ENVIRONMENT, call, run
from flaxgpt.evaluation import evaluate_text
from flaxgpt.training import recipe

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(flaxgpt.__file__).parent / "models" / "tales"
VALIDATION = Path(os.environ.get("FLAXGPT_SHARED", "../shared")) / "data" / "tales" / "val.txt"


@pytest.fixture(scope="module")
def tales():
    return flaxgpt.load("tales")


def test_it_has_the_configuration_and_tokenizer_of_its_recipe(tales):
    cfg, params, tokenizer = tales
    assert cfg == recipe("tales")[0]
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}
    ours = flaxgpt.load_tokenizer("tales")
    assert tokenizer.encode("Once upon a time") == ours.encode("Once upon a time")
    assert tokenizer.vocab_size == ours.vocab_size == cfg.vocab_size


def test_weights_and_vocabulary_take_at_most_12_megabytes():
    files = [*FOLDER.iterdir(), FOLDER.parent.parent / "vocab" / "tales.tiktoken"]
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_it_takes_precedence_over_a_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "tales").mkdir()
    monkeypatch.chdir(tmp_path)
    assert flaxgpt.load("tales")[0] == recipe("tales")[0]
    with pytest.raises(FileNotFoundError, match=r"config\.json|model\.safetensors"):
        flaxgpt.load("./tales")


def bits_per_byte(tales, text):
    cfg, params, tokenizer = tales
    ids = np.array(tokenizer.encode(text))
    return evaluate_text(cfg, params, ids, tokenizer=tokenizer).bits_per_byte


@pytest.mark.slow
def test_it_predicts_an_unseen_story_better_than_gzip_compresses_it(tales):
    raw = (golden.DATA / "verdict" / "the-verdict.txt").read_bytes()
    text = raw.decode().replace("--", "\N{EM DASH}")
    gzipped = 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert bits_per_byte(tales, text) < 0.7 * gzipped


@pytest.mark.slow
def test_it_needs_at_most_1_30_bits_per_byte_on_held_out_books(tales):
    if not VALIDATION.exists():
        pytest.skip(f"{VALIDATION} does not exist: set FLAXGPT_SHARED to the folder that has it")
    assert bits_per_byte(tales, VALIDATION.read_text(encoding="utf-8")) <= 1.30


def test_it_generates_english(tales):
    cfg, params, tokenizer = tales
    prompts = ["Once upon a time"] * 4
    texts = flaxgpt.generate_text(
        cfg, params, tokenizer, prompts, 100, temperature=0.8, key=jax.random.key(0)
    )
    words = " ".join(texts).lower().split()
    common = {"the", "and", "a", "to", "of", "he", "she", "was", "in", "his", "her", "it", "had"}
    assert len(words) > 200
    # English prose has 20 to 33 % of these words, random tokens of the vocabulary less than 2 %.
    assert 0.15 < sum(word in common for word in words) / len(words) < 0.5


def test_loading_it_takes_under_half_a_second():
    program = """
import time
import flaxgpt
start = time.process_time()
flaxgpt.load("tales")
print(time.process_time() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, check=True
    )
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize(
    "start",
    [call, pytest.param(partial(run, environment=ENVIRONMENT), marks=pytest.mark.slow)],
    ids=["call", "run"],
)
def test_it_is_the_default_model_of_the_command_line(start, tales):
    cfg, params, tokenizer = tales
    process = start("generate", "Once upon a time", "--max-new-tokens", 20)
    assert process.returncode == 0, process.stderr
    # Row 0 of `generate` with the default --seed and --temperature.
    (text,) = flaxgpt.generate_text(
        cfg,
        params,
        tokenizer,
        ["Once upon a time"],
        20,
        temperature=0.8,
        key=jax.random.key(0),
        stop_ids=tuple(tokenizer.special_tokens.values()),
    )
    assert process.stdout.decode() == f"Once upon a time{text}\n"
    assert process.stderr == b""
