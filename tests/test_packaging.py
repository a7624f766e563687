"""Packaging: pyproject.toml, the pinned lists and the shell scripts.

Nothing is downloaded: the scripts run in a copy of the repository with a fake Python that answers
as Python and pip do and logs each call.
"""

import importlib.metadata
import importlib.resources
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import flaxgpt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What scripts/flaxgpt, scripts/test and scripts/docs install, each in addition to those before.
INSTALLED = ("requirements.txt", "requirements-test.txt", "requirements-docs.txt")
LISTS = sorted((ROOT / "scripts").glob("requirements*.txt"))
PYTHONS = ("3.11", "3.12", "3.13")


def pins(name: str, python: str) -> dict[str, Version]:
    """Read a pinned list in scripts/ as pip for that Python does: canonical name to version."""
    pinned = {}
    for line in (ROOT / "scripts" / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "sys_platform": "linux"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        key = canonicalize_name(requirement.name)
        assert key not in pinned, f"{name} pins {key} twice for Python {python}"
        pinned[key] = Version(str(requirement.specifier).removeprefix("=="))
    return pinned


def test_only_the_package_states_the_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert flaxgpt.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_the_installed_version_is_that_of_the_source() -> None:
    try:
        installed = importlib.metadata.version("flaxgpt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flaxgpt is not installed here; scripts/test_matrix installs it")
    assert installed == flaxgpt.__version__


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "vocab/gpt2.tiktoken",
        "vocab/LICENSE",
        "vocab/tales.tiktoken",
        "models/tales/config.json",
        "models/tales/flaxgpt_tokenizer.json",
        "models/tales/model.safetensors",
        "models/tales/README.md",
    ],
)
def test_the_package_includes_types_vocabularies_and_a_model(name: str) -> None:
    assert importlib.resources.files("flaxgpt").joinpath(name).is_file()


def test_python_3_11_to_3_13_are_supported() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [python for python in ("3.10", *PYTHONS) if python in supported] == list(PYTHONS)
    classifiers = {f"Programming Language :: Python :: {python}" for python in PYTHONS}
    assert classifiers <= set(PROJECT["classifiers"])


@pytest.mark.parametrize("dependency", PROJECT["dependencies"])
def test_a_runtime_dependency_has_a_lower_bound_only(dependency: str) -> None:
    assert [bound.operator for bound in Requirement(dependency).specifier] == [">="]


def test_a_colab_tpu_runtime_satisfies_every_dependency() -> None:
    runtime = pins("requirements-floor.txt", "3.13")
    for dependency in map(Requirement, PROJECT["dependencies"]):
        key = canonicalize_name(dependency.name)
        assert key not in runtime or runtime[key] in dependency.specifier, dependency
    assert {key: str(runtime[key]) for key in ("jax", "flax", "numpy", "optax")} == {
        "jax": "0.7.2",
        "flax": "0.11.2",
        "numpy": "2.1.3",
        "optax": "0.2.8",
    }


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_a_pinned_list_holds_names_and_versions_only(path: Path) -> None:
    pin = re.compile(r'#.*|[\w.-]+==[\w.]+( ; (python_version|sys_platform) [<>=!]+ "[\w.]+")?')
    assert [line for line in path.read_text().splitlines() if not pin.fullmatch(line)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_to_a_version_it_allows(python: str) -> None:
    run, test, docs = (pins(name, python) for name in INSTALLED)
    extras = PROJECT["optional-dependencies"]
    for pinned, dependencies in (
        (run, [*PROJECT["dependencies"], *extras["train"], *extras["notebook"]]),
        (run | test, [*extras["test"], *extras["dev"]]),
        (run | test | docs, extras["docs"]),
    ):
        for dependency in map(Requirement, dependencies):
            if dependency.name == "flaxgpt":  # refers to other extras, which are checked themselves
                continue
            assert pinned[canonicalize_name(dependency.name)] in dependency.specifier
    assert len(run | test | docs) == len(run) + len(test) + len(docs), "a package is pinned twice"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_tpu_compiler_is_the_one_that_jax_asks_for(python: str) -> None:
    run, test, tpu = (pins(name, python) for name in (*INSTALLED[:2], "requirements-tpu.txt"))
    assert len(run | test | tpu) == len(run) + len(test) + len(tpu), "a package is pinned twice"
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["tpu-compiler"])
    assert (extra.name, extra.extras, run["jax"] in extra.specifier) == ("jax", {"tpu"}, True)
    metadata = importlib.metadata.metadata("jax")
    if run["jax"] == Version(metadata["Version"]):  # else it says nothing of that version
        asked = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
        (libtpu,) = [one for one in asked if one.name == "libtpu"]
        assert tpu["libtpu"] in libtpu.specifier


@pytest.mark.parametrize(
    ("shell", "name"),
    [
        ("sh", "scripts/flaxgpt"),
        ("sh", "scripts/build_tales"),
        ("sh", "scripts/docs"),
        ("sh", "scripts/test"),
        ("sh", "scripts/test_matrix"),
        ("sh", "scripts/test_tpu"),
        ("bash", ".ci/run"),
    ],
)
def test_a_script_is_executable_and_parses(shell: str, name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run([shell, "-n", ROOT / name], check=True)


# Prints its path when run with -c, and copies itself into a venv that it is told to make. $LOG gets
# a line for each venv and each installed list. An installation fails while $LOG.offline exists.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    -c*) echo "$0" ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo venv >>"$LOG" ;;
    "-m pip install "*)
        if [ -e "$LOG.offline" ]; then echo "pip: no network" >&2; exit 1; fi
        for word in "$@"; do case $word in *.txt) echo "$word" >>"$LOG" ;; esac; done ;;
    "-P -m flaxgpt "*)
        shift 3
        printf '%s|' "$PWD" "$PYTHONPATH" "$@"
        exit 7 ;;
    *"-m pytest"*)
        pwd
        shift 2
        printf "%s\\n" "$*" ;;
    "-m mkdocs"*) printf "%s\\n" "$*" ;;
esac
"""


class Clone:
    """A copy of the scripts in a folder with a space in its name, and a fake Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        self.log = folder / "log"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.commands = folder / "commands"
        self.commands.mkdir()
        # A pyenv shim for an inactive Python, and a uv that does not run.
        for name in ("python3.13", "uv"):
            self.command(name, "#!/bin/sh\necho no such version >&2\nexit 127\n")
        self.command("python3.12", FAKE_PYTHON)

    def command(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text)
        (self.commands / name).chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script from another folder, with few environment variables."""
        path = f"{self.commands}:{os.environ['PATH']}"
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            cwd=self.elsewhere,
            env={"PATH": path, "LOG": str(self.log), **environment},
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[str]:
        """Return what was made and installed since the last call."""
        lines = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_first_run_uses_the_first_python_that_works(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate")
    assert clone.calls() == ["venv", "requirements.txt"]
    assert len(result.stderr.splitlines()) == 1
    assert f"with pip and {clone.commands / 'python3.12'}" in result.stderr


def test_arguments_working_directory_and_exit_code_are_passed_through(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate", "two words", "*", PYTHONPATH="/theirs")
    expected = [clone.elsewhere, f"{clone.root}:/theirs", "generate", "two words", "*"]
    assert result.stdout == "".join(f"{word}|" for word in expected)
    assert result.returncode == 7


def test_a_second_run_is_quiet_and_installs_nothing(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    clone.calls()
    assert clone.run("flaxgpt", "generate").stderr == ""
    assert clone.calls() == []


def test_a_failed_installation_is_reported_and_repeated_by_the_next_run(clone: Clone) -> None:
    offline = clone.log.with_suffix(".offline")
    offline.touch()
    result = clone.run("flaxgpt", "generate")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[1:] == [
        "pip: no network",
        "flaxgpt: the installation failed with the error above; run the command again to retry",
    ]
    offline.unlink()
    assert clone.run("flaxgpt", "generate").returncode == 7
    assert clone.calls() == ["venv", "venv", "requirements.txt"]


def test_a_changed_pinned_list_rebuilds_the_environment(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    with (clone.root / "scripts" / "requirements.txt").open("a") as pinned:
        pinned.write("another==1.0\n")
    clone.calls()
    clone.run("flaxgpt", "generate")
    assert clone.calls() == ["venv", "requirements.txt"]


def test_further_lists_are_added_to_the_environment(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    assert clone.calls() == ["venv", "requirements.txt"]
    clone.run("test")
    assert clone.calls() == [*INSTALLED[:2]]
    clone.run("docs")
    assert clone.calls() == [*INSTALLED]


def test_a_script_that_needs_fewer_lists_keeps_the_environment(clone: Clone) -> None:
    clone.run("docs")
    assert clone.calls() == ["venv", *INSTALLED]
    for script in ("flaxgpt", "test", "docs"):
        clone.run(script)
    assert clone.calls() == []


PARALLEL = "-n auto --dist loadfile --no-loadscope-reorder"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], PARALLEL),
        (["-m", "slow"], f"{PARALLEL} -m slow"),
        (["tests/test_a.py", "tests/test_b.py"], f"{PARALLEL} tests/test_a.py tests/test_b.py"),
        (["tests/test_a.py", "-k", "preset"], "tests/test_a.py -k preset"),
        (["tests/test_a.py::test_it"], "tests/test_a.py::test_it"),
        (["-n", "3", "-x"], "-n 3 -x"),
        (["-x"], f"{PARALLEL} -x"),
        (["--pdb"], "--pdb"),
    ],
)
def test_the_tests_run_on_all_cores_unless_told_otherwise(
    clone: Clone, arguments: list[str], expected: str
) -> None:
    assert clone.run("test", *arguments).stdout.splitlines() == [str(clone.root), expected]


TPU_LISTS = [*INSTALLED[:2], "requirements-tpu.txt"]


def test_tests_for_tpu_have_an_environment_of_their_own(clone: Clone) -> None:
    clone.run("test")
    clone.calls()
    result = clone.run("test_tpu", "--all", "-k", "decode")
    assert clone.calls() == ["venv", *TPU_LISTS]
    assert result.stdout.splitlines() == [str(clone.root), "-p no:xdist tests/tpu -k decode"]
    clone.run("test")
    clone.run("test_tpu")
    assert clone.calls() == []


def test_tests_for_tpu_fail_without_a_python(clone: Clone) -> None:
    result = clone.run("test_tpu", FLAXGPT_PYTHON="/no/such/python")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"flaxgpt: FLAXGPT_PYTHON is '/no/such/python', .*\n", result.stderr)


def test_tests_for_tpu_are_skipped_where_the_compiler_cannot_be_installed(clone: Clone) -> None:
    clone.log.with_suffix(".offline").touch()
    result = clone.run("test_tpu")
    assert (result.returncode, result.stdout) == (0, "")
    assert "flaxgpt: skipped: libtpu" in result.stderr.splitlines()[-1]


def test_the_documentation_is_built_strictly(clone: Clone) -> None:
    assert clone.run("docs").stdout == "-m mkdocs build --strict\n"


def test_setting_another_python_rebuilds_the_environment(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    clone.command("other", FAKE_PYTHON)
    clone.calls()
    clone.run("flaxgpt", "generate", FLAXGPT_PYTHON=str(clone.commands / "other"))
    clone.run("flaxgpt", "generate")
    assert clone.calls() == ["venv", "requirements.txt"]


def test_a_python_that_does_not_run_is_a_one_line_error(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate", FLAXGPT_PYTHON="/no/such/python")
    assert (result.returncode, result.stdout, clone.calls()) == (1, "", [])
    assert re.fullmatch(r"flaxgpt: FLAXGPT_PYTHON is '/no/such/python', .*\n", result.stderr)


def test_no_suitable_python_is_a_one_line_error(clone: Clone) -> None:
    for name in ("python3.12", "python3.11", "python3"):
        clone.command(name, "#!/bin/sh\nexit 1\n")
    result = clone.run("flaxgpt", "generate")
    assert (result.returncode, result.stdout, clone.calls()) == (1, "", [])
    assert re.fullmatch(r"flaxgpt: found no Python 3\.11 or later .*\n", result.stderr)
