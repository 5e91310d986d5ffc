"""The law that an experiment's report fits: to the arms that are marked, and to no others."""

from __future__ import annotations

import re
from dataclasses import replace

from growth_experiments import arm, load, result, spec

from benchmarks.growth.groups import Group
from benchmarks.growth.predicted import law_table
from benchmarks.growth.report import _saving
from benchmarks.growth.savings import Spread

TRUE = {"E": 2.0, "A": 40.0, "alpha": 0.25, "B": 60.0, "beta": 0.3}


def law(n, d):
    return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def fitted(folder, odd_is_marked):
    """E, A, alpha, B, beta of the table, from runs of three sizes by the law, and of one that was badly tuned."""
    sizes = {"small": 1e5, "middle": 4e5, "large": 2e6}
    arms = {name: arm(law=True, seeds=[number], budgets=[1, 2, 4]) for number, name in enumerate(sizes)}
    odd = {"odd": arm(law=odd_is_marked, seeds=[9])}
    experiment = load(folder, spec(arms=arms | odd, reference="large", versus="large"))
    found = []
    for number, (name, n) in enumerate(sizes.items()):
        for budget in (1.0, 2.0, 4.0):
            run = result(experiment, name, number, budget, law(n, 1e6 * budget))
            found.append(Group(name, budget, 0.01, [replace(run, n_params=int(n), tokens=int(1e6 * budget))]))
    run = replace(result(experiment, "odd", 9, 1.0, law(2e6, 2e6) + 0.3), n_params=2_000_000, tokens=2_000_000)
    table = law_table(experiment, [*found, Group("odd", 1.0, 0.01, [run])])
    text = re.search(r"= ([\d.]+) \+ ([\d.e+]+) / N\^([\d.]+) \+ ([\d.e+]+) / D\^([\d.]+), from (\d+) runs", table)
    assert text, table
    return [float(x) for x in text.groups()]


def test_a_law_is_fitted_to_marked_arms_alone(tmp_path):
    *found, runs = fitted(tmp_path, odd_is_marked=False)
    assert runs == 9
    assert all(abs(x / wanted - 1) < 0.02 for x, wanted in zip(found, TRUE.values(), strict=True)), found


def test_an_arm_that_is_out_of_line_would_spoil_it(tmp_path):
    *found, runs = fitted(tmp_path, odd_is_marked=True)
    assert runs == 10
    assert max(abs(x / wanted - 1) for x, wanted in zip(found, TRUE.values(), strict=True)) > 0.1, found


def test_a_bound_holds_as_it_is_printed():
    assert _saving((Spread(1.9997, None, None, 1), ">"), 1) == ">1.99"
    assert _saving((Spread(2.0, None, None, 1), ">"), 1) == ">2.00"
    assert _saving((Spread(1.9997, None, None, 1), ""), 1) == "2.00"
