"""κ again over recorded curves: the instants at which runs grew come out, and those of a known curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.growth.experiment import load_experiment, make_job
from benchmarks.growth.groups import Group
from benchmarks.growth.instants import KAPPAS, falling, instant, instants_table, points_of_stages, predictors_of
from benchmarks.growth.results import Point, Results
from megabus.config import resolve_stages
from megabus.errors import UserError
from tests.support.growth_experiments import TWICE, arm, load, result, spec

CPU = Path(__file__).resolve().parents[2] / "benchmarks/growth/cpu.yaml"


def recorded():
    """Runs of which some stage ended by κ, as they were asked for today, with their configurations."""
    experiment, results = load_experiment(CPU), Results(CPU.parent / "results/cpu.jsonl")
    for run in results:
        if run.arm in experiment.arms and any(growth["reason"] == "kappa" for growth in run.growths):
            job = make_job(experiment, run.arm, run.seed, run.lr, run.budget)
            if results.get(job) is run:
                yield run, job.config(Path("unused"))


RECORDED = list(recorded())


def test_there_are_runs_to_look_at():
    assert sum(growth["reason"] == "kappa" for run, _ in RECORDED for growth in run.growths) > 3


@pytest.mark.parametrize(("run", "config"), RECORDED, ids=lambda x: getattr(x, "digest", ""))
def test_recorded_growths_come_out(run, config):
    """Of a κ that is lower: these runs grew by their first and newest validations, where medians of three count now."""
    trigger = config.growth.trigger
    lower = trigger.model_copy(update={"kappa": trigger.kappa - 0.3})
    higher = trigger.model_copy(update={"kappa": 1 - (1 - trigger.kappa) / 10})
    for stage, points, growth in zip(resolve_stages(config, 1), points_of_stages(run), run.growths, strict=False):
        steady = [point for point in points if not falling(config, point)]
        if steady:
            by_kappa = growth["reason"] == "kappa"
            if by_kappa:
                found = instant(stage, steady, lower)
                assert found is not None
                assert found <= growth["flops"]
            assert instant(stage, steady, higher) is None  # control: another κ would not have grown there


def curve(total, n=20):
    """Falls from 4 to 2 as fast as it can be reckoned with: what is left to gain is (1 - share)²."""
    return [Point(total * i / n, 100 * i, 0.0, 2 + 2 * (1 - i / n) ** 2) for i in range(n + 1)]


def test_hindsight_is_the_share_of_what_a_stage_gave(tmp_path):
    """Up to where the rate falls, over the last 0.3: the stage came to 2 + 2 · 0.3² with 0.7 of the run's FLOPs."""
    experiment = load(tmp_path, spec(arms={"scratch": arm()}))
    total = experiment.budget
    run = replace(result(experiment, "scratch"), curve=curve(total), flops=total)
    table = instants_table(experiment, [Group("scratch", 1.0, 0.01, [run])]).splitlines()
    cells = {line.split(" | ")[4]: line.strip("| ").split(" | ")[5:] for line in table[2:]}
    points = [p for p in run.curve if p.flops <= 0.7 * total * (1 + 1e-9)]
    start, end = points[1].loss, points[-1].loss  # medians of the falling losses: of the first three, and of the last
    levels = list(zip(points[1:], points, strict=False))[6:]  # κ waits for 8 validations
    expected = []
    for kappa in KAPPAS:
        met = (p.flops for p, before in levels if start - before.loss >= kappa * (start - end) - 1e-12)
        found = next(met, None)
        expected.append("–" if found is None else f"{found / total / 0.7:.0%}")
    assert cells["hindsight"] == expected
    assert len(set(cells["hindsight"])) > 3


def test_arms_bring_predictors_of_their_own(tmp_path):
    """Beside what all have: a law and a table of arms, once each, and none of what differs by κ alone."""
    law = {"predictor": "scaling_law", "scaling_law": {"E": 2.0, "A": 1e-3, "B": 1e-3}}
    low, high = [[[1e6, loss], [1e7, loss - 0.1]] for loss in (2.5, 3.6)]  # 3.6: half of the way to it is soon made
    arms = {"scratch": arm()} | {
        name: arm(set={"growth": {"trigger": trigger}})
        for name, trigger in {
            "plain": {"predictor": "fit", "kappa": 0.5},
            "by_law": law,
            "again": law | {"kappa": 0.3},
            "by_low": {"predictor": "reference", "reference": low},
            "by_high": {"predictor": "reference", "reference": high},
            "caps": {"predictor": "constant", "constant": 0.0},
        }.items()
    }
    experiment = load(tmp_path, spec(arms=arms))
    names = [*predictors_of(experiment)]
    own = ["scaling_law of by_law", "reference of by_low", "reference of by_high"]
    assert names == ["fit", "scaling_law", *own, "hindsight"]
    run = replace(result(experiment, "scratch"), curve=curve(experiment.budget), flops=experiment.budget)
    table = instants_table(experiment, [Group("scratch", 1.0, 0.01, [run])]).splitlines()
    cells = {line.split(" | ")[4]: line.strip("| ").split(" | ")[5:] for line in table[2:]}
    assert cells["reference of by_low"] != cells["reference of by_high"]
    assert cells["scaling_law of by_law"] != cells["scaling_law"]


def test_stages_are_told_apart_where_two_losses_have_one_place(tmp_path):
    experiment = load(tmp_path, spec(arms={"scratch": arm()}))
    points = curve(1e9, 4)
    points.insert(3, points[2]._replace(loss=9.0))  # after the growth
    growth = {"flops": points[2].flops, "reason": "cap"}
    run = replace(result(experiment, "scratch", growths=[growth]), curve=points, flops=1e9)
    first, second = points_of_stages(run)
    assert [p.loss for p in first] == [p.loss for p in points[:3]]
    assert [p.loss for p in second] == [9.0, *(p.loss for p in points[4:])]


def test_an_arm_that_asks_no_kappa_is_refused(tmp_path):
    growth = {"stages": TWICE["stages"], "trigger": {"rule": "marginal"}}
    experiment = load(tmp_path, spec(arms={"scratch": arm(), "b": arm(set={"growth": growth})}, versus="b"))
    with pytest.raises(UserError, match=r"^arms\.b: growth\.trigger\.rule = marginal: asks no κ"):
        predictors_of(experiment)
