"""The rows of a run's start. Whole starts are left to the benchmark: each would import torch on every rank."""

from __future__ import annotations

import json

import pytest

from benchmarks import starting
from benchmarks.arms import Timing


def test_rows_of_starts(monkeypatch):
    asked = []

    def first_step(config, ranks, after):
        asked.append((config["layout"], ranks, after))
        return 6.0 if after == 0 else 12.0

    monkeypatch.setattr(starting, "_imports", lambda ranks: 4.0)
    monkeypatch.setattr(starting, "_first_step", first_step)
    monkeypatch.setattr(starting, "_steps", lambda config: 3)
    monkeypatch.setattr(
        starting, "_seconds_of", lambda words, rounds: Timing([0.4 + 0.2 * ("train" in words)] * rounds, 0)
    )
    rows = starting.starts(2, small=False)
    assert [(row.ratio, row.met) for row in rows[:3]] == [
        (0.8, True),
        (pytest.approx(1.2), False),
        (pytest.approx(1.2), False),
    ]
    assert [(row.ratio, row.met) for row in rows[3:]] == [(0.75, True), (1.5, False), (0.8, True), (1.5, None)]
    assert asked == [({"tp": 2}, 4, after) for after in (0, 3)] * 2


def test_a_command_is_a_user_s(monkeypatch):
    """Though this process may be a rank by now, inside of which `--nproc-per-node` is refused."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not {"RANK", "MASTER_PORT"} & set(starting.without_launcher())
    assert starting._seconds_of(["--help"], 1).median > 0


def test_a_run_that_fails_is_told_of(tmp_path):
    config = starting._config(tmp_path, starting.RANKS)
    with pytest.raises(RuntimeError, match="cannot fill the world of 3 rank"):
        starting._first_step(config, 3, 0)
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.parent.mkdir()
    rows = [{"event": "start", "step": 9}, {"event": "step", "step": 4}, {"event": "step", "step": 5}]
    metrics.write_text("\n".join(map(json.dumps, rows)) + '\n{"event": "step", "st')
    assert starting._steps(config) == 5
