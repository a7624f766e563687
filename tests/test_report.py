"""The reports of a training run: on standard error, in a terminal, and in the run's folder."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import flaxgpt
from flaxgpt.runs import journal
from flaxgpt.runs.curves import draw_loss
from flaxgpt.runs.journal import (
    cut_back,
    escape_controls,
    metrics_line,
    read_metrics,
    sample_block,
)
from flaxgpt.runs.report import Report

NASTY = "[red]ROMEO:[/red] :smile:\n\x1b[2J\x07\r\x9b0m\u202eback\ttab \N{GRINNING FACE}"


def plain() -> Console:
    return Console(file=io.StringIO())


def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def train(report: Report, *steps: int, loss: float = 2.0) -> None:
    for step in steps:
        report.training(step, loss, 9.8e-4, 1.25, tokens=2048, seconds=0.5)


def steps_in(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def test_without_a_terminal_every_call_is_a_line(tmp_path: Path) -> None:
    console = plain()
    with Report(tmp_path, 2000, console=console) as report:
        report.training(200, 2.47123, 9.8e-4, 1.25, tokens=46_824, seconds=2.0)
        report.validation(200, 1.93121, best=True)
        report.sample(200, "To be,\nor not")
        report.saved(200)
        report.training(400, 2.3, 1e-3, 1.25, tokens=46_824, seconds=2.0)
        report.validation(400, 2.0, best=False)
        report.note("done")
    assert shown(console).splitlines() == [
        "step 200/2000  loss 2.4712  lr 9.8e-04  23,412 tokens/s  0:18 left",
        "step 200/2000  validation 1.9312 (best)",
        "step 200/2000  sample",
        "  To be,",
        "  or not",
        "step 200/2000  checkpoint saved",
        "step 400/2000  loss 2.3000  lr 1.0e-03  23,412 tokens/s  0:16 left",
        "step 400/2000  validation 2.0000",
        "done",
    ]


def test_long_lines_are_not_wrapped_without_a_terminal(tmp_path: Path) -> None:
    console = plain()
    with Report(tmp_path, 10, console=console) as report:
        report.sample(5, "word " * 100 + "end")
    assert len(shown(console).splitlines()) == 2


@pytest.mark.parametrize(
    ("steps", "seconds", "left"), [(1, 1, "1:39"), (10, 400, "1:00:00"), (50, 0.4, "0:00")]
)
def test_remaining_time_is_in_hours_minutes_and_seconds(
    tmp_path: Path, steps: int, seconds: float, left: str
) -> None:
    console = plain()
    with Report(tmp_path, 100, console=console) as report:
        report.training(steps, 2.0, 1e-3, 1.0, tokens=1, seconds=seconds)
    assert shown(console).endswith(f"  {left} left\n")


def test_remaining_time_follows_a_change_of_speed_but_not_one_slow_period(tmp_path: Path) -> None:
    console = plain()
    with Report(tmp_path, 1100, console=console) as report:
        for step, seconds in [*((i, 1.0) for i in range(1, 51)), (51, 4.0)]:
            report.training(step, 2.0, 1e-3, 1.0, tokens=1, seconds=seconds)
        for step in range(52, 102):
            report.training(step, 2.0, 1e-3, 1.0, tokens=1, seconds=4.0)
    clocks = re.findall(r"(?:(\d+):)?(\d+):(\d+) left", shown(console))
    left = [int(h or 0) * 3600 + int(m) * 60 + int(s) for h, m, s in clocks]
    assert left[49] == 1050
    assert left[50] < 1.5 * left[49]
    assert left[100] == pytest.approx(4 * 999, rel=0.01)


def test_remaining_time_of_a_resumed_run_depends_on_its_own_steps_only(tmp_path: Path) -> None:
    console = plain()
    with Report(tmp_path, 100, start_step=80, console=console) as report:
        report.training(90, 2.0, 1e-3, 1.0, tokens=1, seconds=10.0)
    assert "step 90/100 " in shown(console)
    assert shown(console).endswith("  0:10 left\n")


def test_progress_goes_to_standard_error_and_nothing_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(tmp_path, 10) as report:
        train(report, 5)
        report.validation(5, 2.0, best=True)
        report.sample(5, "text")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 5/10  loss 2.0000")


def test_a_terminal_shows_a_progress_bar_below_all_other_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = terminal(monkeypatch)
    with Report(tmp_path, 10, console=console) as report:
        report.note("starting")
        assert "step 0/10 " in shown(console)
        assert "compiling" in shown(console)
        train(report, 5)
        report.sample(5, "To be")
        train(report, 10)
    scrolled, bar = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown(console)).rsplit("step 10/10 ", 1)
    assert re.search(r"^━+ loss 2.0000  lr 9.8e-04  4,096 tokens/s  0:00 left\s*$", bar)
    assert scrolled.index("starting") < scrolled.index("sample") < scrolled.index("  To be")


def test_the_cursor_stays_visible_so_that_a_killed_run_does_not_leave_it_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = terminal(monkeypatch)
    with Report(tmp_path, 10, console=console):
        assert shown(console).rfind("\x1b[?25h") > shown(console).rfind("\x1b[?25l")


def test_redirected_output_of_the_caller_stays_out_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = terminal(monkeypatch)
    with Report(tmp_path, 10, console=console):
        print("result")
    assert capsys.readouterr().out == "result\n"
    assert "result" not in shown(console)


def test_a_dumb_terminal_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with Report(tmp_path, 10, console=console) as report:
        train(report, 5)
    assert shown(console) == "step 5/10  loss 2.0000  lr 9.8e-04  4,096 tokens/s  0:00 left\n"


@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_a_sample_is_shown_literally_and_cannot_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    console = plain() if kind == "plain" else terminal(monkeypatch)
    with Report(tmp_path, 10, console=console) as report:
        report.sample(5, NASTY)
    output = shown(console)
    assert "[red]ROMEO:[/red] :smile:" in output
    assert r"\x1b[2J\x07\r\x9b0m\u202eback" in output
    assert "\N{GRINNING FACE}" in output
    assert not re.search("\x1b\\[2J|[\x07\x9b\u202e]", output)
    assert not re.search("[\x1b\x07\x9b\u202e]", (tmp_path / "samples.txt").read_text())


def test_escaped_text_has_no_control_characters_and_can_be_encoded() -> None:
    everything = escape_controls("".join(map(chr, range(0x10000))))
    everything.encode()
    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
    assert not re.search(controls, everything)


@pytest.mark.parametrize(
    "text", ["plain\n\ttext", "déjà vu 你好", "family: \U0001f468\u200d\U0001f467"]
)
def test_escaping_leaves_ordinary_text_unchanged(text: str) -> None:
    assert escape_controls(text) == text


def test_windows_line_ends_become_newlines_without_an_escaped_return() -> None:
    assert escape_controls("one\r\ntwo\rthree") == "one\ntwo\\rthree"


def test_each_sample_has_a_heading_with_its_step(tmp_path: Path) -> None:
    with Report(tmp_path, 20, console=plain()) as report:
        report.sample(5, "To be,\n\nor not")
        report.sample(10, "step 3")
    written = (tmp_path / "samples.txt").read_text()
    assert written == "step 5\n  To be,\n\n  or not\n\nstep 10\n  step 3\n\n"


def test_metrics_are_json_lines_written_immediately(tmp_path: Path) -> None:
    with Report(tmp_path, 20, console=plain()) as report:
        report.training(5, 2.5, 1e-3, 1.25, tokens=100, seconds=0.5)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0]) == {
            "step": 5,
            "loss": 2.5,
            "learning_rate": 1e-3,
            "grad_norm": 1.25,
            "tokens_per_s": 200.0,
            "seconds": 0.5,
        }
        report.validation(5, 2.25, best=True)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[1]) == {"step": 5, "validation_loss": 2.25, "best": True}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_become_null_in_the_metrics_and_are_shown_in_the_line(
    tmp_path: Path, value: float
) -> None:
    console = plain()
    with Report(tmp_path, 20, console=console) as report:
        train(report, 5, loss=value)
        report.validation(5, value, best=False)
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss": null' in first
    assert '"validation_loss": null' in second
    assert f"loss {value}" in shown(console)


def test_resuming_removes_reports_after_the_checkpoint(tmp_path: Path) -> None:
    with Report(tmp_path, 40, console=plain()) as report:
        for step in (10, 20, 30):
            train(report, step)
            report.validation(step, 2.0, best=True)
            report.sample(step, f"step {step + 100}")
    with Report(tmp_path, 40, start_step=20, console=plain()) as report:
        assert steps_in(tmp_path) == [10, 10, 20, 20]
        train(report, 30, 40)
        report.sample(30, "again")
    assert steps_in(tmp_path) == [10, 10, 20, 20, 30, 40]
    headings = re.findall(r"^step \d+", (tmp_path / "samples.txt").read_text(), re.MULTILINE)
    assert headings == ["step 10", "step 20", "step 30"]


def test_starting_again_at_step_zero_removes_all_earlier_reports(tmp_path: Path) -> None:
    with Report(tmp_path, 40, console=plain()) as report:
        report.validation(0, 4.0, best=True)
        report.sample(0, "old")
        train(report, 10)
    with Report(tmp_path, 40, console=plain()) as report:
        report.validation(0, 4.0, best=True)
    assert steps_in(tmp_path) == [0]
    assert (tmp_path / "samples.txt").read_text() == ""


@given(data=st.data())
def test_resuming_keeps_complete_lines_up_to_the_checkpoint_wherever_the_run_was_killed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    steps = data.draw(st.lists(st.integers(1, 9), max_size=6).map(sorted))
    lines = [metrics_line({"step": step, "loss": 2.0}) for step in steps]
    written = "".join(lines)
    killed_at = data.draw(st.integers(0, len(written)))
    (folder / "metrics.jsonl").write_text(written[:killed_at])
    resumed = data.draw(st.integers(1, 9))
    cut_back(folder / "metrics.jsonl", folder / "samples.txt", resumed)
    whole = steps[: written[:killed_at].count("\n")]
    assert steps_in(folder) == [step for step in whole if step <= resumed]


def test_resuming_removes_a_half_written_sample(tmp_path: Path) -> None:
    whole = sample_block(10, "To be")
    (tmp_path / "samples.txt").write_text(whole + "step 1")
    cut_back(tmp_path / "metrics.jsonl", tmp_path / "samples.txt", 10)
    assert (tmp_path / "samples.txt").read_text() == whole


def test_resuming_does_not_rewrite_a_file_without_later_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Report(tmp_path, 40, console=plain()) as report:
        train(report, 10)
    monkeypatch.delattr(journal, "write_file_atomically")
    with Report(tmp_path, 40, start_step=10, console=plain()):
        assert steps_in(tmp_path) == [10]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 2.0}', '{"step": "3"}', "3", ""])
def test_an_invalid_line_of_metrics_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    message = re.escape(f"{path}, line 2: {line!r} is not a JSON object with a step")
    with pytest.raises(ValueError, match=message):
        cut_back(path, tmp_path / "samples.txt", 5)
    assert len(path.read_text().splitlines()) == 3


def picture(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(io.BytesIO(data), format="png")[..., :3]


def has_color(image: np.ndarray, name: str) -> bool:
    return bool((np.abs(image - matplotlib.colors.to_rgb(name)).max(axis=-1) < 0.01).any())


def test_each_validation_redraws_the_loss(tmp_path: Path) -> None:
    with Report(tmp_path, 100, console=plain()) as report:
        train(report, *range(1, 50))
        assert not (tmp_path / "loss.png").exists()
        report.validation(50, 2.0, best=True)
        report.draw()
        first = picture((tmp_path / "loss.png").read_bytes())
        report.validation(100, 1.5, best=True)
        report.draw()
    second = picture((tmp_path / "loss.png").read_bytes())
    assert first.shape == second.shape == (750, 1200, 3)
    assert (first != second).any()
    for color in ("tab:blue", "tab:orange", "tab:red"):
        assert has_color(first, color)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_the_best_validation_is_marked() -> None:
    records = [{"step": step, "validation_loss": abs(step - 30)} for step in range(0, 101, 10)]
    red = np.array(matplotlib.colors.to_rgb("tab:red"))
    reds = np.argwhere(np.abs(picture(draw_loss(records)) - red).max(axis=-1) < 0.01)
    row, column = reds[reds[:, 0].argmax()]  # the lowest, as the legend has another one
    assert row > 600
    assert 300 < column < 500


def test_a_missing_loss_is_drawn_as_a_gap() -> None:
    training = [{"step": i, "loss": None if 40 < i < 60 else 3 - i / 50} for i in range(101)]
    image = picture(draw_loss([*training, {"step": 50, "validation_loss": None}]))
    assert has_color(image[:, :550], "tab:blue")
    assert not has_color(image[:, 590:640], "tab:blue")
    assert has_color(image[:, 680:], "tab:blue")
    assert not has_color(image, "tab:red")


def test_the_plot_does_not_depend_on_the_callers_style() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 7, "font.size": 20}):
        styled = draw_loss(records)
    assert styled == draw_loss(records)


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "loss": None}], [{"step": 1, "loss": 2.0}]], ids=str
)
def test_a_run_of_few_records_can_be_drawn(records: list[dict[str, float | None]]) -> None:
    assert picture(draw_loss(records)).shape == (750, 1200, 3)


@pytest.mark.slow
def test_drawing_leaves_the_callers_matplotlib_unchanged_and_imports_it_on_demand() -> None:
    program = """
import sys
import flaxgpt.runs.report
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 7
before = dict(matplotlib.rcParams.copy())
flaxgpt.runs.report.draw_loss([{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 2.0}])
assert dict(matplotlib.rcParams.copy()) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    root = str(Path(flaxgpt.__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": root}, check=True
    )


def test_without_matplotlib_one_line_says_how_to_install_it_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    console = plain()
    with Report(tmp_path, 100, console=console) as report:
        for step in (50, 100):
            report.validation(step, 2.0, best=True)
            report.draw()
    lines = [line for line in shown(console).splitlines() if "validation" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("no loss.png: plotting requires matplotlib")
    assert lines[0].endswith("pip install 'flaxgpt[plots]'")
    assert steps_in(tmp_path) == [50, 100]
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_full_disk_is_one_warning_with_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    console = plain()
    with Report(tmp_path, 100, console=console) as report:
        (tmp_path / name).symlink_to("/dev/full")
        for step in (10, 20):
            train(report, step)
            report.sample(step, "text")
    (line,) = [line for line in shown(console).splitlines() if str(tmp_path / name) in line]
    assert "not written: " in line
    assert os.strerror(errno.ENOSPC) in line


def test_a_disk_too_full_for_the_plot_is_one_warning_and_keeps_the_previous_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    console = plain()
    with Report(tmp_path, 100, console=console) as report:
        report.validation(50, 2.0, best=True)
        report.draw()
        last = (tmp_path / "loss.png").read_bytes()
        monkeypatch.setattr(os, "fsync", fails)
        report.draw()
        report.draw()
    assert len(re.findall(r"no loss.png: .*No space left.*/loss\.png'", shown(console))) == 1
    assert (tmp_path / "loss.png").read_bytes() == last
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}
