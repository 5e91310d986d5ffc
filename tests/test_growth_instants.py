"""κ again over recorded curves: the instants at which runs grew come out, and those of a known curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from growth_experiments import arm, load, result, spec

from benchmarks.growth.experiment import load_experiment, make_job
from benchmarks.growth.groups import Group
from benchmarks.growth.instants import KAPPAS, instant, instants_table, watched_stages
from benchmarks.growth.results import Point, Results
from megabus.config import resolve_stages

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/growth/results/cpu.jsonl"
RUNS = [run for run in Results(RESULTS) if any(growth["reason"] == "kappa" for growth in run.growths)]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.arm}-{run.lr:g}-{run.seed}")
def test_recorded_growths_come_out(run):
    experiment = load_experiment(RESULTS.parents[1] / "cpu.yaml")
    config = make_job(experiment, run.arm, run.seed, run.lr, run.budget).config(Path("unused"))
    trigger = config.growth.trigger
    watched = list(watched_stages(run, resolve_stages(config, 1), 1.0))
    assert len(watched) >= len(run.growths)
    for stage, growth in zip(watched, run.growths, strict=False):
        shares = [instant(stage, trigger.model_copy(update={"kappa": kappa})) for kappa in (0.3, trigger.kappa)]
        assert shares[1] == (1.0 if growth["reason"] == "kappa" else None)
        assert growth["reason"] == "cap" or shares[0] < 1  # control: another κ would have grown elsewhere


def curve(total, n=20):
    """Falls from 4 to 2 as fast as it can be reckoned with: what is left to gain is (1 - share)²."""
    return [Point(total * i / n, 100 * i, 0.0, 2 + 2 * (1 - i / n) ** 2) for i in range(n + 1)]


def test_hindsight_is_the_share_of_what_a_stage_gave(tmp_path):
    experiment = load(tmp_path, spec(arms={"scratch": arm()}))
    run = replace(result(experiment, "scratch"), curve=curve(1e9), flops=1e9)
    table = instants_table(experiment, [Group("scratch", 1.0, 0.01, [run])]).splitlines()
    cells = {line.split(" | ")[4]: line.strip("| ").split(" | ")[5:] for line in table[2:]}
    # The rate falls over the last 0.3, so the stage is judged by its first 0.7: it came to 2 + 2 · 0.3².
    whole = 2 - 2 * 0.3**2
    expected = [next(p.flops / 1e9 for p in run.curve[7:] if 4 - p.loss >= kappa * whole - 1e-12) for kappa in KAPPAS]
    assert cells["hindsight"] == [f"{share:.0%}" for share in expected]
    assert len(set(cells["hindsight"])) > 3


def test_stages_are_told_apart_where_two_losses_have_one_place(tmp_path):
    experiment = load(tmp_path, spec(arms={"scratch": arm()}))
    stage = resolve_stages(make_job(experiment, "scratch", 0, 0.01, 1.0).config(Path("unused")), 1)[0]
    points = curve(1e9, 4)
    points.insert(3, points[2]._replace(loss=9.0))  # after the growth
    run = replace(result(experiment, "scratch", growths=[{"flops": points[2].flops}]), curve=points, flops=1e9)
    first, second = watched_stages(run, [stage, stage], 1.0)
    assert [p.loss for p in first.points] == [p.loss for p in points[:3]]
    assert [p.loss for p in second.points] == [9.0, *(p.loss for p in points[4:])]
    assert first.spent == second.spent == 5e8
