"""κ: the predictors against closed forms, the monitor's rules one by one, and the broadcast over gloo."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from megabus.config import parse_config, resolve_stages
from megabus.config.schema import KappaConfig, ScalingLaw
from megabus.errors import UserError
from megabus.kappa.broadcast import GrowthSignal, broadcast_decision
from megabus.kappa.monitor import KappaMonitor, bar, never_met
from megabus.kappa.outlook import outlook
from megabus.kappa.predictors import (
    Constant,
    CurvePoint,
    Fit,
    FromLaw,
    Reference,
    StageSpan,
    make_predictor,
)
from tests.support.tiny_config import tiny_config

NAN = float("nan")
FIT = {"predictor": "fit", "min_evals": 8}


def curve(losses, tokens=1000, flops=6e6):
    return [CurvePoint(tokens * (i + 1), flops * (i + 1), float(x)) for i, x in enumerate(losses)]


def power(n, E=2.5, A=3.0, b=0.4):
    return E + A * np.arange(1, n + 1) ** -b


def monitor(kappa=0.8, end=2.0, n_params=10, stage=0, caps=(None, None), **settings):
    """By a constant prediction, unless the settings name another predictor."""
    made = KappaMonitor(KappaConfig(**{"predictor": "constant", "constant": end, "min_evals": 1, **settings}))
    made.start_stage(StageSpan(stage, n_params, kappa, 0, 0.0, *caps))
    return made


def feed(watch, losses, first=0):
    """Decisions on one loss per 1000 tokens and 6e6 FLOPs."""
    return [watch.observe(1000 * i, 6e6 * i, x) for i, x in enumerate(losses, first)]


def first_growth(decisions):
    return next((i for i, decision in enumerate(decisions) if decision.grow), None)


# ---- predictors


def test_fit_recovers_a_power_law():
    span = StageSpan(0, 10, 0.8)
    for E, b in ((2.5, 0.4), (1.2, 0.08), (3.0, 1.5)):
        found = Fit(8)(span, curve(power(30, E=E, b=b)))
        assert found.loss == pytest.approx(E, rel=1e-3)
        assert found.std < 1e-2


def test_fit_predicts_the_end_of_the_budget():
    at_200 = 2.5 + 3.0 * 200**-0.4
    by_tokens, by_flops = (
        StageSpan(0, 10, 0.8, max_tokens=200_000),
        StageSpan(0, 10, 0.8, max_flops=6e6 * 200),
    )
    both = StageSpan(0, 10, 0.8, max_tokens=200_000, max_flops=6e6 * 900)
    for span in (by_tokens, by_flops, both):
        assert Fit(8)(span, curve(power(30))).loss == pytest.approx(at_200, rel=1e-4)
    assert Fit(8)(StageSpan(0, 10, 0.8), curve(power(30))).loss < at_200 - 0.2  # control: no budget, so E


def test_fit_counts_compute_from_the_start_of_the_run():
    """A grown stage goes on from where the run was: its points keep to the run's own clock."""
    points = curve(power(60))
    found = Fit(8)(StageSpan(1, 10, 0.8, tokens=20_000, flops=6e6 * 20), points[20:])
    assert found.loss == pytest.approx(2.5, rel=1e-3)


def test_fit_std_covers_its_error():
    """Over seeds the error is about as large as claimed: neither a boast nor a shrug."""
    rng = np.random.default_rng(0)
    span = StageSpan(0, 10, 0.8, max_tokens=100_000)
    truth = 2.5 + 3.0 * 100**-0.4
    found = [Fit(8)(span, curve(power(40) + 0.02 * rng.standard_normal(40))) for _ in range(60)]
    z = np.array([(p.loss - truth) / p.std for p in found])
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.6


def test_fit_shrugs_off_outliers():
    rng = np.random.default_rng(1)
    losses = power(40) + 0.002 * rng.standard_normal(40)
    span = StageSpan(0, 10, 0.8, max_tokens=80_000)
    clean = Fit(8)(span, curve(losses)).loss
    losses[[12, 30]] += 2.0
    assert Fit(8)(span, curve(losses)).loss == pytest.approx(clean, abs=0.02)


@pytest.mark.parametrize(
    "losses",
    [
        np.full(12, 3.0),
        np.linspace(3, 4, 12),
        np.where(np.arange(12) % 2, 9.0, 1.0),
        np.zeros(12),
        np.linspace(1e-3, 1e6, 12)[::-1],
        3.0 + np.random.default_rng(2).standard_normal(12),
    ],
    ids=["flat", "rising", "zigzag", "zero", "steep", "noise"],
)
@pytest.mark.parametrize("budget", [None, 100_000])
def test_fit_survives_any_curve(losses, budget):
    found = Fit(8)(StageSpan(0, 10, 0.8, max_tokens=budget), curve(losses))
    assert math.isfinite(found.loss)
    assert found.loss >= 0
    assert math.isfinite(found.std)


def test_fit_waits_for_enough_finite_points_at_different_compute():
    span = StageSpan(0, 10, 0.8)
    assert Fit(8)(span, []) is None
    assert Fit(8)(span, curve(power(7))) is None
    assert Fit(8)(span, curve([*power(7), NAN, math.inf])) is None
    assert Fit(8)(span, [CurvePoint(1000, 6e6, 3.0)] * 20) is None
    assert Fit(8)(span, curve([*power(7), NAN, 3.0])) is not None


def test_scaling_law_closed_form():
    law = FromLaw(ScalingLaw(E=1.0, A=8.0, B=27.0, alpha=0.5, beta=1 / 3))
    assert law(StageSpan(0, 16, 0.8), []).loss == pytest.approx(1 + 8 / 4)
    assert law(StageSpan(0, 16, 0.8, max_tokens=1000), curve([5])).loss == pytest.approx(1 + 8 / 4 + 27 / 10)
    by_flops = StageSpan(0, 16, 0.8, max_flops=6e6)  # the curve's 6000 FLOPs a token make that 1000 tokens
    assert law(by_flops, curve([5])).loss == pytest.approx(1 + 8 / 4 + 27 / 10)
    assert law(by_flops, []) is None
    # Hoffmann et al.: 70B parameters, 1.4T tokens
    chinchilla = FromLaw(ScalingLaw())(StageSpan(0, 70 * 10**9, 0.8, max_tokens=14 * 10**11), curve([5])).loss
    assert chinchilla == pytest.approx(1.94, abs=0.01)


def test_reference_is_linear_in_log_n():
    table = Reference([(100, 4.0), (10_000, 3.0), (1_000_000, 2.5)])

    def at(n):
        return table(StageSpan(0, n, 0.8), []).loss

    assert [at(100), at(1000), at(10_000), at(1_000_000)] == pytest.approx([4.0, 3.5, 3.0, 2.5])
    assert at(10**8) == pytest.approx(2.0)  # beyond: the end segment goes on
    assert at(10) == pytest.approx(4.5)
    assert at(10**40) == 0.0


@pytest.mark.parametrize("table", [[], [(5, 2.0)], [(5, 2.0), (5, 1.0)], [(9, 2.0), (5, 1.0)], [(1, NAN), (2, 1)]])
def test_reference_refuses_bad_tables(table):
    with pytest.raises(UserError, match=r"growth\.trigger\.reference"):
        Reference(table)


def test_make_predictor():
    asked = {"constant": [3.0, 2.0], "reference": [(1e6, 3.0), (1e7, 2.5)], "min_evals": 6}
    found = {name: make_predictor(KappaConfig(predictor=name, **asked)) for name in PREDICTORS}
    assert found == {
        "fit": Fit(6),
        "scaling_law": FromLaw(ScalingLaw()),
        "constant": Constant([3.0, 2.0]),
        "reference": Reference([(1e6, 3.0), (1e7, 2.5)]),
    }
    assert found["constant"](StageSpan(1, 10, 0.8), []).loss == 2.0
    with pytest.raises(UserError, match="no entry for stage 2"):
        found["constant"](StageSpan(2, 10, 0.8), [])


PREDICTORS = ("fit", "scaling_law", "constant", "reference")
REFUSED = [
    ({"predictor": "constant"}, r"constant = \(missing\): predictor constant needs it; add it"),
    ({"predictor": "constant", "constant": []}, r"constant = \[\]: not a finite loss >= 0"),
    ({"predictor": "constant", "constant": [3.0, -1.0]}, r"constant = .*: not a finite loss >= 0"),
    ({"predictor": "reference"}, r"reference = \(missing\): predictor reference needs it; add it"),
    ({"predictor": "reference", "reference": [(1e6, 3.0)]}, r"reference = .*: needs at least 2 rows"),
    ({"predictor": "fit", "min_evals": 4}, r"min_evals = 4: too few for the 3 coefficients"),
]


@pytest.mark.parametrize(("trigger", "told"), REFUSED)
def test_a_predictor_without_what_it_needs_is_refused(trigger, told):
    with pytest.raises(UserError, match=rf"growth\.trigger\.{told}"):
        make_predictor(KappaConfig(**trigger))


# ---- the monitor


def test_the_literal_formula_is_no_loss():
    start, end, kappa = 10.0, 2.0, 0.8
    tp = end - start
    assert tp * kappa + end < 0  # as the method's description writes it: no loss is negative
    watch = monitor(kappa, end)
    target = watch.observe(0, 0, start).view.target
    assert target == pytest.approx(start + kappa * tp)
    assert end < target < start


@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.5, 0.7, 0.75, 0.93, 0.96875])
def test_triggers_at_the_closed_form_point(kappa):
    """L(i) = 2 + 8 / (1 + i). Medians begin with L(1) = 6, so 2 + (1 − κ)·4 is due, and one validation later than the
    losses, which meet it first at i >= (1 + κ) / (1 − κ), their medians do: from the third on."""
    watch = monitor(kappa, end=2.0)
    decisions = feed(watch, [2 + 8 / (1 + i) for i in range(80)])
    point = max(2, math.ceil((1 + kappa) / (1 - kappa) + 1 - 1e-9))
    assert first_growth(decisions) == point
    assert decisions[point].reason == "kappa"
    assert decisions[point].view.progress >= kappa - 1e-12


def test_fit_triggers_near_the_truth():
    """End to end with the default predictor: a stage that knows only its own curve."""
    watch = KappaMonitor(KappaConfig())
    watch.start_stage(StageSpan(0, 10, 0.8, max_tokens=400_000))
    losses = power(400)
    end = losses[-1]
    true = int(np.argmax(losses <= end + 0.2 * (losses[1] - end)))  # the median of the first three
    decisions = [watch.observe(1000 * (i + 1), 6e6 * (i + 1), x) for i, x in enumerate(losses[: true + 20])]
    assert abs(first_growth(decisions) - true) <= 1


def test_start_is_the_median_of_the_stage_s_first_three_finite_losses():
    watch = monitor()
    assert feed(watch, [NAN, 9.0, 8.0, 7.0, 6.0])[-1].view.start == 8.0
    assert feed(monitor(), [29.0, 9.0, 8.0, 7.0])[-1].view.start == 9.0
    watch.start_stage(StageSpan(1, 20, 0.5, tokens=3000, flops=18e6))
    view = watch.observe(3000, 18e6, 5.0).view
    assert view.start == 5.0
    assert (view.stage, view.evals, view.stage_tokens) == (1, 1, 0)
    assert view.target == pytest.approx(2 + 0.5 * (5.0 - 2))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_nonfinite_never_triggers_and_leaves_no_trace(bad):
    watch, twin = monitor(0.5, patience=2), monitor(0.5, patience=2)
    good, broken = feed(twin, [10, 10, 3, 3, 3]), feed(watch, [10, 10, 3, 3, bad])
    assert good[4].grow
    assert not broken[4].grow
    assert broken[4].view.loss == good[3].view.loss
    assert (broken[4].view.met, broken[4].view.nonfinite, broken[4].view.evals) == (0, 1, 4)
    assert not any(decision.grow for decision in feed(monitor(0.5), [10, 10, 3, *[bad] * 20]))
    assert feed(monitor(0.5), [10, 10, 3, 3])[3].grow  # control: finite, it does trigger


OUTLIERS = [[0], [2], [10], [18], [19], [0, 10], [10, 13], [0, 19], [16, 19]]


@pytest.mark.parametrize("where", OUTLIERS, ids=str)
@pytest.mark.parametrize("off", [-3.0, 20.0])
@pytest.mark.parametrize("begin", [0, 20])
def test_no_outlier_grows_the_model(where, off, begin):
    """Wherever they are, if no two are among three in a row: at the defaults, and with every other predictor's rule."""
    losses = power(begin + 20)[begin:] + 0.005 * np.random.default_rng(5).standard_normal(20)
    losses[where] = np.maximum(losses[where] + off, 0.0)

    for settings in ({}, {"predictor": "constant", "constant": 2.5, "min_evals": 1}):
        watch = KappaMonitor(KappaConfig(**settings))
        watch.start_stage(StageSpan(1, 10, 0.95, begin * 1000, begin * 6e6, max_tokens=400_000))
        assert first_growth(feed(watch, losses, begin)) is None


@pytest.mark.parametrize("off", [-3.0, 20.0])
def test_an_outlier_moves_no_growth_by_much(off):
    """By `fit` at most two validations sooner, and little later: a first one that is low makes the third the start."""
    losses = power(100) + 0.002 * np.random.default_rng(6).standard_normal(100)
    at = []
    for where in ([], [0], [40]):
        moved = losses.copy()
        moved[where] += off
        watch = KappaMonitor(KappaConfig())
        watch.start_stage(StageSpan(0, 10, 0.9, max_tokens=100_000))
        at.append(first_growth(feed(watch, moved, 1)))
    assert all(at[0] - 2 <= one <= at[0] + 8 for one in at)
    assert 30 < at[0] < 70


def test_the_cap_grows_where_kappa_may_not():
    """And is not hidden by a κ that has long been met."""
    watch, twin = monitor(0.5, caps=(5000, None)), monitor(0.5, caps=(5000, None))
    told = [watch.observe(1000 * i, 6e6 * i, x, only_cap=True) for i, x in enumerate([10, 10, 3, 3, 3, 3])]
    assert [(decision.grow, decision.reason) for decision in told] == [(False, None)] * 5 + [(True, "cap")]
    assert told[4].view.met == 2
    assert [decision.reason for decision in feed(twin, [10, 10, 3, 3, 3, 3])] == [None] * 3 + ["kappa"] * 3


def test_patience_wants_consecutive_evaluations():
    losses = [10, 10, 3, 3, 9, 9, 3, 3, 3, 3]  # of the medians, the fourth is low, and from the eighth on all are
    assert first_growth(feed(monitor(0.5, patience=3), losses)) == 9
    assert first_growth(feed(monitor(0.5, patience=1), losses)) == 3  # control: no patience, grows on a dip
    assert first_growth(feed(monitor(0.5, patience=2), [10, 10, 3, 3, NAN, 3, 3])) == 6


def test_min_evals():
    assert first_growth(feed(monitor(0.5, min_evals=6), [10, 10, 3, 3, 3, 3, 3])) == 5
    assert first_growth(feed(monitor(0.0, min_evals=1), [10, 10, 10])) == 2  # of fewer than three there is no median


def test_caps_trigger_whatever_the_loss():
    for caps in ((3000, None), (None, 18e6), (3000, 1e9)):
        watch = monitor(caps=caps)
        decisions = feed(watch, [10.0, 10.0, 11.0, 12.0])
        assert first_growth(decisions) == 3
        assert decisions[3].reason == "cap"
    watch.start_stage(StageSpan(1, 20, 0.8, 3000, 18e6, max_tokens=3000))  # caps count from the stage's start
    assert not watch.observe(5999, 36e6, 10.0).grow
    assert watch.observe(6000, 36e6, 10.0).grow
    uncapped = monitor()
    assert not uncapped.observe(10**15, 1e30, 10.0).grow


def test_nothing_to_gain_is_said_and_only_the_cap_ends_it():
    decisions = feed(monitor(0.5, end=4.0, caps=(5000, None)), [3.0, 2.0, 1.0, 0.5, 0.1, 0.1])
    assert all(d.view.progress is None and d.view.target is None for d in decisions)
    assert [d.reason for d in decisions] == [None] * 5 + ["cap"]


def test_a_vague_prediction_does_not_trigger():
    noise = 0.3 * np.random.default_rng(3).standard_normal(60)
    flat = feed(monitor(0.5, **FIT), 3.0 + noise)
    assert first_growth(flat) is None
    trusting = feed(monitor(0.5, **FIT, max_std=1e9), 3.0 + noise)
    assert first_growth(trusting) is not None  # control: noise alone would have grown the model


def test_a_flat_curve_has_ended():
    """From half of its cap on; a plateau before is not told from a warm-up. A curve that falls is not flat."""
    noise = 0.005 * np.random.default_rng(7).standard_normal(60)
    decisions = feed(monitor(0.95, caps=(60_000, None), **FIT), 3.0 + noise)
    assert first_growth(decisions) == 30
    assert decisions[30].reason == "kappa"
    assert decisions[30].view.flat
    falling = feed(monitor(0.95, caps=(60_000, None), **FIT), 3.0 + noise[:45] - 0.002 * np.arange(45))
    assert first_growth(falling) is None
    assert first_growth(feed(monitor(0.95, **FIT), 3.0 + noise)) is None  # without a cap nothing says what half is


def test_nothing_is_predicted_in_the_last_stage():
    watch = monitor(0.5)
    watch.start_stage(StageSpan(1, 10, 0.5, last=True))
    decisions = feed(watch, [10, 10, 3, 3, 3])
    assert [(decision.grow, decision.view) for decision in decisions] == [(False, None)] * 5
    watch.retarget(StageSpan(1, 10, 0.5))  # the run goes on with another stage after it
    assert feed(watch, [3.0], 5)[0].grow


def test_what_kappa_can_never_meet_is_told_once():
    def tell(watch, losses):
        return [never_met(d.view, loss, "constant") for d, loss in zip(feed(watch, losses), losses, strict=True)]

    told = tell(monitor(0.5, end=4.0, caps=(5000, None)), [3.0, 2.9, 2.8, math.nan, math.inf, 2.7])
    assert told[:2] == [None, None]
    assert told[2] == (
        "growth.trigger.predictor = constant says 4.0000, no less than where stage 0 began, 2.9000: its cap alone ends "
        "it; correct what it is given, or use fit"
    )
    assert told[3:] == [None] * 3  # those that are not finite come after three finite ones too
    uncapped = tell(monitor(0.5, end=4.0), [3.0, 2.9, 2.8])
    assert "nothing but the run's end ends it" in uncapped[2]
    assert not any(tell(monitor(), [3.0, 2.9, 2.8]))


def test_view_slope_and_metrics():
    watch = monitor()
    view = [watch.observe(i, 10.0 * i, 7.0 * i**-0.25) for i in range(1, 9)][-1].view
    assert view.slope == pytest.approx(-0.25)
    metrics = json.loads(json.dumps(view.as_dict()))
    assert metrics["kappa"] == 0.8
    assert {"kappa_progress", "kappa_target", "kappa_mp", "kappa_loss"} < set(metrics)


def test_resume_is_bitwise():
    rng = np.random.default_rng(4)
    losses = [NAN if i == 17 else float(x) for i, x in enumerate(power(40) + 0.01 * rng.standard_normal(40))]
    settings = FIT | {"patience": 3}
    whole = feed(monitor(0.7, caps=(60_000, None), **settings), losses)
    assert first_growth(whole) is not None
    for cut in (1, 16, 18, 30):
        before = monitor(0.7, caps=(60_000, None), **settings)
        feed(before, losses[:cut])
        after = KappaMonitor(KappaConfig(**settings))
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert feed(after, losses[cut:], cut) == whole[cut:]


def test_a_resumed_stage_has_the_target_and_caps_that_it_is_given():
    """What it saw stays; what it aims at is new."""
    watch = monitor(0.9, end=2.0, caps=(9000, None))
    assert first_growth(feed(watch, [4.0, 3.5, 3.2])) is None
    watch.retarget(StageSpan(0, 10, 0.5, 7, 7.0, 20_000, 1e9))  # where it began is not for a resumed run to say
    assert (watch.state.span.tokens, watch.state.span.flops) == (0, 0.0)
    view = watch.view(2000, 12e6)
    assert (view.kappa, view.start, view.evals, view.target) == (0.5, 3.5, 3, 2.75)
    assert (view.max_tokens, view.max_flops) == (20_000, 1e9)
    assert first_growth(feed(watch, [2.7, 2.7], 3)) == 1
    watch.retarget(StageSpan(0, 10, 0.99, max_tokens=6000))
    (decision,) = feed(watch, [2.7], 6)
    assert (decision.grow, decision.reason) == (True, "cap")


def test_a_monitor_without_a_stage_observes_nothing():
    with pytest.raises(RuntimeError, match="start_stage"):
        KappaMonitor(KappaConfig()).observe(0, 0, 1.0)


def test_bar():
    assert bar(0.62, 0.8) == "κ ▕██████░░|░▏ 62%/80%"
    assert bar(1.7, 1.0) == "κ ▕█████████|▏ 170%/100%"
    assert bar(-0.5, 0.0) == "κ ▕|░░░░░░░░░▏ -50%/0%"


# ---- what is known at start


def test_stages_that_kappa_hardly_ends_are_told():
    def told(trigger, flops=None, **growth):
        stages = [{"d_model": 64, **growth.pop("second", {})}, {"d_model": 96}]
        config = parse_config(
            tiny_config(
                train__max_steps=None,
                train__max_tokens=4000,
                train__max_flops=flops,
                growth={**growth, "trigger": trigger, "stages": stages},
            )
        )
        return outlook(resolve_stages(config, 1), config.growth.trigger)

    assert told({}, max_tokens=100, second={"max_tokens": 100}) == []
    lines = told({})
    assert len(lines) == 2
    assert lines[0].startswith("growth.max_tokens = (missing): without one fit predicts")
    assert lines[1].startswith("growth.stages.0.max_tokens = (missing)")
    assert "never becomes worth more" in told({"rule": "marginal"}, flops=1e12)[0]
    high = {"predictor": "constant", "constant": [7.0, 3.0, 3.0]}
    (line,) = told(high, max_tokens=100)
    assert line == (
        "growth.trigger.constant = 7.0000 for stage 0 is no less than a guess has, 4.2047: κ never ends it, its cap "
        "does"
    )
    with pytest.raises(UserError, match=r"growth\.trigger\.constant = 7.0000 for stage 0: .* it has no cap; correct"):
        told(high)
    with pytest.raises(UserError, match=r"growth\.trigger\.scaling_law = "):  # its coefficients are not of this data
        told({"predictor": "scaling_law"})
    assert told({"predictor": "constant", "constant": 3.0}) == []


# ---- all ranks


TOLD = [
    GrowthSignal(False, None, 5),
    GrowthSignal(True, "kappa", 2**40),
    GrowthSignal(True, "cap", 1),
]


def _rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    heard = [broadcast_decision(signal if rank == 0 else None) for signal in TOLD]
    heard.append(broadcast_decision(GrowthSignal(True, "cap", rank + 7)))  # the others' are ignored
    if rank == 0:
        with pytest.raises(ValueError, match="must pass"):
            broadcast_decision(None)
    Path(folder, f"{rank}.txt").write_text(repr(heard))
    dist.destroy_process_group()


def test_broadcast_over_three_ranks():
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(_rank, (3, folder), nprocs=3, join=False, start_method="fork")
        try:
            deadline = time.monotonic() + 60
            while not ranks.join(timeout=5):  # True once all have ended; raises what a rank raised
                assert time.monotonic() < deadline, "the ranks hang"
        finally:
            for process in ranks.processes:
                process.kill()
        heard = {Path(folder, f"{rank}.txt").read_text() for rank in range(3)}
    assert heard == {repr([*TOLD, GrowthSignal(True, "cap", 7)])}


# ---- a curve that begins anew ------------------------------------------------------------------------------


def test_a_curve_that_begins_anew_is_all_that_counts():
    """As if the stage had begun there, but for its caps and where it began."""
    seen, fresh = monitor(0.8, 2.0, caps=(20_000, None)), monitor(0.8, 2.0)
    for loss in (4.0, 3.9, 3.8, 3.0):
        seen.observe(1000, 6e6, loss)
    seen.begin_anew()
    for number, loss in enumerate((3.0, 2.9, 2.6, 2.5, 2.3, 2.2, 2.1, 2.1), 1):
        at = 10_000 + 1000 * number, 6e7 + 6e6 * number
        ours, theirs = seen.observe(*at, loss), fresh.observe(*at, loss)
        assert (ours.grow, ours.view.start, ours.view.progress, ours.view.evals) == (
            theirs.grow,
            theirs.view.start,
            theirs.view.progress,
            theirs.view.evals,
        )
    assert ours.grow
    assert ours.view.stage_tokens == 18_000
    assert seen.observe(20_000, 2e8, 2.1, only_cap=True).reason == "cap"


def test_a_cap_is_converted_by_what_a_token_costs_now():
    """1000 tokens of 6000 FLOPs, then tokens of 9000: of a cap of 1e8 FLOPs 94 MFLOP are left, at the new price."""
    capped = StageSpan(0, 10, 0.8, max_flops=1e8)
    before = [CurvePoint(0, 0.0, 4.0), CurvePoint(1000, 6e6, 3.9)]
    anew = [CurvePoint(1000, 6e6, 3.9), CurvePoint(3000, 2.4e7, 3.8)]
    assert capped.budget(before) == pytest.approx((1e8 / 6000, 1e8))
    assert capped.budget(anew) == pytest.approx((1000 + 9.4e7 / 9000, 1e8))
    in_tokens = StageSpan(0, 10, 0.8, max_tokens=10_000)
    assert in_tokens.budget(anew) == pytest.approx((10_000, 6e6 + 9000 * 9000))
