"""The protocol of growth's experiments: what is refused, what is said to be missing, and the verdict of two scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth.__main__ import main
from benchmarks.growth.experiment import load_experiment, make_job
from benchmarks.growth.frontier import claims, protocol_table
from benchmarks.growth.groups import groups
from benchmarks.growth.growths import Mixing, growth_table, mixing
from benchmarks.growth.protocol import check_text, most_tokens
from benchmarks.growth.results import Point, Results
from benchmarks.growth.verdict import verdict_table
from megabus.errors import UserError
from tests.support import growth_experiments as small
from tests.support.small_runs import write_tokens

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/growth"


# ---- no text twice


@pytest.mark.parametrize("name", ["cpu", "long", "twenty"])
def test_tokens_are_reckoned_as_runs_have_counted_them(name):
    """Where caps alone have grown, to the token; where κ has, they are no more."""
    experiment, counts = load_experiment(FOLDER / f"{name}.yaml"), {"cap": 0, "kappa": 0, "never": 0}
    for run in Results(FOLDER / f"results/{name}.jsonl"):
        job = make_job(experiment, run.arm, run.seed, run.lr, run.budget) if run.arm in experiment.arms else None
        if job is None or job.digest != run.digest or run.failure:
            continue
        reasons = {growth["reason"] for growth in run.growths}
        kind = "kappa" if "kappa" in reasons else "cap" if reasons else "never"
        counts[kind] += 1
        most = most_tokens(job.asked)
        assert most == run.tokens if kind != "kappa" else most > run.tokens, job.label
    assert counts["never"] > 1
    assert counts["cap"] > 2
    assert name == "long" or counts["kappa"] > 0


def with_text(tmp_path, **changes):
    """Files of so many tokens that a run of budget 1 sees them about once."""
    for name, n in (("train", 3901), ("valid", 3901), ("more", 101)):
        write_tokens(tmp_path / name, np.arange(n) % 67)
    return small.load(tmp_path, small.spec(tmp_path, **changes))


def test_a_run_that_would_see_text_twice_is_refused_before_any_starts(tmp_path, monkeypatch):
    arms = {"scratch": small.arm(), "longer": small.arm(budgets=[1, 2])}
    experiment = with_text(tmp_path, arms=arms)
    tokens = most_tokens(make_job(experiment, "longer", 0, 0.01, 2.0).asked)
    monkeypatch.setattr("benchmarks.growth.runner.Popen", None)  # nothing can be started
    with pytest.raises(UserError) as error:
        small.new_runner(experiment, tmp_path).run(1)
    words = [
        "arms.longer at budget 2",
        f"{tokens} tokens",
        "would see the 3901",
        f"{tokens / 3901:.2f} times",
        "epochs",
    ]
    assert all(word in str(error.value) for word in words), error.value
    check_text(experiment, ["scratch"])
    tuned = {"scratch": small.arm(lr={"tune": [0.01], "at": [2]}), "of": small.arm(lr={"of": "scratch"})}
    with pytest.raises(UserError, match="scratch at budget 2"):  # its runs that tune are run for the other one too
        check_text(with_text(tmp_path, arms=tuned), ["of"])
    check_text(with_text(tmp_path, arms=arms, epochs=2))


def test_of_a_blend_each_text_counts_by_its_share(tmp_path):
    def blended(weight):
        base = small.spec(tmp_path)["base"]
        train = [{"path": f"{tmp_path}/train"}, {"path": f"{tmp_path}/more", "weight": weight}]
        return with_text(tmp_path, base=base | {"data": base["data"] | {"train": train}})

    check_text(blended(0.02))
    with pytest.raises(UserError, match=r"would see the 101 of .*more"):
        check_text(blended(0.5))


def test_a_run_by_kappa_may_see_it_twice(tmp_path):
    """A small size sees more tokens, and without a cap it may stay."""
    growth = {"stages": small.TWICE["stages"], "trigger": small.TRIGGER}
    arms = {"scratch": small.arm(set={"model": {"d_model": 52, "n_heads": 3, "d_ff": 90}})}
    check_text(with_text(tmp_path, arms=arms))
    arms["grown"] = small.arm(set={"growth": growth}, budgets=[1.4])
    with pytest.raises(UserError, match="may see the 3901"):
        check_text(with_text(tmp_path, arms=arms))


# ---- what is missing


def told(experiment, rows, tmp_path):
    results = Results(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl")
    for row in rows:
        results.add(row)
    found = claims(experiment, results, groups(experiment, results))
    return protocol_table(experiment, found), found


ARMS = {
    "scratch": small.arm(lr={"tune": [0.01, 0.02, 0.04]}, ladder=True),
    "short": small.arm(lr={"of": "scratch"}, set={"optimizer": {"decay_share": 0.2}}),
    "little": small.arm(ladder=True, set={"model": {"d_ff": 40}}),
    "grown": small.arm(set={"model": {"d_ff": 40}, "growth": small.BY_CAPS}, caps=[0.2]),
    "slower": small.arm(like="grown", lr=0.005, caps=[0.2]),
}


def rows_of(experiment, seeds):
    rates = {0.01: 3.1, 0.02: 3.0, 0.04: 3.2}
    rows = [small.result(experiment, "scratch", lr=lr, loss=loss) for lr, loss in rates.items()]
    for seed in seeds:
        rows += [small.result(experiment, "scratch", seed, lr=0.02), small.result(experiment, "little", seed)]
        rows += [small.result(experiment, "grown", seed, loss=2.9), small.result(experiment, "slower", seed, lr=0.005)]
    return rows


def test_what_a_claim_lacks_is_said(tmp_path):
    experiment = small.load(tmp_path, small.spec(arms=ARMS, seeds=[0, 1]))
    table, found = told(experiment, rows_of(experiment, [0, 1]), tmp_path)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in table.splitlines() if "|" in line}
    few = {claim.group.arm: f"{claim.kept.tokens:.2g} tokens a parameter |" for claim in found}
    assert lines["scratch"] == ["2", "0.01, 0.02, 0.04", "0.3", "2 paired seeds, 1 decay share |"]
    assert lines["grown"][1] == "0.005, 0.01"  # `slower` is the same but for its rate
    missing = ["2 paired seeds", "2 rates", "best rate the last tried", "1 decay share"]
    assert lines["grown"][3] == ", ".join([*missing, few["grown"]])
    assert table.endswith("and with them every claim, fall short: 2 paired seeds, 1 rate, 1 decay share.")
    with_decay = [*rows_of(experiment, [0, 1]), small.result(experiment, "short", lr=0.02)]
    assert "| 0.01, 0.02, 0.04 | 0.2, 0.3 |" in told(experiment, with_decay, tmp_path)[0]


def test_seeds_count_in_pairs(tmp_path):
    """One that a fixed size lacks is none."""
    experiment = small.load(tmp_path, small.spec(arms=ARMS, seeds=[0, 1, 2]))
    rows = [row for row in rows_of(experiment, [0, 1, 2]) if (row.arm, row.seed) != ("little", 2)]
    _, found = told(experiment, rows, tmp_path)
    assert {claim.group.arm: claim.kept.pairs for claim in found} == {
        "scratch": 3, "little": 2, "grown": 2, "slower": 2
    }  # fmt: skip


def test_text_that_is_seen_twice_weakens_every_claim(tmp_path):
    experiment = small.load(tmp_path, small.spec(arms={"scratch": small.arm()}, epochs=1.5))
    table, _ = told(experiment, [small.result(experiment, "scratch")], tmp_path)
    assert table.endswith("fall short: no sizes, text seen up to 1.5 times.")


# ---- two scales


def scale(folder, times, grown, seeds=(0, 1, 2, 3, 4), budget=1.0):
    """Fixed sizes that end at 3 - 0.2 log2(budget), and a grown arm with the S that is asked for at each seed."""
    folder.mkdir()
    arms = {
        "scratch": small.arm(budgets=[0.5, 1, 2, 4], ladder=True),
        "little": small.arm(budgets=[0.5, 1, 2, 4], ladder=True, set={"model": {"d_ff": 60}}),
        "grown": small.arm(set={"model": {"d_ff": 60}, "growth": small.BY_CAPS}, caps=[0.2], budgets=[budget]),
    }
    experiment = small.load(folder, small.spec(arms=arms, seeds=list(seeds), budget=small.UNIT * times))
    results = Results(folder / "r.jsonl")
    for seed in seeds:
        for n, at in enumerate((0.5, 1.0, 2.0, 4.0)):
            for arm in ("scratch", "little"):
                results.add(small.result(experiment, arm, seed, at, loss=3.2 - 0.2 * n + 0.01 * (arm == "little")))
        s = grown * (1.01 if seed % 2 else 0.99)
        loss = 3.0 - 0.2 * float(np.log2(s * budget))
        results.add(small.result(experiment, "grown", seed, budget, loss=loss))
    return experiment, results


def verdict(tmp_path, small_scale, large_scale, monkeypatch):
    monkeypatch.setattr("benchmarks.growth.verdict._alike", lambda one, other: one.group.arm == other.group.arm)
    table = verdict_table([scale(tmp_path / "large", **large_scale), scale(tmp_path / "small", **small_scale)])
    return next(line for line in table.splitlines() if line.startswith("| grown"))


@pytest.mark.parametrize(
    ("large", "words"),
    [
        ({"times": 4, "grown": 1.6}, "| pays at both scales, beyond the spread of seeds"),
        ({"times": 3.98, "grown": 1.5}, "| pays at both scales, beyond the spread of seeds"),
        ({"times": 3, "grown": 1.6}, "| no claim: 3.0x apart in FLOPs, 4x wanted"),
        ({"times": 4, "grown": 1.4}, "| no claim: S falls"),
        ({"times": 4, "grown": 4.5}, "| does not fall, but is not above 1 beyond the spread of seeds"),
    ],
)
def test_a_claim_is_of_two_scales(tmp_path, monkeypatch, large, words):
    row = verdict(tmp_path, {"times": 1, "grown": 1.5}, large, monkeypatch)
    assert words in row
    assert "short of the protocol at the smaller scale: 1 rate, 1 decay share" in row
    assert row.count("|") == 7


def test_bounds_that_leave_it_open_are_no_claim(tmp_path, monkeypatch):
    row = verdict(tmp_path, {"times": 1, "grown": 4.5}, {"times": 4, "grown": 5.0}, monkeypatch)
    assert "no claim: whether S falls is not known, for one is a bound" in row
    assert ">3.9" in row or ">4.0" in row


def test_scales_are_held_at_the_same_tokens(tmp_path):
    table = verdict_table([scale(tmp_path / "a", 1, 1.5), scale(tmp_path / "b", 4, 1.5)])
    assert table.startswith("No verdict: no arm has S* in both experiments at the same tokens a final parameter")
    same = verdict_table([scale(tmp_path / "c", 1, 1.5), scale(tmp_path / "d", 4, 1.5, budget=0.25)])
    assert "| no claim: 1.0x apart" in same


def test_the_command_takes_two_experiments(tmp_path, monkeypatch, capsys):
    one, other = scale(tmp_path / "a", 1, 1.5), scale(tmp_path / "b", 4, 1.5, budget=0.25)
    files = [str(tmp_path / name / "tiny.yaml") for name in "ab"]
    named = [word for _, results in (one, other) for word in ("--results", str(results.path))]
    monkeypatch.setattr("sys.argv", ["growth", "report", *files, *named])
    assert main() == 0
    assert "| grown |" in capsys.readouterr().out
    for words, key in (
        (["report", *files, "--results", "x"], "--results = x: are 1 file.s. for 2"),
        (["run", *files, *named], "experiment = tiny, tiny: are several to run"),
        (["report", *files, *named, "--out", str(tmp_path)], "--out"),
        (["report", *files, *named, "--only", "grown"], "--only"),
    ):
        monkeypatch.setattr("sys.argv", ["growth", *words])
        with pytest.raises(UserError, match=key):
            main()


# ---- what growths did to the loss


def grown_run(tmp_path, losses, after, before=3.5):
    """Grown at 400 FLOPs and at 1,000; `losses` from 500 on, every 100."""
    experiment = small.load(tmp_path, small.spec(arms={"scratch": small.arm()}))
    points = [(0, 4.0), (400, before), (400, after)] + [(500 + 100 * n, loss) for n, loss in enumerate(losses)]
    points.insert(next((n for n, point in enumerate(points) if point[0] > 1000), len(points)), (1000, losses[5]))
    fact = {"step": 1, "reason": "cap", "stall_s": 0.1, "old": {"d_model": 36, "n_layers": 1}}
    fact["new"] = {"d_model": 36, "n_layers": 2}
    growths = [
        fact | {"flops": 400.0, "tokens": 40, "loss_before": before, "loss_after": after},
        fact | {"flops": 1000.0, "tokens": 100, "loss_before": losses[5], "loss_after": losses[5]},
    ]
    run = small.result(experiment, "scratch", growths=growths, flops=1400.0)
    return experiment, replace(run, curve=[Point(float(c), c // 10, 0.0, loss) for c, loss in points])


@pytest.mark.parametrize(
    ("losses", "after", "expected"),
    [
        ([3.7, 3.6, 3.45, 3.4, 3.4, 3.4, 3.3, 3.2], 3.6, Mixing(pytest.approx(0.2), 300.0, 30)),  # it rises on
        (
            [3.4, 3.6, 3.49, 3.4, 3.4, 3.4, 3.3, 3.2],
            3.5,
            Mixing(pytest.approx(0.1), 300.0, 30),
        ),  # below before the worst
        (
            [3.7, 3.6, 3.6, 3.6, 3.6, 3.6, 3.6, 3.4],
            3.6,
            Mixing(pytest.approx(0.2), 800.0, 80),
        ),  # the next stage does it
        ([3.7, 3.6, 3.6, 3.6, 3.6, 3.6, 3.6, 3.6], 3.6, Mixing(pytest.approx(0.2), None, None)),
        ([3.4, 3.3, 3.3, 3.2, 3.2, 3.2, 3.1, 3.1], 3.5 + 1e-7, Mixing(pytest.approx(1e-7), 0.0, 0)),
    ],
)
def test_a_rise_and_when_it_is_made_up_for(tmp_path, losses, after, expected):
    experiment, run = grown_run(tmp_path, losses, after)
    assert mixing(run, 0) == expected
    results = Results(tmp_path / "r.jsonl")
    results.add(run)
    row = growth_table(groups(experiment, results)).splitlines()[2]
    assert "| L 1 → 2 |" in row
    told = "never" if expected.tokens is None else "at once" if not expected.tokens else f"{expected.flops:.1e} FLOPs"
    assert told in row


def test_a_growth_whose_loss_is_not_known(tmp_path):
    _, run = grown_run(tmp_path, [3.4] * 8, 3.5)
    unknown = replace(run, growths=[run.growths[0] | {"loss_before": None}, run.growths[1]])
    assert mixing(unknown, 0) is None
    assert mixing(unknown, 1) is not None
