"""Growth's experiments: what a file may say, which runs there are, what they share, and what their results say."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.growth
from benchmarks.growth.experiment import best_rate, jobs, load_experiment, make_job, overlaid
from benchmarks.growth.groups import difference, groups
from benchmarks.growth.results import Results, result_of
from benchmarks.growth.savings import Saving, overall, quantile, saving, spread
from benchmarks.growth.write_up import parabola, report
from megabus.errors import UserError
from tests.support import growth_experiments as small

INF = math.inf


def refused(tmp_path, **changes):
    with pytest.raises(UserError) as error:
        small.load(tmp_path, small.spec(**changes))
    assert str(tmp_path / "tiny.yaml") in str(error.value)
    return str(error.value)


def trunk(**sections):
    """Its keys laid over those of an arm that grows at a place of its own."""
    return two(set=overlaid({"growth": small.TWICE}, sections), caps_at=[0.1])


def two(**second):
    return {"scratch": small.arm(), "b": small.arm(**second)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bugdet": 1}, ["bugdet"]),
        ({"arms": {"scratch": small.arm(colour="red")}}, ["arms.scratch.colour"]),
        ({"reference": "none"}, ["reference = none: is no arm", "scratch"]),
        ({"versus": "none"}, ["versus = none: is no arm"]),
        ({"arms": two(like="none")}, ["arms.b.like = none: is no arm"]),
        ({"arms": two(lr={"of": "none"})}, ["arms.b.lr.of = none: is no arm"]),
        ({"arms": two(like="b")}, ["arms.b.like", "comes back to itself"]),
        ({"arms": two(like="c") | {"c": small.arm(like="b")}}, ["comes back to itself"]),
        ({"arms": two(lr={"of": "c"}) | {"c": small.arm(lr={"of": "b"})}}, ["lr.of", "comes back to itself"]),
        ({"arms": two(lr={"of": "scratch", "value": 1})}, ["arms.b.lr", "give a number"]),
        ({"arms": two(lr={"tune": []})}, ["arms.b.lr.tune"]),
        ({"arms": two(set={"model": {"d_modle": 8}})}, ["arms.b", "model.d_modle", "unknown key"]),
        ({"arms": two(set={"model": {"head_dim": 7}})}, ["arms.b", "model.head_dim", "is odd"]),
        ({"arms": two(seeds=[1, 1])}, ["arms.b.seeds", "names one twice"]),
        ({"arms": two(budgets=[1, 1.0])}, ["arms.b.budgets", "names one twice"]),
        ({"seeds": []}, ["seeds", "at least 1 item"]),
        ({"arms": two(set={"growth": small.TWICE}, caps=[0.2, 0.2])}, ["arms.b.caps", "do not end 1 stage"]),
        ({"arms": two(set={"growth": small.TWICE}, caps=[1.0])}, ["arms.b.caps", "before the run does"]),
        ({"arms": two(set={"growth": small.TWICE}, caps=[1.5])}, ["arms.b.caps", "less than or equal to 1"]),
        ({"arms": two(set={"growth": small.TWICE}, caps_at=[0.1, 0.2])}, ["arms.b.caps_at", "of 1 growth"]),
        ({"arms": two(set={"growth": small.TWICE}, caps_at=[0.7])}, ["arms.b.caps_at = 0.7", "falls from 0.7 on"]),
        ({"arms": two(set={"growth": small.TWICE}, caps_at=[0.1], caps=[0.1])}, ["arms.b.caps", "beside caps_at"]),
        ({"arms": two(caps_at=[0.1])}, ["arms.b.caps_at", "does not grow"]),
        ({"arms": trunk(optimizer={"schedule": "cosine"})}, ["optimizer.schedule = cosine", "choose wsd"]),
        (
            {"arms": trunk(optimizer={"transfer": {"d_model": 18, "n_layers": 1, "steps": 9}})},
            ["arms.b: optimizer.transfer.steps = 9", "use `caps`"],
        ),
        ({"arms": trunk(optimizer={"decay_share": "x"})}, ["arms.b", "optimizer", "decay_share"]),
        ({"arms": trunk(growth={"max_flops": 9})}, ["growth.max_flops = 9", "nothing beside caps"]),
        ({"arms": two(lr={"at": [1], "value": 1})}, ["arms.b.lr", "nothing to tune"]),
        ({"arms": two(lr={"tune": [1], "at": [1, 1]})}, ["arms.b.lr.at", "names one twice"]),
        ({"epochs": 0}, ["epochs"]),
        ({"arms": two(set={"growth": small.TWICE}, ladder=True)}, ["arms.b.ladder", "is of fixed sizes"]),
        ({"arms": two(set={"growth": "auto"}, ladder=True)}, ["arms.b.ladder", "is of fixed sizes"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, words):
    text = refused(tmp_path, **changes)
    assert all(word in text for word in words), text


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "x.yaml"
    for content in (b"[", b"", b"\xff\xfe", b"- a"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.yaml"):
            load_experiment(path)
    with pytest.raises(UserError, match="no such file"):
        load_experiment(tmp_path / "absent.yaml")


def test_overlays():
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 3, "c": {"z": 1}}
    above = {"a": {"y": [9], "x": None}, "b": {"q": None, "r": 1}, "c": None, "d": {"e": {"f": None}, "g": [None]}}
    kept = copy.deepcopy((below, above))
    merged = overlaid(below, above)
    assert merged == {"a": {"y": [9]}, "b": {"r": 1}, "d": {"e": {}, "g": [None]}}
    merged["a"]["y"].append(1)
    merged["d"]["g"].append(1)
    assert (below, above) == kept


# ---- jobs


TUNED = {
    "scratch": small.arm(lr={"tune": [0.01, 0.02, 0.04]}, budgets=[2, 1]),
    "of": small.arm(lr={"of": "scratch"}, set={"model": {"d_ff": 64}}),
    "fixed": small.arm(lr=0.5, seeds=[7]),
}


def losses_by(table, otherwise=1.0):
    return lambda job: table.get(job.lr, otherwise) if job.tuning else otherwise


def test_jobs_come_in_order_and_once(tmp_path):
    experiment = small.load(tmp_path, small.spec(arms=TUNED, seeds=[0, 1]))
    unknown = [(j.arm, j.lr, j.seed, j.budget) for j in jobs(experiment, lambda job: None)]
    tuning = [("scratch", lr, 0, 1.0) for lr in (0.01, 0.02, 0.04)]
    assert unknown == [*tuning, ("fixed", 0.5, 7, 1.0)]
    found = list(jobs(experiment, losses_by({0.01: 3.0, 0.02: 2.0, 0.04: INF})))
    assert [(j.arm, j.lr, j.seed, j.budget) for j in found] == [
        *tuning,
        ("scratch", 0.02, 0, 2.0),  # budget 1 was a tuning run
        ("of", 0.02, 0, 1.0),
        ("fixed", 0.5, 7, 1.0),
        ("scratch", 0.02, 1, 1.0),
        ("scratch", 0.02, 1, 2.0),
        ("of", 0.02, 1, 1.0),
    ]
    assert len({job.digest for job in found}) == len(found)
    assert [job.tuning for job in found] == [True] * 3 + [False] * 6


def test_a_failed_rate_is_never_chosen(tmp_path):
    experiment = small.load(tmp_path, small.spec(arms=TUNED))
    assert best_rate(experiment, "of", 1.0, losses_by({0.01: INF, 0.02: 9.0, 0.04: INF})) == 0.02
    failed = dict.fromkeys((0.01, 0.02, 0.04), INF)
    assert best_rate(experiment, "scratch", 1.0, losses_by(failed)) is None
    assert {job.arm for job in jobs(experiment, losses_by(failed)) if not job.tuning} == {"fixed"}


def test_rates_are_tuned_at_several_budgets(tmp_path):
    """A run takes what the nearest of them chose, by ratio; where two are as near, the smaller."""
    tuned = small.arm(lr={"tune": [0.01, 0.02], "at": [4, 1]}, budgets=[0.5, 1, 2, 3, 8])
    arms = {"scratch": tuned, "of": small.arm(lr={"of": "scratch"}, budgets=[4], set={"model": {"d_ff": 64}})}
    experiment = small.load(tmp_path, small.spec(arms=arms))
    best = {1.0: 0.02, 4.0: 0.01}
    found = list(jobs(experiment, lambda job: abs(job.lr - best[job.budget]) if job.tuning else 1.0))
    tuning = [(job.lr, job.budget) for job in found if job.tuning]
    assert tuning == [(0.01, 1.0), (0.02, 1.0), (0.01, 4.0), (0.02, 4.0)]
    chosen = {(job.arm, job.budget): job.lr for job in found if not job.tuning}
    by_budget = {0.5: 0.02, 2.0: 0.02, 3.0: 0.01, 8.0: 0.01}
    assert chosen == {("scratch", budget): lr for budget, lr in by_budget.items()} | {("of", 4.0): 0.01}
    half = list(jobs(experiment, lambda job: 1.0 if job.budget == 1 else None))  # those of the other budget wait
    assert {job.budget for job in half if not job.tuning} == {0.5, 2.0}


def test_the_digest_is_of_the_mathematics(tmp_path):
    def digest(**changes):
        base = small.tree_of(small.spec(), **changes)
        del base["run_dir"], base["train"]["max_flops"], base["optimizer"]["lr"]
        return make_job(small.load(tmp_path, small.spec(base=base)), "scratch", 0, 0.01, 1.0).digest

    plain = digest()
    same = {"log__every": 3, "checkpoint__every": 7, "faults__max_skips": 9, "resume": "strict"}
    assert {digest(**{key: value}) for key, value in same.items()} == {plain}
    others = {
        "model__d_ff": 64, "train__gradient_clipping": 0.5, "optimizer__eps": 1e-6, "eval__every": 5,
        "growth__moments": "reset", "data__valid": "v", "train__kernels": "eager", "init_from": "x",
    }  # fmt: skip
    found = {digest(**{key: value}) for key, value in others.items()}
    assert len(found - {plain}) == len(others)
    experiment = small.load(tmp_path, small.spec())
    jobs_ = [make_job(experiment, "scratch", *args) for args in ((1, 0.01, 1.0), (0, 0.02, 1.0), (0, 0.01, 2.0))]
    assert len({job.digest for job in jobs_} | {plain}) == 4


def test_caps_are_shares_of_each_budget(tmp_path):
    """Of the arm's own, or of the one that it is like; the experiment's own stages stay as they were."""
    stages = [{"d_model": 52, "n_heads": 3, "d_ff": 90}, {"d_ff": 100}]
    arms = two(set={"growth": {"stages": stages}}, caps=[0.25, 0.5]) | {
        "c": small.arm(like="b"),
        "d": small.arm(like="b", set={"growth": {"stages": stages[:1]}}, caps=[0.75]),
        "e": small.arm(like="b", set={"growth": None}),
    }
    experiment = small.load(tmp_path, small.spec(arms=arms))

    def caps(arm, budget):
        growth = make_job(experiment, arm, 0, 0.01, budget).config(tmp_path).growth
        return [
            each and each / small.UNIT for each in (growth.max_flops, *(stage.max_flops for stage in growth.stages))
        ]

    assert caps("b", 1.0) == caps("c", 1.0) == [0.25, 0.5, None]
    assert caps("b", 2.0) == [0.5, 1.0, None]
    assert caps("d", 1.0) == [0.75, None]
    assert caps("e", 1.0) == caps("scratch", 1.0) == [None]
    assert "max_flops" not in str(experiment.tree("b"))


def test_places_of_growths_are_the_same_for_all_budgets(tmp_path):
    """What would come when the rate falls already, or later, is left out: of budget x from 0.7x on."""
    stages = [{"d_model": 52, "n_heads": 3, "d_ff": 90}, {"d_ff": 100}]
    arms = two(set={"growth": {"stages": stages}}, caps_at=[0.25, 0.7], budgets=[0.3, 0.5, 1, 4]) | {
        "c": small.arm(like="b", caps=[0.25, 0.5]),
        "d": small.arm(like="b", set={"optimizer": {"decay_share": 0.9}}, budgets=[3, 8]),
    }
    experiment = small.load(tmp_path, small.spec(arms=arms))

    def caps(arm, budget):
        growth = make_job(experiment, arm, 0, 0.01, budget).asked.growth
        return [each and each / small.UNIT for each in (growth.max_flops, *(x.max_flops for x in growth.stages))]

    assert [caps("b", budget) for budget in (0.3, 0.5, 1.0)] == [[None], [0.25, None], [0.25, None]]
    assert caps("b", 4.0) == pytest.approx([0.25, 0.45, None])
    assert caps("c", 4.0) == [1.0, 2.0, None]
    assert [caps("d", budget)[:1] for budget in (2.0, 3.0)] == [[None], [0.25]]
    assert [len(caps("d", budget)) for budget in (3.0, 8.0)] == [2, 3]


# ---- results


def test_results_are_reread_and_cut_lines_dropped(tmp_path):
    experiment = small.load(tmp_path, small.spec(seeds=[0, 1, 2]))
    path = tmp_path / "deep/results.jsonl"
    rows = [small.result(experiment, "scratch", seed=n, loss=loss) for n, loss in enumerate((3.0, INF, 2.5))]
    results = Results(path)
    for row in rows[:2]:
        results.add(row)
    assert list(Results(path)) == rows[:2]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"experiment": "ti')
    again = Results(path)
    assert list(again) == rows[:2]
    again.add(rows[2])
    assert list(Results(path)) == rows
    assert path.read_bytes().startswith(whole)
    for bad in (b"{}\n", b"[1]\n", b"\xff\n", b"\n", b'{"curve": 3}\n'):
        path.write_bytes(whole + bad)
        with pytest.raises(UserError, match="line 3 is no result"):
            Results(path)


@pytest.mark.parametrize("last", [None, 2.0])
def test_a_run_ends_with_its_last_validation(tmp_path, last):
    """One that is no number is not passed over for an earlier one."""
    rows = [{"event": "start", "step": 0, "tokens": 0, "flops": 0.0, "sizes": {"n_params": 5}}]
    rows += [{"event": "eval", "step": n, "tokens": n, "flops": n, "loss": loss} for n, loss in ((1, 3.0), (2, last))]
    (tmp_path / "metrics.jsonl").write_text("".join(small.json_line(row) for row in rows))
    job = make_job(small.load(tmp_path, small.spec()), "scratch", 0, 0.01, 1.0)
    found = result_of(job, tmp_path, "m", "d")
    assert (found.loss, bool(found.failure)) == ((INF, True) if last is None else (2.0, False))


# ---- S


LAW = [(c, 8.0 * c**-0.1) for c in (1e3, 1.2e3, 1.5e3, 2e3)]


def test_s_on_a_power_law():
    for flops, loss in LAW:
        assert saving(loss, 500.0, LAW) == Saving(pytest.approx(flops / 500))
    for flops in (1.05e3, 1.3e3, 1.9e3):
        one = saving(8.0 * flops**-0.1, 1e3, LAW)
        assert one == Saving(pytest.approx(flops / 1e3, rel=2e-3))
    mid = saving((LAW[0][1] + LAW[1][1]) / 2, 1e3, LAW)
    assert mid == Saving(pytest.approx(math.sqrt(1e3 * 1.2e3) / 1e3))


def test_s_has_bounds_and_bears_any_reference():
    assert saving(1.0, 1e3, LAW) == Saving(2.0, ">")
    assert saving(9.0, 1e3, LAW) == Saving(1.0, "<")
    assert saving(3.0, 1.0, []) is saving(3.0, 1.0, [(1.0, INF)]) is None
    assert saving(3.0, 2.0, [(4.0, 3.0)]) == Saving(2.0)
    rising = [(4.0, 2.0), (1.0, 4.0), (2.0, 5.0), (3.0, INF), (8.0, 2.0), (1.0, 4.5)]
    assert saving(3.0, 1.0, rising) == Saving(pytest.approx(2.0))  # between 1 and 4, whatever 2 and 3 did
    assert saving(2.0, 1.0, rising) == Saving(pytest.approx(4.0))


def test_intervals():
    assert spread([2.0]).interval is None
    two_ = spread([1.0, 3.0])
    assert two_.std == pytest.approx(math.sqrt(2))
    assert two_.interval == pytest.approx((2 - 12.706, 2 + 12.706))
    assert spread([1.0, 2.0, 3.0]).interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    table = {9: 2.262, 10: 2.228, 12: 2.179, 20: 2.086, 30: 2.042, 100: 1.984}
    assert [quantile(n) for n in table] == pytest.approx(list(table.values()), abs=2e-3)
    mean, bound = overall([Saving(2.0), Saving(8.0)])
    half = 12.706 * math.log(4) / 2
    assert (mean.mean, bound) == (pytest.approx(4.0), "")
    assert mean.interval == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)))
    for bounds, told in (((">", ""), ">"), (("<", "<"), "<"), ((">", "<"), "~")):
        mean, bound = overall([Saving(2.0, bounds[0]), Saving(8.0, bounds[1])])
        assert (mean.mean, mean.interval, bound) == (pytest.approx(4.0), None, told)


# ---- the report


EXPERIMENTS = Path(benchmarks.growth.__file__).parent
ARMS = {
    "scratch": small.arm(lr={"tune": [0.01, 0.02]}, budgets=[1, 2], drawn=True),
    "grown": small.arm(drawn=True, set={"model": {"d_ff": 64}}),
    "missing": small.arm(drawn=True, lr=0.03),
}
GROWTH = {"step": 3, "tokens": 500, "flops": small.UNIT / 4, "reason": "kappa", "old": {"d_model": 36}}
GROWTH |= {"new": {"d_model": 52}, "loss_before": 3.5, "loss_after": 3.5005, "stall_s": 0.1}


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("failed", [False, True])
def test_a_report(tmp_path, seeds, failed):
    experiment = small.load(tmp_path, small.spec(arms=ARMS, seeds=seeds))
    results = Results(tmp_path / "r.jsonl")
    results.add(small.result(experiment, "scratch", lr=0.02, loss=3.5))
    for seed, budget in itertools.product(seeds, (1.0, 2.0)):
        results.add(small.result(experiment, "scratch", seed, budget, loss=3.4 - 0.4 * (budget - 1) + 0.1 * seed))
    unsound = GROWTH | {"loss_before": None}
    for seed in seeds:
        loss = INF if failed else 3.2 + 0.1 * seed - 0.01 * (seed == 1)
        results.add(small.result(experiment, "grown", seed, loss=loss, growths=[GROWTH, unsound]))
    text = report(experiment, results, tmp_path / "out")
    assert "| scratch | 1 | 0.01: 3.4000, 0.02: 3.5000 | 0.01 (at the end of the list!) | – |" in text
    row = next(line for line in text.splitlines() if line.startswith("| grown"))
    assert "| missing" not in text
    if failed:
        assert f"{len(seeds)} failed" in row
    else:
        assert "d 36 → 52 | 25% | 0.00M | κ | 3.5000 +5.0e-04 |" in text
        assert "d 36 → 52 | 25% | 0.00M | κ | – | – | – |" in text
        found = groups(experiment, results)
        gain = difference(experiment, found, next(group for group in found if group.arm == "grown"))
        if len(seeds) == 1:
            assert "| 1 | 3.2000 | +0.2000 | 1.41 |" in row
        else:  # far less than the losses' own spread: paired
            assert gain.std == pytest.approx(0.01 / 3**0.5)
            assert "| 3 | 3.2967 ± 0.1002 | +0.2033 (+0.1890 to +0.2177) | 1.42 (" in row
    tables = re.findall(r"(?:^\|.*\n)+", f"{text}\n", re.MULTILINE)
    assert len(tables) > 1
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    assert (tmp_path / "out/tiny.md").read_text(encoding="utf-8") == f"# tiny\n\n{text}"
    for name in ("curves", "arms"):
        assert (tmp_path / f"out/tiny-{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    report(experiment, Results(tmp_path / "none.jsonl"), tmp_path / "out")  # of nothing at all


def test_a_law_is_held_against_what_grew(tmp_path):
    """Runs of three fixed sizes that follow a law give its coefficients back, and the plan for what has grown."""
    size = {"d_model": 24, "n_heads": 1, "d_ff": 40}
    stages = {
        "growth": {"max_tokens": 1024, "trigger": small.TRIGGER, "stages": [{"d_model": 36, "n_heads": 2, "d_ff": 62}]}
    }
    arms = {
        "scratch": small.arm(budgets=[1, 2, 4], ladder=True, seeds=[0, 1]),
        "little": small.arm(budgets=[1, 2, 4], ladder=True, set={"model": size}),
        "middle": small.arm(budgets=[1, 2, 4], ladder=True, set={"model": size | {"d_ff": 50}}),
        "grown": small.arm(set={"model": size, **stages}),
        "other": small.arm(budgets=[1, 2, 4], set={"model": {"kind": "gpt"}}),  # not marked, being of another kind
    }
    experiment = small.load(tmp_path, small.spec(arms=arms))
    results = Results(tmp_path / "r.jsonl")
    for arm, n in (("scratch", 2e6), ("little", 4e5), ("middle", 9e5), ("other", 1e6)):
        for budget in (1.0, 2.0, 4.0):
            tokens = int(1e6 * budget)
            loss = 1.2 + 80 * n**-0.31 + 200 * tokens**-0.337 + (arm == "other")
            row = small.result(experiment, arm, 0, budget, loss=loss)
            results.add(replace(row, n_params=int(n), tokens=tokens))
    results.add(small.result(experiment, "scratch", 1, 1.0, loss=9.0))  # of a seed that the other sizes lack
    assert "No law yet" in report(experiment, Results(tmp_path / "none.jsonl"), None)
    growth = GROWTH | {"tokens": 4000}
    results.add(replace(small.result(experiment, "grown", loss=9.0, growths=[growth]), tokens=10_000))
    text = report(experiment, results, None)
    form = "L(N, D) = 1.200 + 80 / N^0.310 + 200 / D^0.337"
    assert f"{form}, from 9 runs of fixed sizes (scratch, little, middle), 0.0000 nats rms" in text
    row = next(line for line in text.splitlines() if line.startswith("| grown | 1 | 9.0000 |"))
    assert row.endswith("| 0.00M, 0.01M |")  # what was taken
    flat = Results(tmp_path / "flat.jsonl")
    for result in results:
        flat.add(result if result.growths else replace(result, loss=3.0))
    assert "No law yet: 9 run(s) of 3 size(s) and 3 token count(s) tell no law: A comes out 0" in report(
        experiment, flat, None
    )


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_experiments_that_come_along_can_be_run(path):
    """Every arm of each, with its budgets: what extends another follows its changes."""
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert {job.arm for job in jobs(experiment, lambda job: -job.lr)} == set(experiment.arms)


def test_the_best_rate_between_those_that_were_tried():
    """Of losses that are a parabola in the rate's logarithm, exactly; of others none outside of its neighbours."""
    rates = [1e-3, 2e-3, 5e-3, 8e-3]  # unevenly spaced
    exact = [(rate, 3 + 0.2 * (math.log(rate) - math.log(2.7e-3)) ** 2) for rate in rates]
    assert parabola(exact) == pytest.approx(2.7e-3)
    assert parabola(list(reversed(exact))) == pytest.approx(2.7e-3)
    assert 1e-3 < parabola([(1e-3, 2.0), (2e-3, 1.0), (4e-3, 1e9)]) < 2e-3
    assert parabola([(1e-3, 1.0), (2e-3, 1.0), (4e-3, 1.0)]) is None
    assert parabola(exact[1:]) is None
    assert parabola([]) is None
