"""Rates that transfer in a whole run: the planned steps, growth into another rate, and resuming."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from megabus.config import resolve_stages
from megabus.config.schema import TrainConfig
from megabus.model.cost import flops_per_token
from megabus.train.horizon import at_horizon, planned_steps
from tests.support.small_runs import rows_of, run_config, start, stop_after, write_corpus

TUNED = {"d_model": 36, "n_layers": 3, "steps": 40}  # the first stage's sizes
LAYOUTS = [{"tp": 2}, {"dp": 2}, {"pp": 2}]
NO_KAPPA = {"predictor": "constant", "constant": 0.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(corpus, run_dir, tuned=TUNED, **changes):
    options = {"optimizer__transfer": tuned, "growth__trigger": NO_KAPPA, "growth__depth": "append"}
    options |= {"train__micro_batch_size": 4} | changes
    return run_config(corpus, run_dir, LAYOUTS, **options)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of two growths: its configuration, and what rank 0 saw."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_of(corpus, folder / "run")
    return config, start(config, 2)[0].steps


def test_a_run_takes_the_planned_steps_at_the_rates_that_follow(whole):
    config, steps = whole
    stages = resolve_stages(config, 2)
    assert planned_steps(config.train, stages) == len(steps) > 20
    factor = (len(steps) / 40) ** (-1 / 3)
    peaks = {}
    for row in rows_of(config, "step"):
        peaks[row["stage"]] = max(peaks.get(row["stage"], 0), row["lr"])
    assert peaks == pytest.approx({0: 1e-2 * factor, 1: 1e-2 * factor, 2: 3e-3 * factor})  # the third has its own lr
    assert [stage.model.alpha_init for stage in stages] == pytest.approx([0.05, 0.05, 0.03])


def test_growth_keeps_the_loss_and_rows_stay_unit(whole):
    config, _ = whole
    growths = rows_of(config, "growth")
    assert len(growths) == 2
    assert max(abs(row["loss_after"] - row["loss_before"]) for row in growths) <= 1e-6
    assert max(row["unit_error"] for row in rows_of(config, "step")) <= 1e-6


def test_resume_is_bitwise(whole, tmp_path):
    """Before a growth and after it: each start makes the rates anew."""
    config, steps = whole
    again = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    first = start(again, 2, stop_after(7))[0]
    second = start(again, 2, stop_after(14))[0]
    assert [step.stage for step in (first.steps[-1], second.steps[-1])] == [0, 1]
    for rank in (first, second):
        assert all(step in steps for step in rank.steps)


def test_another_budget_changes_all_rates_and_says_so(corpus, tmp_path, whole):
    """What was planned and is: as many steps as the whole run, and as one with twice the budget."""
    config = config_of(corpus, tmp_path / "run")
    start(config, 2, stop_after(4))
    more = config.model_copy(update={"train": config.train.model_copy(update={"max_tokens": 8000})})
    start(more, 2, stop_after(6))
    start(more, 2, stop_after(7))  # negative control: as it was saved
    was, now = len(whole[1]), 16 + ceil((8000 - 2048) / 256)
    (first, then), rows = (row["changes"] for row in rows_of(more, "resume")), rows_of(more, "step")
    factor = (now / was) ** (-1 / 3)
    assert first == [
        "train.max_tokens: 4000 -> 8000",
        f"all learning rates: {factor:.3g} times what they were, by optimizer.transfer (planned steps {was} -> {now})",
    ]
    assert then == []
    assert rows[5]["lr"] / rows[3]["lr"] == pytest.approx(factor)


def test_a_run_without_rates_is_another(whole, tmp_path, corpus):
    """Negative control of the above: until the first growth only the horizon makes the difference, then widths do."""
    steps = whole[1]
    lr = 1e-2 * (len(steps) / 40) ** (-1 / 3)
    plain = config_of(corpus, tmp_path / "run", None, optimizer__lr=lr)
    rank = start(plain, 2, stop_after(10))[0]
    same = [step in steps for step in rank.steps]
    assert same == [True] * 8 + [False] * 2


# ---- planned steps -------------------------------------------------------------------------------------------


def planned(corpus, tmp_path, budget, **changes):
    config = config_of(corpus, tmp_path / "run", **changes)
    budgets = {"max_tokens": None} | budget
    train = TrainConfig.model_validate(config.train.model_dump() | budgets)
    return planned_steps(train, resolve_stages(config.model_copy(update={"train": train}), 2))


def test_planned_steps_of_every_budget(corpus, tmp_path):
    """128 tokens a step in the first two stages, which are capped at 1024 tokens each; 256 in the last."""
    stages = resolve_stages(config_of(corpus, tmp_path / "run"), 2)
    cost = [stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len) for stage in stages]
    assert planned(corpus, tmp_path, {"max_steps": 100}) == 100
    assert planned(corpus, tmp_path, {"max_steps": 3}) == 3
    assert planned(corpus, tmp_path, {"max_tokens": 4000}) == 16 + ceil((4000 - 2048) / 256)
    assert planned(corpus, tmp_path, {"max_flops": 8 * cost[0] + 8 * cost[1] + 2.5 * cost[2]}) == 19
    assert planned(corpus, tmp_path, {"max_flops": 1e30, "max_tokens": 2000}) == 16
    uncapped = [{"d_model": 52, "n_heads": 3, "d_ff": 90, "layout": {"dp": 2}}, {"n_layers": 5, "layout": {"pp": 2}}]
    free = {"growth__max_tokens": None, "growth__stages": uncapped}
    assert planned(corpus, tmp_path, {"max_flops": 30 * cost[0]}, **free) == 10 + ceil(
        ceil(20 * cost[0] / cost[1]) / 2
    ) + ceil(
        (20 * cost[0] - ceil(ceil(20 * cost[0] / cost[1]) / 2) * cost[1]) / (cost[2] / 2)
    )  # the last stage's steps are half as long as above


def test_one_factor_for_all_stages_and_none_without_a_reference(corpus, tmp_path):
    config = config_of(corpus, tmp_path / "run")
    stages = resolve_stages(config, 2)
    moved = at_horizon(config, stages)
    factor = (planned_steps(config.train, stages) / 40) ** (-1 / 3)
    assert moved == [replace(stage, lr=stage.lr * factor) for stage in stages]
    assert at_horizon(config_of(corpus, tmp_path / "run", None), stages) == stages
    deeper = {"growth__stages": [{"n_layers": 5, "lr": 3e-3, "layout": LAYOUTS[1]}]}
    gpt = config_of(corpus, tmp_path / "run", {"d_model": 36}, model__kind="gpt", **deeper)
    assert [stage.lr for stage in at_horizon(gpt, resolve_stages(gpt, 2))] == [1e-2, 3e-3]
