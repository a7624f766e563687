"""What pyproject.toml, the pinned lists and the shell scripts promise to who installs flaxgpt.

Nothing is downloaded: the scripts run in a copy of the repository with a stand-in for Python, which
answers as Python and pip do and keeps a diary of what it was asked.
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
LISTS = sorted((ROOT / "scripts").glob("requirements*.txt"))
PYTHONS = ("3.11", "3.12", "3.13")


def pins(name: str, python: str) -> dict[str, Version]:
    """Reads a pinned list of scripts/ as pip of that Python does: canonical name to version."""
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


def test_the_version_is_written_in_the_package_alone() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert flaxgpt.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_an_installed_flaxgpt_reports_the_version_of_its_source() -> None:
    try:
        installed = importlib.metadata.version("flaxgpt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flaxgpt runs from its source here; scripts/test_matrix installs it")
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
def test_types_vocabularies_and_a_model_travel_with_the_package(name: str) -> None:
    assert importlib.resources.files("flaxgpt").joinpath(name).is_file()


def test_every_python_from_3_11_to_3_13_is_supported_and_none_older() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [python for python in ("3.10", *PYTHONS) if python in supported] == list(PYTHONS)
    classifiers = {f"Programming Language :: Python :: {python}" for python in PYTHONS}
    assert classifiers <= set(PROJECT["classifiers"])


@pytest.mark.parametrize("dependency", PROJECT["dependencies"])
def test_a_runtime_dependency_has_a_floor_and_no_ceiling(dependency: str) -> None:
    assert [bound.operator for bound in Requirement(dependency).specifier] == [">="]


def test_installing_leaves_what_a_colab_tpu_runtime_has_as_it_is() -> None:
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
    run, test = pins("requirements.txt", python), pins("requirements-test.txt", python)
    extras = PROJECT["optional-dependencies"]
    for pinned, dependencies in (
        (run, [*PROJECT["dependencies"], *extras["train"], *extras["notebook"]]),
        (test, [*extras["test"], *extras["dev"]]),
    ):
        for dependency in map(Requirement, dependencies):
            if dependency.name == "flaxgpt":  # its other extras, looked at by themselves
                continue
            assert pinned[canonicalize_name(dependency.name)] in dependency.specifier
    assert run.keys().isdisjoint(test)


@pytest.mark.parametrize(
    ("shell", "name"),
    [
        ("sh", "scripts/flaxgpt"),
        ("sh", "scripts/build_tales"),
        ("sh", "scripts/test"),
        ("sh", "scripts/test_matrix"),
        ("bash", ".ci/run"),
    ],
)
def test_a_script_is_executable_and_parses(shell: str, name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run([shell, "-n", ROOT / name], check=True)


# Asked for its path, it prints it; asked for a venv, it puts itself there. $DIARY gets a line for
# each venv made and each list installed. An installation fails while $DIARY.offline exists.
STAND_IN = """#!/bin/sh
case "$*" in
    -c*) echo "$0" ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo venv >>"$DIARY" ;;
    "-m pip install "*)
        if [ -e "$DIARY.offline" ]; then echo "pip: no network" >&2; exit 1; fi
        for word in "$@"; do case $word in *.txt) echo "$word" >>"$DIARY" ;; esac; done ;;
    "-P -m flaxgpt "*)
        shift 3
        printf '%s|' "$PWD" "$PYTHONPATH" "$@"
        exit 7 ;;
    "-m pytest") pwd ;;
esac
"""


class Clone:
    """A copy of the scripts in a folder with a space in its name, and a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        self.diary = folder / "diary"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.commands = folder / "commands"
        self.commands.mkdir()
        # A pyenv shim of a Python that is not active; a uv that does not run.
        for name in ("python3.13", "uv"):
            self.command(name, "#!/bin/sh\necho no such version >&2\nexit 127\n")
        self.command("python3.12", STAND_IN)

    def command(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text)
        (self.commands / name).chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script from another folder, with few variables in its environment."""
        path = f"{self.commands}:{os.environ['PATH']}"
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            cwd=self.elsewhere,
            env={"PATH": path, "DIARY": str(self.diary), **environment},
            capture_output=True,
            text=True,
        )

    def done(self) -> list[str]:
        """Returns what Python was asked to make since the last call."""
        lines = self.diary.read_text().split() if self.diary.exists() else []
        self.diary.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_first_run_makes_the_environment_with_the_first_python_that_works(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate")
    assert clone.done() == ["venv", "requirements.txt"]
    assert len(result.stderr.splitlines()) == 1
    assert f"with pip and {clone.commands / 'python3.12'}" in result.stderr


def test_arguments_working_directory_and_exit_code_pass_through(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate", "two words", "*", PYTHONPATH="/theirs")
    expected = [clone.elsewhere, f"{clone.root}:/theirs", "generate", "two words", "*"]
    assert result.stdout == "".join(f"{word}|" for word in expected)
    assert result.returncode == 7


def test_a_second_run_is_quiet_and_installs_nothing(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    clone.done()
    assert clone.run("flaxgpt", "generate").stderr == ""
    assert clone.done() == []


def test_a_failed_installation_is_told_and_started_afresh_by_the_next_run(clone: Clone) -> None:
    offline = clone.diary.with_suffix(".offline")
    offline.touch()
    result = clone.run("flaxgpt", "generate")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[1:] == [
        "pip: no network",
        "flaxgpt: the installation failed, as told above; run the command again to repeat it",
    ]
    offline.unlink()
    assert clone.run("flaxgpt", "generate").returncode == 7
    assert clone.done() == ["venv", "venv", "requirements.txt"]


def test_another_version_of_the_pinned_list_remakes_the_environment(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    with (clone.root / "scripts" / "requirements.txt").open("a") as pinned:
        pinned.write("another==1.0\n")
    clone.done()
    clone.run("flaxgpt", "generate")
    assert clone.done() == ["venv", "requirements.txt"]


def test_the_tests_add_their_list_to_the_environment_and_run_in_the_repository(
    clone: Clone,
) -> None:
    clone.run("flaxgpt", "generate")
    clone.done()
    result = clone.run("test")
    assert result.stdout == f"{clone.root}\n"
    assert clone.done() == ["requirements.txt", "requirements-test.txt"]
    clone.run("flaxgpt", "generate")
    clone.run("test")
    assert clone.done() == []


def test_naming_another_python_remakes_the_environment_with_it(clone: Clone) -> None:
    clone.run("flaxgpt", "generate")
    clone.command("other", STAND_IN)
    clone.done()
    clone.run("flaxgpt", "generate", FLAXGPT_PYTHON=str(clone.commands / "other"))
    clone.run("flaxgpt", "generate")
    assert clone.done() == ["venv", "requirements.txt"]


def test_a_named_python_that_does_not_run_is_one_clear_line(clone: Clone) -> None:
    result = clone.run("flaxgpt", "generate", FLAXGPT_PYTHON="/no/such/python")
    assert (result.returncode, result.stdout, clone.done()) == (1, "", [])
    assert re.fullmatch(r"flaxgpt: FLAXGPT_PYTHON is '/no/such/python', .*\n", result.stderr)


def test_no_python_that_fits_is_one_clear_line(clone: Clone) -> None:
    for name in ("python3.12", "python3.11", "python3"):
        clone.command(name, "#!/bin/sh\nexit 1\n")
    result = clone.run("flaxgpt", "generate")
    assert (result.returncode, result.stdout, clone.done()) == (1, "", [])
    assert re.fullmatch(r"flaxgpt: found no Python 3\.11 or later .*\n", result.stderr)
