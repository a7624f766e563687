"""The command as its users meet it: a process with arguments, streams and signals."""

import os
import pty
import shutil
import signal
import string
import subprocess

import jax
import pytest

import flaxgpt
from command import COMMAND, QUICK, assert_refused, call, run
from flaxgpt import GPTConfig
from flaxgpt.tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer

GREEDY = ("--temperature", "0")
CFG = GPTConfig(vocab_size=100, context_length=16, emb_dim=16, n_heads=2, n_layers=1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of 100 characters."""
    path = tmp_path_factory.mktemp("models") / "chars"
    params = flaxgpt.init(CFG, jax.random.key(0))
    flaxgpt.save(path, CFG, params, tokenizer=CharTokenizer(string.printable))
    return path


def expected(folder, prompt, new, **options):
    cfg, params, tokenizer = flaxgpt.load(folder)
    return flaxgpt.generate_text(cfg, params, tokenizer, [prompt], new, **options)[0]


def test_it_prints_the_prompt_and_its_continuation_and_nothing_else(folder):
    process = run("generate", "Hello", "--model", folder, "--max-new-tokens", 6, *GREEDY)
    assert process.returncode == 0
    assert process.stdout.decode() == "Hello" + expected(folder, "Hello", 6) + "\n"
    assert process.stderr == b""


def test_the_prompt_may_come_from_standard_input(folder):
    options = ("--model", folder, "--max-new-tokens", 6, "--no-echo", *GREEDY)
    whole = expected(folder, "Hello\nyou", 6) + "\n"
    assert run("generate", *options, stdin="Hello\nyou\n").stdout.decode() == whole
    assert run("generate", "-", *options, stdin="Hello\nyou").stdout.decode() == whole


def test_sampling_is_that_of_the_library_row_by_row(folder):
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
    flags = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--n", 2)
    process = run("generate", "Hi", "--model", folder, "--max-new-tokens", 8, *flags, "--no-echo")
    cfg, params, tokenizer = flaxgpt.load(folder)
    rows = flaxgpt.generate_text(
        cfg, params, tokenizer, ["Hi", "Hi"], 8, key=jax.random.key(5), **options
    )
    assert process.stdout.decode() == f"{rows[0]}\n\n{rows[1]}\n"


def test_a_stop_token_ends_the_text(folder):
    free = expected(folder, "Hello", 12)
    stop = free[3]
    flags = ("--model", folder, "--max-new-tokens", 12, "--stop", stop, "--stop", "99", *GREEDY)
    process = run("generate", *flags, "Hello")
    assert process.stdout.decode() == "Hello" + free[: free.index(stop) + 1] + "\n"


def test_output_is_whole_utf8_characters_even_of_an_untrained_model(tmp_path):
    cfg = GPTConfig(vocab_size=50257, context_length=16, emb_dim=8, n_heads=1, n_layers=1)
    flaxgpt.save(tmp_path / "model", cfg, flaxgpt.init(cfg, jax.random.key(0)))
    flags = ("--temperature", 2, "--max-new-tokens", 30, "--no-echo")
    process = run("generate", "é", "--model", tmp_path / "model", *flags)
    whole = expected(
        tmp_path / "model", "é", 30, temperature=2.0, key=jax.random.key(0), stop_ids=(50256,)
    )
    assert process.stdout.decode("utf-8", errors="strict") == whole + "\n"


@pytest.mark.parametrize(
    ("flag", "answer"), [("--version", flaxgpt.__version__), ("--help", "generate")]
)
def test_version_and_help_answer_within_two_seconds(flag, answer):
    def seconds(command):
        # Processor time, which is what is left of the wall's where the machine is busy.
        before = os.times()
        process = subprocess.run(command, env=QUICK, capture_output=True, check=True)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4]), process.stdout.decode()

    taken, printed = zip(*(seconds([*COMMAND, flag]) for _ in range(2)), strict=True)
    assert answer in printed[0]  # the first may compile Python files
    jaxs, _ = seconds([COMMAND[0], "-c", "import jax"])
    assert min(taken) < max(2, 2 * jaxs), (taken, jaxs)  # a slow machine needs a second for JAX


def test_help_of_a_command_lists_its_options():
    text = run("generate", "--help").stdout.decode()
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tempratur", 1], "Unrecognized options: --tempratur"),
        (["--top-k", "many"], "--top-k"),
        (["--dtype", "int8"], "--dtype"),
        (["--temperature", -1], "temperature=-1.0 must be 0"),
        (["--temperature", "nan"], "temperature=nan must be 0"),
        (["--top-p", 1.5], "top_p=1.5 must be above 0"),
        (["--top-k", 0], "top_k=0 must be a whole number"),
        (["--max-new-tokens", 0], "--max-new-tokens=0 must be a whole number"),
        ([*GREEDY, "--n", 3], "--n 3 at --temperature 0 would print one text 3 times"),
        (["--seed", -1], "--seed -1 must be from 0"),
    ],
)
def test_a_bad_option_is_refused_before_any_model_is_loaded(arguments, message):
    process = call("generate", "Hello", "--model", "no/such/model/anywhere", *arguments)
    assert_refused(process, message)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["generate", "Hello", "--model", "./nowhere"], "", "nowhere"),
        (["generate", ""], "", "the prompt is empty"),
        (["generate"], "", "the prompt is empty"),
        (["generat", "Hello"], "", "generat"),
        ([], "", "generate"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, stdin, message):
    assert_refused(run(*arguments, stdin=stdin), message)


def test_text_that_the_model_cannot_read_is_refused(folder):
    process = call("generate", "né", "--model", folder)
    assert_refused(process, "'é'")


def test_a_stop_of_several_tokens_is_refused(folder):
    process = call("generate", "a", "--model", folder, "--stop", "abc")
    assert_refused(process, "--stop 'abc' is 3 tokens")


def test_a_model_without_tokenizer_says_what_is_missing(tmp_path):
    flaxgpt.save(tmp_path / "bare", CFG, flaxgpt.init(CFG, jax.random.key(0)))
    process = call("generate", "a", "--model", tmp_path / "bare")
    assert_refused(process, "has no tokenizer for its 100 tokens")


def test_a_tokenizer_that_cannot_be_read_is_told_before_the_weights_are_loaded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "flaxgpt_tokenizer.json").write_text('{"kind": "morse"}')
    process = call("generate", "a", "--model", tmp_path / "model")
    assert_refused(process, "kind is 'morse'")


def test_special_tokens_beyond_the_vocabulary_do_not_stop_the_text(tmp_path):
    cfg = GPTConfig(vocab_size=256, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
    ranks = {bytes([i]): i for i in range(256)}
    padded = BPETokenizer(GPT2_PATTERN, ranks, {"<|pad|>": 256})
    params = flaxgpt.init(cfg, jax.random.key(0))
    flaxgpt.save(tmp_path / "model", cfg, params, tokenizer=padded)
    process = run("generate", "a", "--model", tmp_path / "model", "--max-new-tokens", 2)
    assert process.returncode == 0, process.stderr


def test_progress_is_shown_on_a_terminal_and_the_results_alone_on_standard_output(folder):
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
def test_a_second_process_takes_compilations_from_jaxs_cache(folder, tmp_path):
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
    assert cached[1] == cached[0]  # the second process had nothing to add


@pytest.fixture
def endless(folder):
    """A process that has begun to print, and would go on for hours."""
    arguments = ["generate", "Hello", "--model", str(folder), "--max-new-tokens", "100000000"]
    # A shell's background job has SIGINT ignored, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=QUICK
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout.read(12).startswith(b"Hello")  # text comes while the loop runs
    assert process.poll() is None
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_it_with_130_and_no_traceback(endless):
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert errors == b""


def test_a_closed_pipe_ends_it_quietly(endless):
    endless.stdout.close()
    assert endless.wait(timeout=60) == 0
    assert endless.stderr.read() == b""
