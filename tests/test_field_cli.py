"""Inputs that people type and environments that they work in, in tables of one line per input."""

import io
import json
import shlex
import shutil
import signal
import subprocess
import time

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxgpt
import golden
from command import COMMAND, QUICK, assert_refused, both_ways, call, run
from flaxgpt import GPTConfig, Sampling
from flaxgpt.cli.streams import read_prompt
from flaxgpt.generation.sampling import sample
from flaxgpt.training import TrainConfig

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
    ("generate --max-token=5 x", "did you mean --max-new-tokens"),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


TINY = float(np.finfo(np.float32).tiny)  # the smallest number that devices do not read as 0
LOGITS = np.array([[0.0, 1.0, 3.0, 2.0]] * 64, np.float32)


def drawn(**options):
    """Return the ids drawn from 64 rows of the same logits; 2 is the likeliest id."""
    values = {"temperature": 1.0, "top_k": 4, "top_p": 1.0} | options
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    kinds = (
        np.float32(values["temperature"]),
        np.int32(values["top_k"]),
        np.float32(values["top_p"]),
    )
    return set(np.asarray(jax.jit(sample)(LOGITS, keys, *kinds)).tolist())


LIKELIEST = [
    {"top_p": 1e-38},
    {"top_p": 1e-44},
    {"top_p": TINY},
    {"top_p": 1e-20},
    {"temperature": 1e-38},
    {"temperature": 1e-45},
    {"temperature": 0.0},
    {"temperature": 1e-38, "top_p": 1e-38},
    {"temperature": 3e38, "top_p": 1e-38, "top_k": 1},
]


@pytest.mark.parametrize("options", LIKELIEST, ids=str)
def test_a_number_that_devices_read_as_zero_draws_the_likeliest_id(options):
    assert drawn(**options) == {2}


@pytest.mark.parametrize("temperature", [1e30, 3.4e38])
def test_a_huge_temperature_draws_all_ids(temperature):
    assert drawn(temperature=temperature) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e38, 1e39, 1e300])
def test_any_temperature_can_be_passed_to_generate(temperature):
    cfg = GPTConfig(vocab_size=8, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    params = flaxgpt.init(cfg, jax.random.key(0))
    key = jax.random.key(0)
    (ids,) = flaxgpt.generate(cfg, params, [[1]], 4, temperature=temperature, key=key)
    if temperature < 1:
        assert [ids] == flaxgpt.generate(cfg, params, [[1]], 4)


@pytest.mark.slow
@given(top_p=st.floats(1e-44, 0.25), temperature=st.floats(0.0, 3e38))
@settings(max_examples=50)
def test_top_p_below_the_likeliest_probability_draws_the_likeliest_id(top_p, temperature):
    ids = drawn(top_p=top_p, temperature=temperature)
    assert ids == {2} or temperature > 1e6  # at which the probabilities round to the same


OUTSIDE_FLOAT32 = [
    (TrainConfig, {"learning_rate": 1e-40}, "learning_rate=1e-40 is outside the range of float32"),
    (TrainConfig, {"learning_rate": 1e39}, "learning_rate=1e+39 is outside the range of float32"),
    (TrainConfig, {"min_learning_rate": 1e-45}, "min_learning_rate=1e-45 is outside the range"),
    (TrainConfig, {"eps": 1e-40}, "eps=1e-40 is outside the range of float32"),
    (TrainConfig, {"eps": 1e-300}, "eps=1e-300 is outside the range of float32"),
    (TrainConfig, {"eps": 0.0}, "eps=0.0 would divide 0 by 0"),
    (TrainConfig, {"weight_decay": 1e-39}, "weight_decay=1e-39 is outside the range of float32"),
    (TrainConfig, {"weight_decay": 1e300}, "weight_decay=1e+300 is outside the range"),
    (TrainConfig, {"grad_clip": 1e-44}, "grad_clip=1e-44 is outside the range of float32"),
    (TrainConfig, {"grad_clip": 1e39}, "grad_clip=1e+39 is outside the range of float32"),
    (TrainConfig, {"beta1": 1e-40}, "beta1=1e-40 is outside the range of float32"),
    (TrainConfig, {"beta1": 1 - 1e-9}, "beta1=0.999999999 must be at least 0 and below 1 in float"),
    (TrainConfig, {"beta2": 1 - 1e-9}, "beta2=0.999999999 must be at least 0 and below 1 in float"),
    (TrainConfig, {"beta2": 10**400}, "beta2=1000"),
    (GPTConfig, {"drop_rate": 1 - 1e-9}, "drop_rate=0.999999999 must be a probability"),
    (GPTConfig, {"drop_rate_emb": 1 - 1e-12}, "drop_rate_emb=0.999999999999 must be a probability"),
    (Sampling, {"temperature": 10**400}, "temperature=1000"),
    (Sampling, {"top_p": 1e-50}, "top_p=1e-50 must be above 0"),
    (Sampling, {"top_p": 1 + 1e-9}, "top_p=1.000000001 must be above 0 and at most 1"),
]


@pytest.mark.parametrize(("kind", "options", "message"), OUTSIDE_FLOAT32)
def test_a_number_that_float32_cannot_hold_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message.replace("e+", r"e\+")):
        kind(**options)


WITHIN_FLOAT32 = [
    (TrainConfig, {"weight_decay": 0.0, "grad_clip": 0.0, "beta1": 0.0, "beta2": 0.0}),
    (TrainConfig, {"eps": TINY, "weight_decay": TINY, "grad_clip": TINY}),
    (TrainConfig, {"beta1": 1 - 1e-7, "beta2": 1 - 1e-7}),
    (TrainConfig, {"grad_clip": 3.4e38}),
    (TrainConfig, {"val_fraction": 1e-40, "warmup_fraction": 1e-40}),
    (GPTConfig, {"drop_rate": 1e-40}),
    (GPTConfig, {"drop_rate": 1 - 1e-7}),
]


@pytest.mark.parametrize(("kind", "options"), WITHIN_FLOAT32)
def test_the_ends_of_the_range_are_accepted(kind, options):
    assert kind(**options)


HF = golden.FOLDER / "hf-small"
COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write_cache(root, files, *, reference=True, commits=(COMMIT,)):
    """Write a cache of the hub with these files of the repository org/name."""
    folder = root / "models--org--name"
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        for name in files:
            target = folder / "snapshots" / commit / name
            if name == INDEX:
                target.write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
            elif name in SHARDS:
                tensors = safetensors.numpy.load_file(HF / "model.safetensors")
                half = sorted(tensors)[SHARDS.index(name) :: 2]
                safetensors.numpy.save_file({key: tensors[key] for key in half}, target)
            else:
                shutil.copy(HF / name, target)
    if reference:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    # The listing that newer clients store, and with which they refuse an incomplete snapshot.
    names = [*files, "generation_config.json", "tokenizer.json", "README.md"]
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    (folder / "trees").mkdir()
    (folder / "trees" / f"{COMMIT}.json").write_text(
        json.dumps({"format_version": 1, "files": listing})
    )


CACHED = [
    (["config.json", "model.safetensors"], {}),
    (["config.json", "model.safetensors"], {"reference": False}),
    (["config.json", "model.safetensors"], {"commits": (COMMIT, OLDER)}),
    (["config.json", INDEX, *SHARDS], {}),
    (["config.json", INDEX, *SHARDS], {"reference": False}),
]
NOT_CACHED = [
    ([], {}),
    (["config.json"], {}),
    (["model.safetensors"], {"reference": False}),
    (["config.json", INDEX, SHARDS[0]], {}),
    (["config.json", INDEX, SHARDS[0]], {"reference": False}),
    (["config.json", INDEX], {}),
    (["config.json", *SHARDS], {}),
    (["config.json", "model.safetensors"], {"reference": False, "commits": (COMMIT, OLDER)}),
]


def client_without_network(monkeypatch, kind):
    """Let the client of the hub see no network: the installed one, or one that always refuses."""
    if kind == "offline":
        return

    def fails(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", kind != "no network")


@pytest.mark.parametrize("kind", ["offline", "refusing", "no network"])
@pytest.mark.parametrize(("files", "options"), CACHED)
def test_a_cache_with_configuration_and_weights_is_enough(
    files, options, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    client_without_network(monkeypatch, kind)
    write_cache(tmp_path, files, **options)
    cfg, params, _ = flaxgpt.load("org/name")
    assert cfg == flaxgpt.load(HF)[0]
    jax.tree.map(np.testing.assert_array_equal, params, flaxgpt.load(HF)[1])


@pytest.mark.parametrize("kind", ["offline", "refusing", "no network"])
@pytest.mark.parametrize(("files", "options"), NOT_CACHED)
def test_a_cache_without_all_weights_is_an_error(files, options, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    client_without_network(monkeypatch, kind)
    write_cache(tmp_path, files, **options)
    with pytest.raises(OSError, match="org/name"):
        flaxgpt.load("org/name")


def damage(folder, kind):
    """Damage a compilation cache of flaxgpt."""
    entries = sorted(folder.rglob("*-cache"))
    assert entries
    for entry in entries:
        match kind:
            case "empty":
                entry.write_bytes(b"")
            case "garbage":
                entry.write_bytes(b"garbage" * 100)
            case "truncated":
                entry.write_bytes(entry.read_bytes()[:-100])
            case "no time":
                entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
            case "a folder":
                entry.unlink()
                entry.mkdir()


def cached_environment(cache, **variables):
    inherited = {name: value for name, value in QUICK.items() if "COMPILATION_CACHE" not in name}
    inherited.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    return inherited | {"XDG_CACHE_HOME": str(cache)} | variables


def generate_with(environment, *options):
    process = run("generate", "Hi", "--max-new-tokens", 3, *options, environment=environment)
    assert (process.returncode, process.stderr) == (0, b"")
    return process.stdout


@pytest.mark.slow
def test_the_second_process_finds_all_compiled_programs(tmp_path):
    environment = cached_environment(tmp_path)
    first = generate_with(environment)
    programs = {path.name for path in tmp_path.rglob("*-cache")}
    assert any("prefill" in name for name in programs)
    assert generate_with(environment) == first
    assert {path.name for path in tmp_path.rglob("*-cache")} == programs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "no time", "a folder"])
def test_a_damaged_compilation_cache_is_not_noticed(kind, tmp_path):
    environment = cached_environment(tmp_path)
    first = generate_with(environment)
    damage(tmp_path, kind)
    assert generate_with(environment) == first
    assert generate_with(environment, "--top-k", 3, "--n", 2).startswith(b"Hi")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"XDG_CACHE_HOME": "/dev/null"},
        {"XDG_CACHE_HOME": "/proc/no"},
        {"XDG_CACHE_HOME": "relative", "HOME": "/dev/null"},
        {"XDG_CACHE_HOME": "", "HOME": "/proc/none"},
    ],
)
def test_a_cache_folder_that_cannot_be_written_is_not_noticed(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate_with(cached_environment(tmp_path, **variables)).startswith(b"Hi")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_share_a_compilation_cache_at_once(tmp_path):
    environment = cached_environment(tmp_path)
    arguments = [*COMMAND, "generate", "Hi", "--max-new-tokens", "3"]
    start = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(arguments, **start) for _ in range(3)]
    results = {process.communicate(timeout=120) for process in processes}
    assert len(results) == 1
    assert results.pop()[1] == b""


@pytest.mark.slow
def test_the_cache_that_the_user_has_chosen_is_used(tmp_path):
    chosen = tmp_path / "chosen"
    generate_with(
        cached_environment(
            tmp_path / "cache",
            JAX_COMPILATION_CACHE_DIR=str(chosen),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
    )
    assert list(chosen.iterdir())
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_importing_flaxgpt_enables_no_compilation_cache(tmp_path):
    program = "import flaxgpt, flaxgpt.cli, jax; print(jax.config.jax_compilation_cache_dir)"
    process = subprocess.run(
        [COMMAND[0], "-c", program], env=cached_environment(tmp_path), capture_output=True
    )
    assert process.stdout == b"None\n"


def test_a_warning_is_one_line_without_a_place_in_the_code(tmp_path):
    shutil.copytree(HF, tmp_path / "m")
    config = json.loads((HF / "config.json").read_text()) | {"rope_theta": 1}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    process = run("params", tmp_path / "m", "--depth", 1)
    assert process.returncode == 0
    (line,) = process.stderr.decode().splitlines()
    assert line.startswith("flaxgpt: warning: config.json has rope_theta, unknown to flaxgpt")
