"""The arms of the experiments that come along are what their names say, and no two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from growth_experiments import arm, load, spec

from benchmarks.growth.experiment import load_experiment, make_job
from megabus.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks/growth"


@pytest.mark.parametrize("name", ["cpu", "gpu", "screen", "twenty"])
def test_hypercloning_is_hypercloning(name):
    """Clones of all rows, Adam's moments reset (Samragh et al. 2024); plain clones are plain on both sides."""
    experiment = load_experiment(FOLDER / f"{name}.yaml")
    for label, spec_ in experiment.arms.items():
        growth = make_job(experiment, label, 0, 1e-3, 1.0).config(Path("unused")).growth
        if "HyperCloning" in spec_.about:
            assert (growth.write, growth.read, growth.moments) == ("clone", "clone", "reset"), label
        elif "plain clones" in spec_.about:
            assert (growth.write, growth.read) == ("clone", "clone"), label
        if "read rows tilted" in spec_.about:
            assert growth.read == "tilt", label


@pytest.mark.parametrize("name", ["cpu", "gpu", "screen", "twenty"])
def test_no_two_arms_are_the_same(name):
    """But for their learning rates and budgets, which some differ in alone."""
    experiment = load_experiment(FOLDER / f"{name}.yaml")
    alike = {"scratch_slow", "grown_twenty"}
    digests = [make_job(experiment, label, 0, 1e-3, 1.0).digest for label in experiment.arms if label not in alike]
    assert len(set(digests)) == len(digests)


def test_an_arm_may_grow_by_auto(tmp_path):
    experiment = load(tmp_path, spec(arms={"scratch": arm(), "auto": arm(set={"growth": "auto"})}))
    assert len(make_job(experiment, "auto", 0, 1e-2, 1.0).config(tmp_path).growth.stages) > 0


@pytest.mark.parametrize("growth", [5, [1], {"stages": 5}, {"stages": [1, 2]}, {"stages": {"d_model": 3}}])
def test_a_growth_that_is_none_is_refused_in_words(tmp_path, growth):
    with pytest.raises(UserError, match="growth"):
        load(tmp_path, spec(arms={"scratch": arm(), "odd": arm(set={"growth": growth}, caps=[0.5])}))
