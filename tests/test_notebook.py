"""The notebooks run from top to bottom.

Assertions in gpt_from_scratch check the book's values. tpu_colab measures the device it runs on,
here eight simulated ones with sizes for tests, so it is stored without outputs.
"""

import ast
import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import flaxgpt

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NOTEBOOK = NOTEBOOKS / "gpt_from_scratch.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def on_tpu():
    return nbformat.read(NOTEBOOKS / "tpu_colab.ipynb", as_version=4)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Return a function that executes cells in a new kernel and returns them with their outputs."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(Path(flaxgpt.__file__).parent.parent))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # halves the time

    def execute(committed, cells):
        notebook = nbformat.from_dict({**committed, "cells": cells})
        resources = {"metadata": {"path": tmp_path}}
        return NotebookClient(notebook, timeout=600, resources=resources).execute().cells

    return execute


def code_cells(notebook):
    return code_cells_of(notebook.cells)


def code_cells_of(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def parse(cell):
    """Return the syntax tree of a code cell, without its magic commands."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith("%")))


def unguarded(tree):
    """Return the nodes of a syntax tree outside of the `try` statements that catch ImportError."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.Try) and "ImportError" in ast.unparse(node)):
            yield from unguarded(node)


def assert_outputs_have_the_committed_kinds(executed, committed):
    for cell, kept in zip(executed, committed, strict=True):
        outputs = cell.get("outputs", [])
        assert not any(output.get("name") == "stderr" for output in outputs), cell.source
        kinds = {output.output_type for output in outputs}  # a stream may arrive in several pieces
        assert kinds == {output.output_type for output in kept.get("outputs", [])}, cell.source


@pytest.mark.slow
def test_every_cell_runs_without_a_failed_assertion(committed, execute):
    executed = execute(committed, committed.cells)
    assert_outputs_have_the_committed_kinds(executed, committed.cells)


@pytest.mark.slow
def test_the_cells_of_section_4_1_run_without_a_failed_assertion(committed, execute):
    first = list(
        itertools.takewhile(lambda cell: not cell.source.startswith("## 4.2"), committed.cells)
    )
    assert len(first) < len(committed.cells)
    assert_outputs_have_the_committed_kinds(execute(committed, first), first)


@pytest.mark.parametrize("notebook", ["committed", "on_tpu"])
def test_every_flaxgpt_name_and_keyword_argument_in_the_notebook_exists(notebook, request):
    used = 0
    cells = code_cells(request.getfixturevalue(notebook))
    for node in (node for cell in cells for node in unguarded(parse(cell))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flaxgpt"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                path = f"{node.module}.{name}"
                assert hasattr(module, name) or importlib.util.find_spec(path), path
        elif isinstance(node, ast.Call) and re.fullmatch(r"flaxgpt\.\w+", ast.unparse(node.func)):
            name = ast.unparse(node.func).removeprefix("flaxgpt.")
            assert name in flaxgpt.__all__
            parameters = inspect.signature(getattr(flaxgpt, name)).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(parameters), name
            used += 1
    assert used > 10


def test_the_committed_outputs_contain_the_values_printed_in_the_book(committed):
    streams = [o for cell in code_cells(committed) for o in cell.outputs if "text" in o]
    text = "".join(output.text for output in streams)
    for value in (
        "[[6109 3626 6100  345]",  # 4.1: the batch
        "0.6159  1.4126 -0.8719  0.5872 -0.8719 -0.8719",  # 4.2: a normalized row
        "0.000202 0.000120 0.000715 0.001399 0.005050",  # 4.4: gradients without shortcuts
        "0.221698 0.206941 0.328970 0.266573 1.325854",  # 4.4: gradients with shortcuts
        "163,009,536  621.83 MiB",  # 4.6: parameters
        "124,412,160",  # 4.6: parameters with weight tying
        "Hello, I am Featureiman Byeswickattribute argue",  # 4.7: the generated text
    ):
        assert value in text


@pytest.mark.parametrize("place", [".", "..", "flaxgpt", None])
def test_the_first_cell_installs_a_nearby_clone_or_else_the_published_package(
    committed, place, tmp_path, monkeypatch
):
    here = tmp_path / "notebooks"
    here.mkdir()
    monkeypatch.chdir(here)
    clone = None if place is None else (here / place).resolve()
    if clone is not None:
        (clone / "flaxgpt").mkdir(parents=True)
        (clone / "flaxgpt" / "__init__.py").touch()
    first = code_cells(committed)[0].source
    assert first.count("%pip install") == 1
    installs = []
    program = first.replace("%pip install --quiet ", "installs.append(f").replace(']"', ']")')
    with monkeypatch.context() as nothing_installed:
        nothing_installed.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="could not be installed"):
            exec(program, {"installs": installs})
    assert installs == [f"{clone or 'flaxgpt'}[notebook]"]
    installs.clear()
    exec(program, {"installs": installs})  # with everything installed, nothing happens
    assert installs == []


def test_the_outputs_are_committed_in_order_and_contain_no_machine_paths(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 7
    text = NOTEBOOK.read_text(encoding="utf-8")
    for path in (str(NOTEBOOK.parent.parent), "/home/", "/root/", "/tmp/", "site-packages"):
        assert path not in text
    assert len(text) < 2_000_000


@pytest.fixture
def reduced(monkeypatch):
    monkeypatch.setenv("FLAXGPT_NOTEBOOK_REDUCED", "1")

    def devices(count):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")

    return devices


def texts(cells):
    """Return the text that cells have printed, and the Markdown they have shown."""
    outputs = [output for cell in code_cells_of(cells) for output in cell.outputs]
    shown = (output.get("data", {}).get("text/markdown", "") for output in outputs)
    return "".join(output.get("text", "") for output in outputs) + "".join(shown)


@pytest.mark.slow
def test_the_tpu_notebook_runs_on_eight_devices(on_tpu, reduced, execute):
    reduced(8)
    executed = execute(on_tpu, on_tpu.cells)
    outputs = [output for cell in code_cells_of(executed) for output in cell.outputs]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert all("Can't import tensorflow" in text for text in errors)  # jax 0.7 when it profiles
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    text = texts(executed)
    for part in (
        "unchanged: jax",
        "Hello, I am Featureiman Byeswickattribute argue",
        "the models are bit-identical",
        "mesh of 8 cpu {'data': 2, 'fsdp': 2, 'tensor': 2}",
        "all-gather fsdp",
        "| perplexity in bfloat16 |",
    ):
        assert part in text


@pytest.mark.slow
def test_the_tpu_notebook_simulates_eight_devices_where_there_is_one(on_tpu, reduced, execute):
    reduced(1)
    cells = code_cells(on_tpu)
    imports = next(i for i, cell in enumerate(cells) if "import runpy" in cell.source)
    mesh = next(i for i, cell in enumerate(cells) if cell.source.startswith("%%writefile"))
    executed = execute(on_tpu, [*cells[: imports + 1], *cells[mesh : mesh + 2]])
    assert "mesh of 8 cpu" in texts(executed)


def installation(on_tpu):
    """Return the program of the cell that installs flaxgpt, with pip replaced by a list."""
    (cell,) = (cell for cell in code_cells(on_tpu) if "%pip install" in cell.source)
    command = '%pip install --quiet "{source}[train]" {kept}'
    assert command in cell.source
    return cell.source.replace(command, 'installs.append(f"{source}[train] {kept}")')


def versions(*found):
    """Return a function that finds each of these in turn, the last one again and again."""
    found = [*found]
    return lambda *names: found.pop(0) if len(found) > 1 else found[0]


def test_the_tpu_notebook_installs_flaxgpt_beside_the_jax_that_is_there(
    on_tpu, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    installs = []
    names = {"installs": installs, "installed": versions({"jax": "0.7.2", "numpy": "2.0.2"})}
    with pytest.raises(ImportError, match="could not be installed"):
        exec(installation(on_tpu), names)
    assert installs == ["flaxgpt[train] jax==0.7.2 numpy==2.0.2"]


def test_the_tpu_notebook_stops_if_the_installation_changes_jax(on_tpu):
    names = {"installed": versions({"jax": "0.7.2"}, {"jax": "0.8.0"})}
    with pytest.raises(AssertionError, match=r"changed .*0\.7\.2.* to .*0\.8\.0"):
        exec(installation(on_tpu), names)


def test_the_tpu_notebook_is_stored_without_outputs_for_a_tpu_runtime(on_tpu):
    assert all(cell.outputs == [] for cell in code_cells(on_tpu))
    assert all(cell.execution_count is None for cell in code_cells(on_tpu))
    assert on_tpu.metadata["accelerator"] == "TPU"
