"""The command line: arguments, streams, exit codes and signals."""

import dataclasses
import os
import pty
import re
import shutil
import signal
import string
import subprocess

import jax
import pytest

import flaxgpt
from command import COMMAND, QUICK, assert_refused, both_ways, call
from flaxgpt import GPTConfig
from flaxgpt.generation import hooks
from flaxgpt.tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer

GREEDY = ("--temperature", "0")
BEAMS = (*GREEDY, "--beams", "4")
CFG = GPTConfig(vocab_size=100, context_length=16, emb_dim=16, n_heads=2, n_layers=1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with a vocabulary of 100 characters."""
    path = tmp_path_factory.mktemp("models") / "chars"
    params = flaxgpt.init(CFG, jax.random.key(0))
    flaxgpt.save(path, CFG, params, tokenizer=CharTokenizer(string.printable))
    return path


def expected(folder, prompt, new, **options):
    cfg, params, tokenizer = flaxgpt.load(folder)
    return flaxgpt.generate_text(cfg, params, tokenizer, [prompt], new, **options)[0]


@both_ways
def test_generate_prints_only_the_prompt_and_its_continuation(start, folder):
    process = start("generate", "Hello", "--model", folder, "--max-new-tokens", 6, *GREEDY)
    assert process.returncode == 0
    assert process.stdout.decode() == "Hello" + expected(folder, "Hello", 6) + "\n"
    assert process.stderr == b""


def test_generate_prints_the_best_beam(folder):
    flags = (*GREEDY, "--beams", 3, "--length-penalty", 0.5, "--max-new-tokens", 6)
    process = call("generate", "Hello", "--model", folder, *flags)
    best = expected(folder, "Hello", 6, beams=3, length_penalty=0.5)
    assert process.stdout.decode() == f"Hello{best}\n"


@pytest.mark.slow
def test_drafted_tokens_are_printed_like_others(folder):
    flags = ("--model", folder, "--max-new-tokens", 12, *GREEDY)
    plain = call("generate", "Hello Hello", *flags).stdout
    assert plain.decode() == "Hello Hello" + expected(folder, "Hello Hello", 12) + "\n"
    for drafts in (("--lookup", 3), ("--draft", folder)):
        assert call("generate", "Hello Hello", *flags, *drafts).stdout == plain


def test_a_draft_model_with_another_tokenizer_is_refused(folder, byte_folder):
    process = call("generate", "Hello", "--model", folder, "--draft", byte_folder)
    assert_refused(process, "splits the prompt into other tokens than --model")


@both_ways
def test_the_prompt_can_come_from_standard_input(start, folder):
    options = ("--model", folder, "--max-new-tokens", 6, "--no-echo", *GREEDY)
    whole = expected(folder, "Hello\nyou", 6) + "\n"
    assert start("generate", *options, stdin="Hello\nyou\n").stdout.decode() == whole
    assert start("generate", "-", *options, stdin="Hello\nyou").stdout.decode() == whole


@both_ways
def test_sampling_matches_the_rows_of_the_library(start, folder):
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
    flags = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--n", 2)
    process = start("generate", "Hi", "--model", folder, "--max-new-tokens", 8, *flags, "--no-echo")
    cfg, params, tokenizer = flaxgpt.load(folder)
    rows = flaxgpt.generate_text(
        cfg, params, tokenizer, ["Hi", "Hi"], 8, key=jax.random.key(5), **options
    )
    assert process.stdout.decode() == f"{rows[0]}\n\n{rows[1]}\n"


@pytest.mark.slow
@both_ways
def test_options_of_hooks_are_those_of_the_library(start, folder):
    hook = hooks.chain(
        hooks.penalize_repetition(1.3), hooks.no_repeat_ngram(2), hooks.min_p(0.05, 0.9)
    )
    options = {"temperature": 0.9, "logits_fn": hook, "stop_ids": [*range(50)]}
    options |= {"min_new_tokens": 9, "window_step": 4, "key": jax.random.key(0)}
    flags = ["--repetition-penalty", 1.3, "--no-repeat-ngram", 2, "--min-p", 0.05]
    flags += ["--min-new-tokens", 9, "--window-step", 4, "--temperature", 0.9]
    flags += [f"--stop={id}" for id in range(50)]
    process = start("generate", "Hi", "--model", folder, "--max-new-tokens", 40, *flags)
    assert process.stdout.decode() == f"Hi{expected(folder, 'Hi', 40, **options)}\n"


@pytest.mark.slow
@both_ways
def test_the_new_text_matches_a_pattern(start, folder):
    flags = ("--match", "(yes|no), [0-9]{1,3}", "--stop", "\n", "--n", 2, "--no-echo")
    process = start("generate", "Hi", "--model", folder, "--max-new-tokens", 9, *flags)
    assert re.fullmatch("(yes|no), [0-9]{1,3}\n\n(yes|no), [0-9]{1,3}\n", process.stdout.decode())


@both_ways
def test_a_stop_token_ends_the_text(start, folder):
    free = expected(folder, "Hello", 12)
    stop = free[3]
    flags = ("--model", folder, "--max-new-tokens", 12, "--stop", stop, "--stop", "99", *GREEDY)
    process = start("generate", *flags, "Hello")
    assert process.stdout.decode() == "Hello" + free[: free.index(stop) + 1] + "\n"


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    """A saved model whose tokens are the 256 bytes and, beyond its vocabulary, a special token."""
    path = tmp_path_factory.mktemp("models") / "bytes"
    cfg = dataclasses.replace(CFG, vocab_size=256)
    tokenizer = BPETokenizer(GPT2_PATTERN, {bytes([i]): i for i in range(256)}, {"<|pad|>": 256})
    flaxgpt.save(path, cfg, flaxgpt.init(cfg, jax.random.key(0)), tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A saved model with the vocabulary of GPT-2 and no tokenizer."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    cfg = dataclasses.replace(CFG, vocab_size=50257)
    flaxgpt.save(path, cfg, flaxgpt.init(cfg, jax.random.key(0)))
    return path


@both_ways
@pytest.mark.parametrize(
    "model", ["byte_folder", pytest.param("gpt2_folder", marks=pytest.mark.slow)]
)
def test_output_is_valid_utf8_even_from_an_untrained_model(start, model, request):
    folder = request.getfixturevalue(model)
    flags = ("--temperature", 2, "--max-new-tokens", 30, "--no-echo")
    process = start("generate", "é", "--model", folder, *flags)
    stop_ids = (50256,) if model == "gpt2_folder" else ()
    options = {"temperature": 2.0, "key": jax.random.key(0), "stop_ids": stop_ids}
    whole = expected(folder, "é", 30, **options)
    if model == "byte_folder":  # whose ids are mostly bytes that are not valid UTF-8
        assert "\N{REPLACEMENT CHARACTER}" in whole
    assert process.stdout.decode("utf-8", errors="strict") == whole + "\n"


def cpu_seconds(command):
    # CPU time, because other processes may keep the machine busy.
    before = os.times()
    process = subprocess.run(command, env=QUICK, capture_output=True, check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4]), process.stdout.decode()


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--version", flaxgpt.__version__),
        pytest.param("--help", "generate", marks=pytest.mark.slow),
    ],
)
def test_version_and_help_answer_within_two_seconds(flag, answer):
    taken, printed = cpu_seconds([*COMMAND, flag])
    assert answer in printed
    if taken >= 2:  # on a slow machine
        assert taken < 2 * cpu_seconds([COMMAND[0], "-c", "import jax"])[0]


def test_importing_flaxgpt_takes_at_most_300_milliseconds_beyond_jax_and_flax():
    program = """
import jax, flax.linen, sys
import flaxgpt
heavy = {"grain", "huggingface_hub", "matplotlib", "optax", "orbax", "tokenizers", "tyro"}
print(heavy & sys.modules.keys())
"""
    process = subprocess.run(
        [COMMAND[0], "-X", "importtime", "-c", program], env=QUICK, capture_output=True, check=True
    )
    assert process.stdout.decode() == "set()\n"
    *_, (microseconds, _) = [
        line.split("|")[1:]
        for line in process.stderr.decode().splitlines()
        if line.endswith("| flaxgpt")
    ]
    assert int(microseconds) < 300_000


@both_ways
def test_help_of_a_command_lists_its_options(start):
    text = start("generate", "--help").stdout.decode()
    for option in (
        "--model",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--seed",
        "--stop",
        "--dtype",
    ):
        assert option in text


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tempratur", 1], "unknown option --tempratur of flaxgpt generate"),
        (["--top-k", "many"], "--top-k"),
        (["--dtype", "int8"], "--dtype"),
        (["--temperature", -1], "temperature=-1.0 must be 0"),
        (["--temperature", "nan"], "temperature=nan must be 0"),
        (["--top-p", 1.5], "top_p=1.5 must be above 0"),
        (["--top-k", 0], "top_k=0 must be a whole number"),
        (["--max-new-tokens", 0], "--max-new-tokens=0 must be a whole number"),
        ([*GREEDY, "--n", 3], "--n 3 at --temperature 0 would print the same text 3 times"),
        (["--seed", -1], "--seed -1 must be from 0"),
        (["--beams", 0], "--beams=0 must be a whole number"),
        (["--beams", 4], "--beams 4 searches for the most likely text"),
        ([*GREEDY, "--beams", 4, "--top-k", 2], "top_k=2 is an option of sampling"),
        ([*GREEDY, "--length-penalty", 2], "length_penalty=2.0 has no effect without beam search"),
        (["--min-p", 2], "--min-p 2.0 must be above 0 and at most 1"),
        ([*GREEDY, "--min-p", 0.1], "--min-p has no effect at --temperature 0"),
        (["--repetition-penalty", 0], "--repetition-penalty=0.0 must be a positive number"),
        (["--no-repeat-ngram", 0], "--no-repeat-ngram=0 must be a whole number"),
        (["--min-new-tokens", 101], "--min-new-tokens 101 exceeds --max-new-tokens 100"),
        (["--window-step", 0], "--window-step=0 must be a whole number"),
        (["--match", "("], "pattern '(' is not valid"),
        (["--match", "a", "--min-new-tokens", 3], "--min-new-tokens does not work with --match"),
        (["--match", "a", "--stop-text", "b"], "--match does not work with --stop-text"),
        ([*BEAMS, "--match", "a"], "--match does not work with --beams"),
        ([*BEAMS, "--repetition-penalty", 2], "--repetition-penalty does not work with --beams"),
        ([*BEAMS, "--min-new-tokens", 2], "--min-new-tokens does not work with --beams"),
        ([*BEAMS, "--window-step", 2], "--window-step does not work with --beams"),
        (["--lookup", 0], "--lookup=0 must be a whole number"),
        (["--lookup", 2, "--draft", "tales"], "--lookup and --draft both draft tokens"),
        ([*GREEDY, "--lookup", 2, "--beams", 2], "--lookup does not work with --beams"),
    ],
)
def test_an_invalid_option_is_an_error_before_the_model_is_loaded(start, arguments, message):
    process = start("generate", "Hello", "--model", "no/such/model/anywhere", *arguments)
    assert_refused(process, message)


@both_ways
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "Hello", "--model", "./nowhere"], "nowhere"),
        (["generate", ""], "the prompt is empty"),
        (["generate"], "the prompt is empty"),
        (["generat", "Hello"], "generat"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_code_2(start, arguments, message):
    assert_refused(start(*arguments), message)


@both_ways
def test_text_that_the_tokenizer_cannot_encode_is_an_error(start, folder):
    assert_refused(start("generate", "né", "--model", folder), "'é'")


@both_ways
def test_a_stop_text_of_several_tokens_is_an_error(start, folder):
    process = start("generate", "a", "--model", folder, "--stop", "abc")
    assert_refused(process, "--stop 'abc' is 3 tokens")


@both_ways
def test_a_model_without_a_tokenizer_is_an_error(start, tmp_path):
    flaxgpt.save(tmp_path / "bare", CFG, flaxgpt.init(CFG, jax.random.key(0)))
    process = start("generate", "a", "--model", tmp_path / "bare")
    assert_refused(process, "has no tokenizer for its 100 tokens")


@both_ways
def test_an_unreadable_tokenizer_is_an_error_before_the_weights_are_loaded(start, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "flaxgpt_tokenizer.json").write_text('{"kind": "morse"}')
    process = start("generate", "a", "--model", tmp_path / "model")
    assert_refused(process, "kind is 'morse'")


@both_ways
def test_special_tokens_outside_the_vocabulary_are_not_stop_tokens(start, byte_folder):
    process = start("generate", "a", "--model", byte_folder, "--max-new-tokens", 2)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_a_terminal_shows_progress_and_standard_output_only_results(folder):
    ours, theirs = pty.openpty()
    odd = folder.parent / "odd [/name]"
    shutil.copytree(folder, odd, dirs_exist_ok=True)
    process = subprocess.run(
        [*COMMAND, "generate", "Hello", "--model", str(odd), "--max-new-tokens", "3", *GREEDY],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=QUICK | {"TERM": "xterm"},
        timeout=120,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "loading" in shown
    assert "odd [/name]" in shown.replace("\r\n", "")
    assert process.stdout.decode() == "Hello" + expected(folder, "Hello", 3) + "\n"


@pytest.mark.slow
def test_a_second_process_reuses_the_compilation_cache_of_jax(folder, tmp_path):
    arguments = ["generate", "Hello", "--model", str(folder), "--max-new-tokens", "4"]
    environment = QUICK | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    cached = []
    for _ in range(2):
        subprocess.run([*COMMAND, *arguments], env=environment, check=True, capture_output=True)
        cached.append({path.name for path in (tmp_path / "cache").glob("*-cache")})
    assert any("prefill" in name for name in cached[0])
    assert cached[1] == cached[0]  # nothing new was compiled


@pytest.fixture
def endless(folder):
    """A process that has started to print and would run for hours."""
    arguments = ["generate", "Hello", "--model", str(folder), "--max-new-tokens", "100000000"]
    # A background job of a shell ignores SIGINT, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=QUICK
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout.read(12).startswith(b"Hello")  # text is printed as it is generated
    assert process.poll() is None
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_exits_with_130_and_without_a_traceback(endless):
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert errors == b""


def test_a_closed_pipe_ends_the_process_quietly(endless):
    endless.stdout.close()
    assert endless.wait(timeout=60) == 0
    assert endless.stderr.read() == b""
