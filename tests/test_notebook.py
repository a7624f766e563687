"""The notebook runs from top to bottom, and its own assertions check the book's values."""

import ast
import importlib.util
import inspect
import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import flaxgpt

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "gpt_from_scratch.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


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


def code_cells(committed):
    return [cell for cell in committed.cells if cell.cell_type == "code"]


def parse(cell):
    """Return the syntax tree of a code cell, without its magic commands."""
    lines = cell.source.splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith("%")))


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


def test_the_cells_of_section_4_1_run_without_a_failed_assertion(committed, execute):
    first = list(
        itertools.takewhile(lambda cell: not cell.source.startswith("## 4.2"), committed.cells)
    )
    assert len(first) < len(committed.cells)
    assert_outputs_have_the_committed_kinds(execute(committed, first), first)


def test_every_flaxgpt_name_and_keyword_argument_in_the_notebook_exists(committed):
    used = 0
    for node in (node for cell in code_cells(committed) for node in ast.walk(parse(cell))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flaxgpt"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                submodule = importlib.util.find_spec(f"{node.module}.{name}")
                assert name in module.__all__ or submodule, f"{node.module}.{name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flaxgpt."):
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
