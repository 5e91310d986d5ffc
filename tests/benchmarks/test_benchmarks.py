"""The benchmarks run, on tiny sizes: what they measure is not looked at, only how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import arms as arms_room
from benchmarks import record
from benchmarks.arms import Arm, Timing, at_a_time, in_turn
from benchmarks.comparisons import compare, compare_speeds, markdown
from tests.support.forked import run_python

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_measures_and_writes(tmp_path):
    out = tmp_path / "bench.json"
    options = ["--small", "--rounds", "2", "--only", "step,documents,layouts,telling", "--json", out]
    done = run_python(["-m", "benchmarks", *options], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())
    assert list(parts) == ["step", "documents", "layouts", "telling"]
    rows = [row for part in parts.values() for row in part["rows"]]
    assert [row["one"] for row in rows] == [
        "ngpt eager",
        "4 documents apart",
        "products, 2 processes",
        "two trainings, each of half of the batch",
        "TP1/PP1/DP2",
        "TP1/PP1/DP2 over TP1/PP1/DP1",
        "TP1/PP2/DP1",
        "TP1/PP2/DP1 over TP1/PP1/DP1",
        "TP2/PP1/DP1",
        "TP2/PP1/DP1 over TP1/PP1/DP1",
        "all of it off",
        "a callback that does nothing",
    ]
    for row in rows:
        assert all(figure > 0 for figure in row["figures"])
        assert all(1 << 20 < memory < 1 << 30 for memory in row["memory"])
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["one"] in done.stdout
    wrong = run_python(["-m", "benchmarks", "--only", "nothing"], cwd=ROOT)
    assert wrong.returncode == 2
    assert "'nothing' is none of" in wrong.stderr
    (tmp_path / "text.json").write_text("text")
    faults = {"--rounds=0": "is none", "--json=/proc/nowhere/x": "cannot be written"}
    for option, problem in (faults | {f"--json={tmp_path}/text.json": "is no record"}).items():
        asked = ["-m", "benchmarks", "--only", "step", option]  # what other parts need may not be there
        wrong = run_python(asked, cwd=ROOT)
        assert (wrong.returncode, problem in wrong.stderr) == (2, True)


def test_the_page_shows_the_record():
    """Made by `make bench`; mend a difference by `python -m benchmarks.record`, not by hand."""
    page, ours = record.PAGE.read_text(), record.read(record.OURS)
    assert record.filled(page, ours) == page
    assert set(ours) <= {name for _, name, _ in record.PART.findall(page)}


def test_a_part_is_measured_anew_by_itself(tmp_path):
    """And a table is of the record alone: what stood there goes, and nothing else does."""
    path = tmp_path / "record.json"
    row = compare("step", "a", "b", Timing([2.0, 4.0], 3 << 20), Timing([1.0, 1.0], 0), "<= 1.5")
    facts = {"machine": "M", "torch": "2", "date": "2026-12-01", "commit": "abc", "load": 0.04, "seconds": 61.2}
    record.keep(path, "step", [row, row], facts)
    record.keep(path, "gpu step", [row], facts)
    record.keep(path, "step", [row], facts | {"date": "2026-12-02"})
    found = record.read(path)
    assert record.comparisons(found["step"]) == [row]
    text = "a\n<!-- bench: step -->\nold\n<!-- end -->\nb\n<!-- bench: gpu step -->\n<!-- end -->"
    assert record.filled(text, {}) == "a\n<!-- bench: step -->\n<!-- end -->\nb\n<!-- bench: gpu step -->\n<!-- end -->"
    shown = record.filled(text, found)
    assert markdown([row]) in shown
    assert "old" not in shown
    assert '(`make bench BENCH="--only step"`: M; torch 2; 2026-12-02, commit abc; 61 s, load 0.0 before.)' in shown
    assert record.filled(shown, found) == shown


def test_ratios_are_of_rounds():
    """A machine that is slower in some rounds slows both arms down, and no ratio."""
    timings = {"a": Timing([2.0, 20.0, 4.0], 3 << 20), "b": Timing([1.0, 10.0, 2.0], 0)}
    row = compare("x", "a", "b", timings["a"], timings["b"], "<= 1.5")
    assert (row.ratio, row.spread, row.met, row.memory) == (2.0, (2.0, 2.0), False, (3 << 20, None))
    faster = compare_speeds("x", "b", "a", timings, ">= 1.5")
    assert (faster.ratio, faster.met) == (2.0, True)
    table = markdown([row, faster])
    assert "| **2** | 2 to 2 | <= 1.5 ✗ | 3 MiB, – |" in table
    assert ">= 1.5 ✓" in table


def _sleeper(seconds):
    import time

    return lambda: time.sleep(seconds)


def _fails():
    raise ValueError("this arm is unwell")


def test_arms_take_turns_and_failures_are_told():
    timings = in_turn([Arm("slow", 2, _sleeper, (0.06,)), Arm("fast", 1, _sleeper, (0.01,))], rounds=3, steps=2)
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    assert timings["slow"].median >= 0.06
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of the arm 'bad' failed.*this arm is unwell"):
        in_turn([Arm("bad", 1, _fails)], rounds=1, steps=1)


def _lives(folder, name):
    """Tells when it is there, and looks who else is."""
    import os

    (folder / f"{name}.pid").write_text(str(os.getpid()))

    def step():
        others = [int(file.read_text()) for file in folder.glob("*.pid") if file.stem != name]
        with (folder / f"{name}.saw").open("a") as saw:
            saw.write("".join(f"{pid} " for pid in others if Path(f"/proc/{pid}").exists()))

    return step


def test_on_gpus_no_arm_lives_beside_another(tmp_path, monkeypatch):
    arms = [Arm(name, 1, _lives, (tmp_path, name)) for name in ("a", "b")]
    in_turn(arms, rounds=1, steps=1)
    assert (tmp_path / "a.saw").read_text().strip()  # the control: on CPUs they take turns
    for file in tmp_path.iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(arms_room, "on_gpu", lambda: True)
        groups = at_a_time(arms)
    monkeypatch.setattr(arms_room, "at_a_time", lambda arms: groups)
    assert in_turn(arms, rounds=1, steps=1).keys() == {"a", "b"}
    assert [(tmp_path / f"{name}.saw").read_text() for name in ("a", "b")] == ["", ""]
