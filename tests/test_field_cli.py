"""Inputs that people type and environments that they work in, in tables of one line per input."""

import pytest

from command import QUICK, assert_refused, both_ways, call, run

pytestmark = pytest.mark.usefixtures("quick_compilation")

MISSPELLED = [
    ("genrate", "'generate'"),
    ("GENERATE x", "'generate'"),
    ("trian --data x", "'train'"),
    ("param gpt2", "'params'"),
    ("evaluate --data x", "'eval'"),
    ("sample", "'generate'"),
    ("help genrate", "'generate'"),
    ("version", "'--version'"),
    ("--modle tales", "flaxgpt generate --model?"),
    ("--model tales", "flaxgpt generate --model?"),
    ("--max_iters=5", "flaxgpt train --steps?"),
    ("--versoin", "flaxgpt --version?"),
    ("generate --version", "flaxgpt --version?"),
    ("generate --hlep", "--help?"),
    ("generate --promt x", "flaxgpt generate PROMPT"),
    ("generate --prompt x", "flaxgpt generate PROMPT"),
    ("generate --tempratur 1 x", "--temperature?"),
    ("generate --max-token=5 x", "--max-new-tokens?"),
    ("generate --max_tokens 5 x", "--max-new-tokens?"),
    ("generate --num_samples=3 x", "--n?"),
    ("generate -n 3 x", "--n?"),
    ("generate --N 3 x", "--n?"),
    ("generate --no-ecko x", "--no-echo?"),
    ("generate --steps 5 x", "--steps of flaxgpt train?"),
    ("generate --dropout=0.1 x", "--drop-rate of flaxgpt train?"),
    ("train --eval-interval 5", "--eval-every?"),
    ("train --eval_interval=5", "--eval-every?"),
    ("train --max_iters=100", "--steps?"),
    ("train --block_size 64", "--context-length?"),
    ("train --n_embd=64", "--emb-dim?"),
    ("train --lr 1e-3", "--learning-rate?"),
    ("train --output_dir run", "--out?"),
    ("train --gradient_accumulation_steps=4", "--accumulate?"),
    ("train --learning_rte 1", "--learning-rate"),
    ("train --recipe shakespear", "'shakespeare-char'?"),
    ("train --optimizer=adam", "'adamw'?"),
    ("train --windows shift", "'shifted'?"),
    ("generate --dtype flot16 x", "'float16' or 'bfloat16'?"),
    ("generate --dtype=bf16 x", "'bfloat16' or"),
    ("eval --data x --errors strct", "'strict'?"),
    ("params gpt2 --sort nam", "'name'?"),
    ("params --jsn gpt2", "--json?"),
    ("plot atention x", "'attention'?"),
    ("plot --out a.png atention x", "'attention'?"),
]


@pytest.mark.parametrize(("line", "meant"), MISSPELLED)
def test_a_misspelled_name_is_answered_with_the_one_that_was_meant(line, meant):
    process = call(*line.split())
    assert_refused(process, meant)
    assert "did you mean" in process.stderr.decode() or "as in" in process.stderr.decode()


MALFORMED = [
    ("generate x --dtype", "--dtype needs a value"),
    ("generate x --temperature warm", "--temperature 'warm' must be a number"),
    ("generate x --n 1.5", "--n '1.5' must be a whole number"),
    ("generate x --top-p=", "--top-p '' must be a number"),
    ("generate Once upon a time", "unexpected argument 'upon': put a text that has spaces in"),
    ("generate x --echo=false", "--echo takes no value: give --echo or --no-echo"),
    ("train --remat True", "--remat takes no value: give --remat or --no-remat"),
    ("eval", "--data is missing"),
    ("plot", "kind is missing: give one of attention, lens"),
    ("train --max_iters=9 --bogus", "--steps?; unknown option --bogus of flaxgpt train;"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_an_argument_that_cannot_be_parsed_is_named(line, message):
    assert_refused(call(*line.split()), message)


@pytest.mark.parametrize("line", ["genrate", "train --eval-interval 5", "generate --dtype x"])
def test_the_advice_ends_with_the_help_to_read(line):
    errors = call(*line.split()).stderr.decode()
    command = line.split()[0]
    assert errors.endswith(f"see flaxgpt{'' if command == 'genrate' else ' ' + command} --help\n")


@both_ways
def test_without_arguments_the_help_is_printed_and_the_exit_code_is_2(start):
    process = start()
    assert process.returncode == 2
    assert process.stderr == b""
    assert process.stdout == start("--help").stdout


@pytest.mark.parametrize("command", ["", "generate", "train", "eval", "params", "plot"])
def test_help_is_also_a_command(command):
    process = call(*f"help {command}".split())
    assert process.returncode == 0
    assert process.stdout == call(*f"{command} --help".split()).stdout


def test_a_narrow_terminal_does_not_break_the_words_of_an_error():
    process = run("train", "--eval_interval", 5, environment=QUICK | {"COLUMNS": "20"})
    assert_refused(process, "did you mean --eval-every?")
