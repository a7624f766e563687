"""Inputs that people type and environments that they work in, in tables of one line per input."""

import io
import shlex
import signal
import subprocess
import time

import pytest

from command import COMMAND, QUICK, assert_refused, both_ways, call, run
from flaxgpt.cli.streams import read_prompt

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


def shell(line, *, environment=QUICK, **options):
    """Run a line of a POSIX shell in which `flaxgpt` is the command."""
    flaxgpt = shlex.join(COMMAND)
    return subprocess.run(
        ["sh", "-c", line.replace("flaxgpt", flaxgpt)],
        capture_output=True,
        env=environment,
        timeout=120,
        check=False,
        **options,
    )


slow = pytest.mark.slow
STREAMS = [
    pytest.param("flaxgpt generate Hello >&-", 2, "standard output is closed"),
    pytest.param("flaxgpt --help >&-", 2, "standard output is closed", marks=slow),
    pytest.param("flaxgpt params gpt2 >&-", 2, "standard output is closed", marks=slow),
    pytest.param("flaxgpt generate <&-", 2, "the prompt is empty", marks=slow),
    pytest.param("flaxgpt generate </dev/null", 2, "the prompt is empty", marks=slow),
    pytest.param("flaxgpt generat >&- 2>&-", 2, "", marks=slow),
    pytest.param("flaxgpt generat 2>&-", 2, "", marks=slow),
    pytest.param("flaxgpt --version 2>&-", 0, "", marks=slow),
    pytest.param("flaxgpt --version >/dev/full", 2, "No space left on device", marks=slow),
    pytest.param("flaxgpt --help >/dev/full", 2, "No space left on device", marks=slow),
    pytest.param("flaxgpt params gpt2 >/dev/full", 2, "No space left on device", marks=slow),
    pytest.param("flaxgpt generate Hello >/dev/full", 2, "No space left on device", marks=slow),
    pytest.param(
        r"printf 'a\377b' | flaxgpt generate", 2, "not UTF-8 (byte 0xff at 1)", marks=slow
    ),
    pytest.param("JAX_PLATFORMS=tpu flaxgpt generate Hello", 2, "JAX cannot use JAX_PLATFORMS=tpu"),
    pytest.param(
        "JAX_PLATFORMS=rocm flaxgpt generate Hello", 2, "use JAX_PLATFORMS=rocm", marks=slow
    ),
    pytest.param(
        "JAX_PLATFORMS=warp flaxgpt generate Hello", 2, "use JAX_PLATFORMS=warp", marks=slow
    ),
    pytest.param(
        "JAX_PLATFORMS=warp flaxgpt params tales", 2, "use JAX_PLATFORMS=warp", marks=slow
    ),
    pytest.param("JAX_PLATFORMS=warp flaxgpt params gpt2", 0, "", marks=slow),  # needs no device
    pytest.param("unset HOME; flaxgpt generate Hello", 0, "", marks=slow),
    pytest.param("mkdir d; cd d; rmdir ../d; flaxgpt generate Hello", 0, "", marks=slow),
    pytest.param("COLUMNS=1 TERM=dumb NO_COLOR=1 flaxgpt generate --help", 0, "", marks=slow),
    pytest.param("flaxgpt --help | head -0", 0, "", marks=slow),
]


@pytest.mark.parametrize(("line", "code", "message"), STREAMS)
def test_a_process_started_in_an_unusual_way_ends_without_a_traceback(
    line, code, message, tmp_path
):
    process = shell(line, cwd=tmp_path)
    assert process.returncode == code
    errors = process.stderr.decode()
    assert len(errors.splitlines()) == (1 if message else 0), errors
    assert message in errors


ENCODINGS = [
    pytest.param({"PYTHONIOENCODING": "latin-1"}, "h?é".encode("latin-1")),
    pytest.param({"PYTHONIOENCODING": "ascii"}, b"h??", marks=slow),
    pytest.param({"PYTHONIOENCODING": "utf-8"}, "h→é".encode(), marks=slow),
    pytest.param(
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"h??", marks=slow
    ),
    pytest.param({"LC_ALL": "C"}, "h→é".encode(), marks=slow),
]


@pytest.mark.parametrize(("variables", "printed"), ENCODINGS)
@pytest.mark.parametrize(
    "line", ["flaxgpt generate 'h→é'", pytest.param("printf h→é | flaxgpt generate", marks=slow)]
)
def test_characters_outside_the_encoding_of_the_output_are_replaced(variables, printed, line):
    unset = {name: value for name, value in QUICK.items() if not name.startswith("PYTHONIO")}
    process = shell(f"{line} --max-new-tokens 1", environment=unset | variables)
    assert process.returncode == 0
    assert process.stdout.startswith(printed)
    assert process.stderr == b""


STANDARD_INPUT = [
    (b"Hello\r\n", "Hello"),
    (b"Hello\n", "Hello"),
    (b"Hello", "Hello"),
    (b"Hello\n\n", "Hello\n"),
    (b"a\r\nb\r\n", "a\nb"),
    (b"\xef\xbb\xbfHello\r\n", "Hello"),
    (b"\xff\xfeH\0i\0\r\0\n\0", "Hi"),
    ("né\r\n".encode(), "né"),
]


@pytest.mark.parametrize(("data", "text"), STANDARD_INPUT)
def test_standard_input_follows_the_conventions_of_other_systems(data, text, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert read_prompt() == text


def test_standard_input_in_another_encoding_is_decoded_if_it_is_known(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("né\r\n".encode("latin-1")), encoding="latin-1")
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_prompt() == "né"


def test_an_argument_that_is_not_utf8_is_an_error():
    assert_refused(call("generate", "a\udcff"), "the prompt is not UTF-8")
    assert_refused(call("plot", "lens", "a\udcff"), "the text is not UTF-8")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8, 1.6])
def test_ctrl_c_prints_no_traceback_while_libraries_are_imported(delay):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "generate", "Hello"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=QUICK,
    )
    signal.signal(signal.SIGINT, before)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode in (130, -signal.SIGINT)
