"""Every example in README.md and docs/ runs, and prints what the page says.

The blocks of a page share their names. A comment after a statement shows its value: a literal
(`# 24`), or a dtype and shape (`# float32 [1, 4]`). An expression that is not None must show one.
Printed output is shown in the comment lines below. A line of a shell block runs in a folder with a
few small files; the plain block below is the beginning of its output.

An HTML comment before a block changes this. `<!-- slow -->` marks a block for the slow tests; only
the arguments of its commands are checked in the others. A block after `<!-- parse -->` never runs.
"""

import ast
import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from markdown_it import MarkdownIt

import flaxgpt
from command import ENVIRONMENT, call
from flaxgpt.cli import _parse
from flaxgpt.runs import train
from flaxgpt.training import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHAPE = re.compile(r"(float32|int32|bool) (\[[\d, ]*\])")
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """Line number of its first line."""
    directive: str
    """`slow`, `parse` or nothing."""
    output: str | None = None
    """The text of the plain block after it."""


def blocks(page: Path) -> list[Block]:
    """Return the Python and shell blocks of a page."""
    found, directive, previous = [], "", None
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            if not token.info and previous and previous.language == "sh":
                found[-1] = dataclasses.replace(previous, output=token.content)
                previous = None
                continue
            assert token.info in ("python", "sh"), f"{page}: a block of unknown language"
            line = token.map[0] + 2
            found.append(previous := Block(token.info, token.content, line, directive))
            directive = ""
        elif token.type == "html_block":
            directive = re.fullmatch(r"<!-- (slow|parse)\b.*-->\s*", token.content, re.S)[1]
        else:
            previous = None
    return found


def of(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text files, a short training run, and the scripts of the repository."""
    folder = tmp_path_factory.mktemp("documentation")
    verdict = (ROOT / "tests" / "data" / "verdict" / "the-verdict.txt").read_text(encoding="utf-8")
    for name in ("input.txt", "mine.txt", "other.txt"):
        (folder / name).write_text(verdict, encoding="utf-8")
    (folder / "scripts").mkdir()
    command = f'#!/bin/sh\nexec "{sys.executable}" -m flaxgpt "$@"\n'
    for path in (folder / "scripts" / "flaxgpt", folder / "flaxgpt"):
        path.write_text(command)
        path.chmod(0o755)
    cfg = flaxgpt.GPTConfig(
        vocab_size=len(set(verdict)), context_length=16, emb_dim=16, n_heads=2, n_layers=2
    )
    settings = TrainConfig(
        data=(str(folder / "input.txt"),),
        tokenizer="characters",
        steps=2,
        warmup_steps=0,
        eval_windows=4,
        sample_every=0,
    )
    train(cfg, settings, folder / "run")
    return folder


def literal(comment: str) -> object:
    """Return the literal that a comment begins with, or `...` if it begins with none."""
    for end in sorted({m.start() for m in re.finditer(r"[ :;,]", comment)} | {len(comment)})[::-1]:
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(comment[:end].rstrip(":;,"))
    return ...


def agree(value: object, shown: object) -> bool:
    """Whether a value is the one shown, with floats rounded to the digits shown."""
    if isinstance(shown, float):
        digits = len(repr(shown).partition(".")[2])
        return round(float(value), digits) == shown  # type: ignore[arg-type]
    return bool(value == shown)


def check_shape(value: object, comment: str, place: str) -> bool:
    """Check a value against a comment such as `float32 [1, 4]`; False if it is no such comment."""
    match = SHAPE.match(comment)
    if match:
        shape = tuple(ast.literal_eval(match[2]))
        assert (str(value.dtype), value.shape) == (match[1], shape), place  # type: ignore[attr-defined]
    return bool(match)


def run_python(block: Block, names: dict[str, object], place: str) -> None:
    """Run a block and check the values and the output that it shows."""
    lines = block.text.splitlines()
    body = ast.parse(block.text).body
    starts = [node.lineno - 1 for node in body[1:]] + [len(lines)]
    for node, stop in zip(body, starts, strict=True):
        code = ast.get_source_segment(block.text, node)
        where = f"{place}:{block.line + node.lineno - 1}"
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        below = lines[node.end_lineno : stop]
        comments = [rest.strip().removeprefix("#").strip()] if rest.strip() else []
        comments += [line.removeprefix("# ") for line in below if line.startswith("# ")]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if isinstance(node, ast.Expr):
                value = eval(code, names)
            else:
                exec(code, names)
                value = None
        if isinstance(node, ast.Expr) and value is not None:
            assert comments, f"{where} shows no value"
            shown = literal(comments[0])
            if not check_shape(value, comments[0], where):
                assert shown is not ..., f"{where} shows no value"
                assert agree(value, shown), f"{where} is {value!r}, not {shown!r}"
        elif isinstance(node, ast.Assign) and comments and isinstance(node.targets[0], ast.Name):
            value = names[node.targets[0].id]
            shown = literal(comments[0])
            if not check_shape(value, comments[0], where) and shown is not ...:
                assert agree(value, shown), f"{where} is {value!r}, not {shown!r}"
        below = [line.removeprefix("# ") for line in below if line.startswith("# ")]
        if printed.getvalue() and below:
            assert printed.getvalue().splitlines() == below, where


def run_page(page: Path, slow: bool) -> None:
    """Run the Python blocks of a page: the slow ones too, or only those that are not."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            place = NAMES[page]
            compile(block.text, place, "exec")
            if not block.directive or (slow and block.directive == "slow"):
                run_python(block, names, place)


def slow_pages(language: str) -> list[Path]:
    return [
        page
        for page in PAGES
        if any(b.language == language and b.directive == "slow" for b in blocks(page))
    ]


@pytest.fixture
def precision():
    """Restore the settings of JAX that a page changes."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize("page", of("python"), ids=NAMES.get)
def test_the_python_examples_of_a_page_run(page, folder, monkeypatch, precision) -> None:
    monkeypatch.chdir(folder)
    run_page(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_pages("python"), ids=NAMES.get)
def test_the_slow_python_examples_of_a_page_run(page, folder, monkeypatch, precision) -> None:
    monkeypatch.chdir(folder)
    run_page(page, slow=True)


def commands(language_directives: tuple[str, ...]) -> list:
    """Return the shell lines with these directives, as test parameters (line, output, place)."""
    return [
        pytest.param(line, block.output, id=f"{NAMES[page]}: {line.split('  #')[0]}")
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh" and block.directive in language_directives
        for line in block.text.splitlines()
    ]


def run_shell(line: str, output: str | None, folder: Path) -> None:
    """Run a line of a shell block in `folder` and check the output shown."""
    words = shlex.split(line, comments=True)
    is_simulated = words[1:2] == ["shard"]  # on more devices than this process has
    if words[0] in ("flaxgpt", "scripts/flaxgpt") and "|" not in words and not is_simulated:
        done = call(*words[1:])  # in this process, which saves starting Python
    else:
        path = f"{folder}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", line], cwd=folder, env=ENVIRONMENT | {"PATH": path}, capture_output=True
        )
    assert done.returncode == 0, done.stderr.decode()
    if output is not None:
        printed = done.stdout.decode().split()
        shown = output.split()
        assert printed[: len(shown)] == shown


@pytest.mark.parametrize(("line", "output"), commands(("",)))
def test_a_command_runs(line: str, output: str | None, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    if line == "scripts/test":  # which is running
        assert os.access(ROOT / line, os.X_OK)
    else:
        run_shell(line, output, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "output"), commands(("slow",)))
def test_a_slow_command_runs(
    line: str, output: str | None, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    for name in ("input.txt", "mine.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    run_shell(line, output, folder)


@pytest.mark.parametrize(("line", "output"), commands(("slow", "parse")))
def test_the_arguments_of_a_command_exist(line: str, output: None, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        help_of = subprocess.run(
            [sys.executable, ROOT / arguments[0], arguments[1], "--help"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        options = [word for word in arguments if word.startswith("--")]
        assert [option for option in options if option not in help_of] == []
    else:
        assert program in ("flaxgpt", "scripts/flaxgpt")
        _parse(arguments)


def check(text: str) -> None:
    run_python(Block("python", textwrap.dedent(text), 1, ""), {"np": np}, "example")


@pytest.mark.parametrize(
    "text",
    [
        "1 + 1  # 3",
        "1 + 1  # prose",
        "1 + 1",
        "3.14159  # 3.15",
        "np.zeros((1, 2), np.float32)  # float32 [2, 1]",
        "x = np.zeros(1, np.int32)  # float32 [1]",
        "print('a')\n# b",
        "x = [1, 2]  # [1, 3]",
    ],
)
def test_an_example_that_shows_something_else_fails(text: str) -> None:
    with pytest.raises(AssertionError):
        check(text)


def test_an_example_may_explain_its_value() -> None:
    check("1 + 1  # 2, which is even\n3.14159  # 3.14\n(1, 2)  # (1, 2): a pair\nprint('a')\n# a\n")


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            path = page.parent / target
            if target.startswith("flaxgpt/"):  # which may be installed elsewhere
                path = Path(flaxgpt.__file__).parent.parent / target
            assert path.exists(), f"{NAMES[page]} links to {target}"


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
