"""scripts/bench.py device: it measures, names what it could not measure, and ends in time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command import QUICK

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    """Make the modules beside bench.py importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run_bench(*arguments, script=SCRIPTS / "bench.py"):
    """Run scripts/bench.py and return what it printed and the JSON object of its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, env=QUICK, timeout=300, check=True)
    *table, last = done.stdout.decode().splitlines()
    return table, json.loads(last)


@pytest.mark.slow
def test_the_device_task_measures_every_row_and_compares_with_a_peer(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text("""import json, sys; print(json.dumps({"tokens_per_s": 1.0, "a": sys.argv}))""")
    table, found = run_bench("device", "--quick", "--against", f"{sys.executable} {peer} --fast")
    rows = [row for section in SECTIONS for row in found[section]]
    assert {row["status"] for row in rows} == {"measured"}
    for row in found["decode"]:
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["bytes_per_step"] > 0
    assert all(row["mfu"] > 0 for row in found["train"] + found["prefill"])
    assert {row["implementation"] for row in found["attention"]} >= {"plain", "dot_product"}
    (peer_row,) = found["peer"]
    assert peer_row["ratio"]["median"] == peer_row["flaxgpt"]["median"]
    assert "--fast train --preset shakespeare-char" in peer_row["peer"]["command"]
    assert found["peak"]["source"].startswith("measured here")
    assert sum(line.startswith("| ---") for line in table) == len(SECTIONS)


@pytest.mark.slow
def test_the_prefix_task_measures_each_way_to_the_first_id():
    sizes = ("--preset", "gpt2", "--prefix-length", "16", "--prompt-length", "1", "--repeats", "1")
    _, found = run_bench("prefix", *sizes)
    assert found["task"] == "prefix"
    assert list(found["ms"]) == ["whole", "prefix", "stored", "prefill"]
    assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in found["ms"].values())
    assert found["ratio"]["median"] > 0


SECTIONS = ("peer", "roofline", "decode", "train", "prefill", "attention")


@pytest.mark.slow
def test_the_drafts_task_compares_lookup_with_plain_steps_on_every_kind_of_text():
    sizes = ("--prompt-length", "48", "--new-tokens", "16", "--rounds", "1")
    _, found = run_bench("drafts", *sizes)
    assert set(found["texts"]) == {"ordinary", "quote", "list", "code"}
    for row in found["texts"].values():
        assert row["lookup / plain"]["median"] == row["lookup"]["median"] / row["plain"]["median"]
        assert row["plain_steps"] + row["verifying_steps"] <= 15
    assert found["texts"]["quote"]["ids_per_step"] > 2


@pytest.mark.slow
def test_the_draft_model_task_compares_drafts_with_plain_steps():
    sizes = ("--prompt-length", "8", "--new-tokens", "16", "--rounds", "1")
    _, found = run_bench("draft-model", "--scale", "0", *sizes)
    assert found["task"] == "draft-model"
    assert 0.4 < found["size_of_draft"] < 0.45  # 2 blocks of 12, and the embeddings
    assert found["ratio"]["median"] == found["draft"]["median"] / found["plain"]["median"]
    # All are right, so 15 ids after the first one take three steps of 5.
    assert (found["plain_steps"], found["verifying_steps"], found["ids_per_step"]) == (0, 3, 5)


@pytest.mark.slow
def test_the_device_task_begins_no_row_after_its_budget():
    table, found = run_bench("device", "--quick", "--budget", "0.001")
    statuses = [row["status"] for section in SECTIONS for row in found.get(section, [])]
    assert set(statuses) == {"not run: out of time"}
    assert "| 1 | bfloat16 | not run: out of time |" in table


@pytest.mark.slow
def test_the_device_task_prints_what_it_has_when_a_row_outlasts_the_budget(tmp_path):
    impatient = tmp_path / "impatient.py"  # that stops the task half a second after the budget
    impatient.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import bench, device_table; device_table._GRACE = 0.5; bench.main()"
    )
    table, found = run_bench("device", "--quick", "--budget", "0.5", script=impatient)
    assert found["seconds"] < 4
    assert table[0].endswith("in total")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--preset", "nope"], "unknown preset 'nope'"),
        (["decode", "--batch", "0"], "--batch=0 must be a whole number, 1 or more"),
        (["decode", "--prompt-length", "0"], "--prompt-length=0 must be a whole number"),
        (["decode", "--repeats", "0"], "--repeats=0 must be a whole number"),
        (["decode", "--against", "peer", "--rounds", "0"], "--rounds=0 must be a whole number"),
        (["decode", "--batch", "2", "--driver", "stream"], "leave out --batch and --beams"),
        (["decode", "--beams", "0"], "--beams=0 must be a whole number, 1 or more"),
        (["decode", "--beams", "2", "--driver", "stream"], "leave out --batch and --beams"),
        (["draft-model", "--blocks", "13"], "more than the 12 blocks of gpt2"),
        (["train", "--batch", "0"], "--batch=0 must be a whole number"),
        (["train", "--steps-per-call", "0"], "--steps-per-call=0 must be a whole number"),
        (["train", "--steps", "7"], "--steps 7 must be a multiple of 10"),
        (["prefix", "--batch", "0"], "--batch=0 must be a whole number"),
        (["prefix", "--prefix-length", "1020"], "more than context_length=1024 of gpt2"),
        (["device", "--budget", "-1"], "--budget=-1.0 must be a positive number"),
        (["device", "--rounds", "0"], "--rounds=0 must be a whole number"),
    ],
)
def test_invalid_options_end_the_benchmark_with_one_line(scripts, monkeypatch, arguments, message):
    import bench

    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert re.fullmatch(f"bench.py: .*{re.escape(message)}.*", str(stopped.value))


def test_what_does_not_fit_in_memory_is_reported_and_the_next_row_still_runs(scripts):
    from device_table import Row, _Table

    def too_large():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    table = _Table({}, end=float("inf"))
    table.add(Row("decode", {"batch": 256}, too_large))
    table.add(Row("decode", {"batch": 1}, lambda: {"tokens_per_s": 2.0}))
    assert table.sections["decode"] == [
        {"batch": 256, "status": "does not fit in memory"},
        {"batch": 1, "status": "measured", "tokens_per_s": 2.0},
    ]


def test_a_row_that_fails_says_why(scripts):
    from device_table import Row, _Table

    def broken():
        raise NotImplementedError("no such kernel on this device\nand more")

    table = _Table({}, end=float("inf"))
    table.add(Row("attention", {}, broken))
    (row,) = table.sections["attention"]
    assert row["status"] == "failed: NotImplementedError: no such kernel on this device"


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("TPU v4", 275e12, 1200e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1638e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA L4", 121e12, 300e9),
        ("Tesla T4", 65e12, 320e9),
    ],
)
def test_the_peak_of_a_known_device_is_the_published_one(scripts, kind, flops, bandwidth):
    from peaks import published_peak

    peak = published_peak(kind)
    assert (peak.bfloat16, peak.bandwidth) == (flops, bandwidth)


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_an_unknown_device_and_a_part_of_a_device_have_no_published_peak(scripts, kind):
    from peaks import published_peak

    assert published_peak(kind) is None
