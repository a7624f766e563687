"""Modules import only from the layers below them, which pyproject.toml lists."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flaxgpt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(flaxgpt.__file__).parent
SCRIPT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(sys.argv[1], no_cache=True))
"""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the imports of the package `flaxgpt` in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, ROOT / "pyproject.toml"],
        cwd=folder,  # where import-linter looks for packages first
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files in another folder, for a test to change."""
    python_only = shutil.ignore_patterns("*.safetensors", "*.tiktoken", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "flaxgpt", ignore=python_only)
    return tmp_path


def test_imports_go_one_way() -> None:
    result = lint(PACKAGE.parent)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("model/layers.py", "from flaxgpt.cli import main"),
        ("inspection/lens.py", "from flaxgpt.training import TrainConfig"),
        ("tokenizer/__init__.py", "def f():\n    import flaxgpt.weights"),
    ],
    ids=["upwards", "sideways", "inside a function"],
)
def test_an_import_against_the_layers_is_found(copy: Path, module: str, line: str) -> None:
    path = copy / "flaxgpt" / module
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert lint(copy).returncode == 1


def test_a_new_module_needs_a_layer(copy: Path) -> None:
    (copy / "flaxgpt" / "helpers.py").touch()
    result = lint(copy)
    assert result.returncode == 1
    assert "helpers" in result.stdout


def test_every_layer_exists() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    names = [name.strip(" ") for layer in contract["layers"] for name in layer.split("|")]
    required = [name for name in names if not name.startswith("(")]
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert [name for name in required if name not in modules] == []
