"""S* and the envelope: of fixed sizes that follow a law both come out as the law has them; what was not run is open."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.growth.frontier import anytime_table, claims, frontier_table
from benchmarks.growth.groups import Group, each_saving, groups
from benchmarks.growth.ladder import Size, envelope, saving_by_best, sizes_of
from benchmarks.growth.results import Results
from benchmarks.growth.savings import Saving, falling
from benchmarks.growth.write_up import report
from tests.support import growth_experiments as small

SIZES = {"little": 2e4, "middle": 9e4, "large": 4e5}
FINE = [1e11 * 1.05**n for n in range(140)]


def law(n_params, flops):
    """Hoffmann et al. 2022, equation 2, at C = 6ND."""
    return 1.9 + 40 / n_params**0.4 + 400 / (flops / (6 * n_params)) ** 0.45


def need(n_params, loss):
    """FLOPs at which a size reaches a loss; infinity for one that never does."""
    above = loss - 1.9 - 40 / n_params**0.4
    return 6 * n_params * (400 / above) ** (1 / 0.45) if above > 0 else math.inf


def size(name, budgets=FINE, paired=True):
    points = [(flops, law(SIZES[name], flops)) for flops in budgets]
    return Size(name, SIZES[name], falling(points), max(budgets), paired)


def ladder(**budgets):
    return [size(name, budgets.get(name, FINE)) for name in SIZES]


@pytest.mark.parametrize("flops", [2e11, 1.7e12, 5e12, 4e13])
def test_the_envelope_is_that_of_the_law(flops):
    """The best size changes over these FLOPs."""
    losses = {name: law(n, flops) for name, n in SIZES.items()}
    best = envelope(ladder(), flops)
    assert (best.arm, best.is_open) == (min(losses, key=losses.get), False)
    assert best.loss == pytest.approx(min(losses.values()), abs=1e-4)
    wanted = best.loss - 0.03
    least = min(need(n, wanted) for n in SIZES.values())
    assert saving_by_best(wanted, flops, ladder()) == Saving(pytest.approx(least / flops, rel=1e-3))
    of_one = saving_by_best(wanted, flops, [size("large")])  # control: S against the final size is another figure
    assert of_one.value == pytest.approx(need(SIZES["large"], wanted) / flops, rel=1e-3)
    assert (of_one.value > 1.05 * least / flops) == (best.arm != "large")


def test_the_best_changes_with_the_flops():
    assert [envelope(ladder(), flops).arm for flops in (2e11, 1.7e12, 4e13)] == ["little", "middle", "large"]


CROSSING = next(c for c in FINE if law(4e5, c) < law(9e4, c))  # from here on the large size is better


@pytest.mark.parametrize(("ends", "is_open"), [(0.5, True), (1.2, False)])
def test_a_size_that_ends_while_it_leads_leaves_it_open(ends, is_open):
    """Past its end it might have gone on leading; where a larger size was better there already it could not."""
    short = [flops for flops in FINE if flops <= CROSSING * ends]
    sizes, at = ladder(middle=short), CROSSING * 3
    assert envelope(sizes, at).is_open == is_open
    wanted = law(4e5, at)
    assert saving_by_best(wanted, at, sizes) == Saving(pytest.approx(1.0, rel=1e-2), "<" if is_open else "")


@pytest.mark.parametrize(("begins", "is_open"), [(2.0, True), (0.8, False)])
def test_a_size_that_begins_while_it_leads_leaves_it_open(begins, is_open):
    late = [flops for flops in FINE if flops >= CROSSING * begins]
    sizes, at = ladder(large=late), CROSSING * begins * 0.7
    assert envelope(sizes, at).is_open == is_open
    assert saving_by_best(law(9e4, at), at, sizes) == Saving(pytest.approx(1.0, rel=1e-2), "<" if is_open else "")


@pytest.mark.parametrize("run", ["too late", "too early"])
def test_a_size_that_was_run_elsewhere_alone_leaves_it_open(run):
    """Where a larger size is better already it may have led before, where a smaller one still is it may lead later."""
    elsewhere = [c for c in FINE if c > CROSSING * 2] if run == "too late" else FINE[:5]
    assert envelope(ladder(middle=elsewhere), CROSSING * 0.7).is_open
    assert saving_by_best(law(2e4, CROSSING * 0.7), CROSSING * 0.7, ladder(middle=elsewhere)).bound == "<"


def test_bounds_at_both_ends_of_the_ladder():
    assert saving_by_best(1.0, FINE[-1], ladder()) == Saving(pytest.approx(1.0), ">")
    assert saving_by_best(9.0, FINE[0], ladder()) == Saving(pytest.approx(1.0), "<")
    assert saving_by_best(1.0, 1.0, []) is None
    assert envelope(ladder(), FINE[-1] * 1.005).loss == pytest.approx(law(4e5, FINE[-1]))  # the same budget
    assert envelope(ladder(), FINE[-1] * 1.05) is envelope([], 1e12) is None
    unfinished = ladder(large=FINE[:60])  # its largest run might have been followed by better ones
    assert saving_by_best(1.0, FINE[59], unfinished) == Saving(pytest.approx(1.0), ">")


def test_a_size_is_as_good_as_its_best_run_of_no_more_flops():
    one = Size("a", 5.0, falling([(1.0, 4.0), (2.0, 3.0), (4.0, 3.5)]), 4.0, True)
    assert [one.loss_at(c) for c in (0.98, 0.995, 1.0, 2.0, 3.0, 4.03, 4.1)] == [None, 4.0, 4.0, 3.0, 3.0, 3.0, None]
    assert one.loss_at(math.sqrt(2)) == pytest.approx(3.5)


# ---- from an experiment's results

TRUNK = small.arm(set={"model": {"d_ff": 40}, "growth": small.BY_CAPS}, caps_at=[0.1], budgets=[0.5, 1, 2], drawn=True)
ARMS = {
    "scratch": small.arm(budgets=[0.5, 1, 2, 4], ladder=True),
    "little": small.arm(budgets=[0.5, 1, 2, 4], ladder=True, set={"model": {"d_ff": 40}}, seeds=[0, 3]),
    "trunk": TRUNK,
    "constant": small.arm(set={"optimizer": {"schedule": "constant"}}),
}
LOSSES = {"scratch": (3.2, 3.0, 2.8, 2.6), "little": (3.1, 2.95, 2.85, 2.8)}


@pytest.fixture
def experiment(tmp_path):
    return small.load(tmp_path, small.spec(arms=ARMS, seeds=[0, 1]))


@pytest.fixture
def results(experiment, tmp_path):
    found = Results(tmp_path / "r.jsonl")
    for arm, losses in LOSSES.items():
        for seed in experiment.arms[arm].seeds or experiment.seeds:
            for budget, loss in zip((0.5, 1.0, 2.0, 4.0), losses, strict=True):
                n_params = 2000 if arm == "scratch" else 1000
                row = small.result(experiment, arm, seed, budget, loss=loss + 0.02 * seed)
                found.add(replace(row, n_params=n_params))
    for seed in (0, 1):
        for budget, loss in ((0.5, 3.0), (1.0, 2.9), (2.0, 2.81)):
            found.add(small.result(experiment, "trunk", seed, budget, loss=loss + 0.02 * seed + 0.001 * seed * budget))
        found.add(small.result(experiment, "constant", seed, loss=2.5))
    return found


def test_a_seed_that_a_size_lacks_is_stood_in_for(experiment, results):
    found = groups(experiment, results)
    own, other = sizes_of(experiment, found, 0), sizes_of(experiment, found, 1)
    assert [(one.arm, one.paired) for one in own] == [("scratch", True), ("little", True)]
    assert [(one.arm, one.paired) for one in other] == [("scratch", True), ("little", False)]
    assert other[1].loss_at(small.UNIT) == pytest.approx(2.95 + 0.03)  # of seeds 0 and 3
    assert [one.n_params for one in own] == [2000, 1000]


def test_the_tables_that_decide(experiment, results):
    found = groups(experiment, results)
    told = claims(experiment, results, found)
    trunk = {claim.group.budget: claim for claim in told if claim.group.arm == "trunk"}
    assert trunk[1.0].s_star[0] == Saving(
        pytest.approx(2**0.5)
    )  # 2.9 is half way from 3.0 to 2.8, and from 2.95 to 2.85
    assert trunk[1.0].s[0] == Saving(pytest.approx(2**0.5))
    assert trunk[0.5].s_star[0] == Saving(pytest.approx(2 ** (0.1 / 0.15)))  # of `little`, before `scratch` comes there
    assert trunk[0.5].below.mean == pytest.approx((3.1 - 3.0 + 3.13 - 3.0205) / 2)
    table = frontier_table(experiment, told)
    row = next(line for line in table.splitlines() if line.startswith("| trunk | 2 |"))
    assert "| 0.97, 0.96 | 0.96 (" in row
    assert row.endswith("| scratch |")
    assert "| constant | 1 | not decayed | not decayed |" in table
    assert "†" in table
    assert not any(line.startswith(("| scratch", "| little")) for line in table.splitlines())
    once = anytime_table(experiment, told)
    assert "`trunk` ends below the best fixed size at 2 of 3 budgets over 4x, at " in once


def test_what_has_not_decayed_is_no_reference(experiment, results):
    """Nor has it an S of its own, whatever its loss."""
    found = groups(experiment, results)
    constant = next(group for group in found if group.arm == "constant")
    assert each_saving(experiment, found, constant) == {}
    turned = experiment.model_copy(update={"reference": "constant"})
    trunk = next(group for group in found if group.arm == "trunk")
    assert each_saving(turned, found, trunk) == {}
    as_ladder = experiment.arms["constant"].model_copy(update={"ladder": True})
    more = experiment.model_copy(update={"arms": experiment.arms | {"constant": as_ladder}})
    assert [one.arm for one in sizes_of(more, found, 0)] == ["scratch", "little"]
    assert each_saving(experiment, found, Group("trunk", 1.0, 0.01, trunk.runs)) != {}


def test_the_picture_of_a_trunk(experiment, results, tmp_path):
    text = report(experiment, results, tmp_path / "out")
    assert text.index("## Against the best fixed size") < text.index("## One run at every budget")
    assert (tmp_path / "out/tiny-anytime.png").read_bytes().startswith(b"\x89PNG\r\n")
