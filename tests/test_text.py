from types import SimpleNamespace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
from flaxgpt import GPTConfig
from flaxgpt.generation.text import drop_stop_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = GPTConfig(vocab_size=50257, context_length=16, emb_dim=8, n_heads=1, n_layers=1)
TOKENIZER = flaxgpt.load_tokenizer("gpt2")
END = 50256


@pytest.fixture(scope="module")
def params():
    return flaxgpt.init(CFG, jax.random.key(0))


def test_the_new_text_alone_is_returned_for_each_prompt(params):
    prompts = ["Hello, I am", "A"]
    texts = flaxgpt.generate_text(CFG, params, TOKENIZER, prompts, 5)
    ids = flaxgpt.generate(CFG, params, [TOKENIZER.encode(p) for p in prompts], 5)
    assert texts == [TOKENIZER.decode(row) for row in ids]


@settings(max_examples=3)
@given(st.integers(0, 1000))
def test_streamed_pieces_join_to_the_generated_text(params, seed):
    # An untrained model says bytes that are no UTF-8: held back, then replaced, on both ways.
    options = {"temperature": 2.0, "key": jax.random.key(seed)}
    (whole,) = flaxgpt.generate_text(CFG, params, TOKENIZER, ["é"], 12, **options)
    ids = flaxgpt.stream(CFG, params, TOKENIZER.encode("é"), 12, **options)
    pieces = list(TOKENIZER.decode_stream(ids))
    assert "".join(pieces) == whole
    assert all(piece.encode("utf-8") for piece in pieces)


def test_a_special_token_that_stops_a_row_is_not_text():
    assert list(drop_stop_tokens(TOKENIZER, [1, 2, END], [END])) == [1, 2]


def test_a_word_that_stops_a_row_is_text():
    assert list(drop_stop_tokens(TOKENIZER, [1, 2], [2])) == [1, 2]


def test_a_special_token_that_stops_nothing_is_shown():
    assert list(drop_stop_tokens(TOKENIZER, [1, END, 2], [])) == [1, END, 2]


def test_an_iterator_of_stop_ids_is_read_once(params):
    always = flaxgpt.generate(CFG, params, [TOKENIZER.encode("A")], 1)[0][0]
    special = SimpleNamespace(
        encode=TOKENIZER.encode,
        decode_stream=TOKENIZER.decode_stream,
        token_bytes=TOKENIZER.token_bytes,
        special_tokens={"first": always},
    )
    assert flaxgpt.generate_text(CFG, params, special, ["A"], 5, stop_ids=iter([always])) == [""]


def test_a_lone_string_is_not_a_list_of_prompts(params):
    with pytest.raises(ValueError, match=r"for one text, use \['Hello'\]"):
        flaxgpt.generate_text(CFG, params, TOKENIZER, "Hello", 5)


def test_an_empty_text_is_refused(params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        flaxgpt.generate_text(CFG, params, TOKENIZER, ["Hello", ""], 5)


def test_a_tokenizer_of_another_model_is_found_out():
    small = GPTConfig(vocab_size=100, context_length=16, emb_dim=8, n_heads=1, n_layers=1)
    params = flaxgpt.init(small, jax.random.key(0))
    with pytest.raises(ValueError, match="encoded with this model's tokenizer"):
        flaxgpt.generate_text(small, params, TOKENIZER, ["Hello"], 5)
