"""The data schedule: what phases a stage has, what is refused of them, and what is known of a run's cost by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from megabus.config import RunConfig, Stage, parse_config, resolve_stages
from megabus.config.auto import written_out
from megabus.config.effects import keys_without_effect
from megabus.errors import UserError
from megabus.estimate.devices import device
from megabus.estimate.layouts import rank_layouts
from megabus.estimate.whole_run import estimate_run, tables
from megabus.kappa.proposal import capped, tokens_of
from megabus.model.budget import Spent, mean_length, spent_share
from megabus.model.cost import flops_per_token
from megabus.train.horizon import planned_steps
from megabus.train.overtaken import check_growths
from tests.support.tiny_config import BASE

TWO = [{"path": "a", "weight": 3}, {"path": "c", "weight": 0}]
PHASES = [
    {"share": 0.25, "seq_len": 32, "micro_batch_size": 1},
    {"share": 0.5, "weights": [1, 1]},
    {"share": 0.75, "global_batch_size": 12, "weights": [0, 1]},
]


def config_of(phases=PHASES, growths=None, **train) -> RunConfig:
    tree = yaml.safe_load(BASE)
    tree["data"]["train"] = TWO
    tree["train"] |= {"phases": phases} | train
    tree["optimizer"] = {"lr": 0.01}
    tree["growth"] = {} if growths is None else {"max_tokens": 2000, "stages": growths}
    return parse_config(tree)


def samples(stage: Stage):
    return stage.seq_len, stage.micro_batch_size, stage.global_batch_size, stage.weights


def test_a_stage_says_what_samples_it_takes_at_a_share():
    stage, grown = resolve_stages(config_of(growths=[{"n_layers": 5}]), 1)
    for one in (stage, grown):
        assert samples(one) == samples(one.at(0)) == samples(one.at(0.2499)) == (16, 2, 8, (3, 0))
        assert samples(one.at(0.25)) == (32, 1, 8, (3, 0))
        assert samples(one.at(0.6)) == (32, 1, 8, (1, 1))
        assert samples(one.at(1.0)) == (32, 1, 12, (0, 1))
        assert one.at(0.6).at(0.1) == one  # whatever phase it is asked in
        assert [end for _, end in one.onward(0.3)] == [0.5, 0.75, float("inf")]
    assert grown.at(0.8).model == grown.model != stage.model
    (plain,) = resolve_stages(config_of(phases=[]).model_copy(update={"data": plain_data()}), 1)
    assert plain.at(0.7) is plain
    assert plain.onward(0.7) == [(plain, float("inf"))]


def plain_data():
    return parse_config(yaml.safe_load(BASE)).data


def test_growths_set_weights_and_phases_the_rest():
    growths = [{"n_layers": 5, "weights": [1, 3]}, {"d_ff": 80}]
    stages = resolve_stages(
        config_of(phases=[{"share": 0.5, "seq_len": 32, "micro_batch_size": 1}], growths=growths), 1
    )
    assert [samples(stage.at(share)) for stage in stages for share in (0.1, 0.9)] == [
        (16, 2, 8, (3, 0)),
        (32, 1, 8, (3, 0)),
        (16, 2, 8, (1, 3)),
        (32, 1, 8, (1, 3)),
        (16, 2, 8, (1, 3)),
        (32, 1, 8, (1, 3)),
    ]


REFUSED = [
    ([{"share": 1.0, "seq_len": 32}], None, "train.phases.0.share = 1.0: begins when the budget is spent"),
    ([{"share": 3, "seq_len": 32}], None, "train.phases.0.share = 3.0: begins when the budget is spent"),
    ([{"share": 0.5}], None, "train.phases.0.share = 0.5: changes nothing"),
    (
        [{"share": 0.5, "seq_len": 32}, {"share": 0.5, "weights": [1, 1]}],
        None,
        "train.phases.1.share = 0.5: overlaps the phase before, which begins at 0.5",
    ),
    (
        [{"share": 0.5, "seq_len": 32}, {"share": 0.2, "weights": [1, 1]}],
        None,
        "train.phases.1.share = 0.2: overlaps the phase before",
    ),
    ([{"share": 0.5, "weights": [0, 0]}], None, "train.phases.0.weights = [0.0, 0.0]: sums to nothing"),
    ([{"share": 0.5, "weights": [1]}], None, "train.phases.0.weights = [1.0]: has 1 weights for the 2 corpora"),
    ([{"share": 0.5, "seq_len": 32}], None, "data.train.1.weight = 0.0: is never read"),
    ([{"share": 0.5, "seq_len": 24, "weights": [1, 1]}], None, "train.seq_len = 16: does not divide the run's longest"),
    (
        [{"share": 0.3, "seq_len": 32}, {"share": 0.5, "seq_len": 24, "weights": [1, 1]}],
        None,
        "train.phases.1.seq_len = 24: does not divide the run's longest sequence, 32",
    ),
    (
        [{"share": 0.5, "micro_batch_size": 3, "weights": [1, 1]}],
        None,
        "train.phases.0.global_batch_size = 8: is not divisible by micro_batch_size*dp = 3",
    ),
    (
        [{"share": 0.5, "seq_len": 32, "weights": [1, 1]}],
        [{"n_layers": 5}, {"seq_len": 64}],
        "growth.stages.1.seq_len = 64: is set by train.phases.0 too",
    ),
    (
        [{"share": 0.5, "weights": [1, 1]}],
        [{"n_layers": 5, "weights": [0, 1]}],
        "growth.stages.0.weights = [0.0, 1.0]: is set by train.phases.0 too",
    ),
    ([], [{"n_layers": 5, "weights": [0, 0]}], "growth.stages.0.weights = [0.0, 0.0]: sums to nothing"),
    ([{"share": 0.5, "seq_len": 2**27, "weights": [1, 1]}], None, "more than the 268435456 that it reads at once"),
]


@pytest.mark.parametrize(("phases", "growths", "told"), REFUSED)
def test_what_is_no_schedule_is_refused_in_a_line(phases, growths, told):
    with pytest.raises(UserError) as caught:
        resolve_stages(config_of(phases, growths), 1)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_phase_that_no_step_begins_in_is_refused():
    """Of ten steps the last begins at nine tenths; of a budget in tokens that hangs on the steps' sizes."""
    phases = [{"share": 0.5, "seq_len": 32}, {"share": 0.9, "weights": [1, 1]}]
    resolve_stages(config_of(phases), 1)
    phases[1]["share"] = 0.91
    told = r"^train\.phases\.1\.share = 0\.91: begins in no step: the last of 10 begins at 0\.9; lower it"
    with pytest.raises(UserError, match=told):
        resolve_stages(config_of(phases), 1)
    resolve_stages(config_of(phases), 1, saved=True)
    resolve_stages(config_of(phases, max_tokens=10**4), 1)


def test_every_sequence_is_cut_by_tensor_parallelism():
    layout = {"sequence_parallel": True}
    phases = [{"share": 0.5, "seq_len": 16, "weights": [1, 1]}]
    config = config_of(phases, seq_len=1, **layout)
    tree = config.model_dump() | {"layout": {"tp": 1}}
    resolve_stages(parse_config(tree), 1)  # control
    with pytest.raises(UserError, match=r"train.seq_len = 1: is not divisible by layout.tp = 2"):
        resolve_stages(parse_config(tree | {"layout": {"tp": 2}}), 2)
    config = config_of([{"share": 0.5, "seq_len": 1, "weights": [1, 1]}], seq_len=2, **layout)
    with pytest.raises(UserError, match=r"train.phases.0.seq_len = 1: is not divisible by layout.tp = 2"):
        resolve_stages(parse_config(config.model_dump() | {"layout": {"tp": 2}}), 2)


# ---- what a run costs by it ---------------------------------------------------------------------------------


def walked(config, stages, caps=()):
    """A run step by step, as the loop counts it: (steps, tokens, flops) at the end of each stage."""
    step, tokens, flops, ends = 0, 0, 0.0, []
    for stage, cap in zip(stages, [*caps, None], strict=True):
        begun = tokens
        while (share := spent_share(config.train, step, tokens, flops)) < 1 and (cap is None or tokens - begun < cap):
            part = stage.at(share)
            step, tokens = step + 1, tokens + part.tokens_per_step
            flops += part.tokens_per_step * flops_per_token(part.model, part.seq_len)
        ends.append((step, tokens, flops))
    return ends


BUDGETS = [{"max_steps": 200}, {"max_tokens": 60_000, "max_steps": None}, {"max_flops": 2e10, "max_steps": None}]


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_a_run_will_cost_is_what_it_costs(budget):
    """Against one that is walked step by step. Steps are whole there, and parts of them here."""
    config = config_of(growths=[{"n_layers": 5}], **budget)
    stages = resolve_stages(config, 1)
    ends = walked(config, stages, [2000])
    assert abs(planned_steps(config.train, stages) - ends[-1][0]) <= 1
    by_caps = capped(config.train, stages, config.growth.trigger.scaling_law)
    assert [stage.flops for stage in by_caps.stages] == pytest.approx([ends[0][2], ends[1][2] - ends[0][2]], rel=0.03)
    alone = walked(config, stages[-1:])
    assert tokens_of(config, stages[-1]) == pytest.approx(alone[-1][1], rel=0.03)
    whole = Spent().after(config.train, stages[-1], share=1.0)
    assert (whole.steps, whole.flops) == (pytest.approx(alone[-1][0], rel=0.03), pytest.approx(alone[-1][2], rel=0.03))
    mean = mean_length(config.train, stages[-1])
    assert flops_per_token(stages[-1].model, mean) == pytest.approx(whole.flops / whole.tokens)
    assert 16 < mean < 32
    # Control: without the phases it is another run.
    plain = [replace(stage, phases=()) for stage in stages]
    steps, tokens = planned_steps(config.train, plain), tokens_of(config, plain[-1])
    assert abs(steps - ends[-1][0]) > 1 or tokens != pytest.approx(alone[-1][1], rel=0.03)


def test_growths_that_come_in_the_fall_are_found_through_phases():
    longer = [{"share": 0.25, "seq_len": 64, "weights": [1, 1]}]
    growths = [{"n_layers": 5}]

    def told(phases):
        config = config_of(phases, growths, max_steps=100)
        tree = config.model_dump()
        tree["growth"]["max_tokens"] = 11_000  # 86 steps of 128 tokens; or 25 and 16 of 512
        config = parse_config(tree)
        return check_growths(config, resolve_stages(config, 1))

    assert told(longer) == []
    assert "ends this stage at 86% of the budget" in told([{"share": 0.25, "weights": [1, 1]}])[0]


def test_growth_auto_and_the_estimate_know_phases():
    config = config_of(max_steps=100)
    caps = [stage.get("max_tokens") for stage in [written_out(config)["growth"]]]
    plain = written_out(config_of([{"share": 0.5, "weights": [1, 1]}], max_steps=100))["growth"]["max_tokens"]
    mean = 0.25 * 16 * 8 + 0.5 * 32 * 8 + 0.25 * 32 * 12
    assert caps[0] == pytest.approx(plain * mean / (16 * 8), rel=0.01)
    stages = resolve_stages(config, 1)
    found = estimate_run(config, stages, device("cpu"), 1, 0.0)
    assert [(one.name, one.stage.seq_len, one.stage.global_batch_size) for one in found] == [
        ("0", 16, 8),
        ("0 from 25%", 32, 8),
        ("0 from 75%", 32, 12),
    ]
    assert [one.time.model_flops for one in found] == [
        one.stage.tokens_per_step * flops_per_token(one.stage.model, one.stage.seq_len) for one in found
    ]
    assert "0 from 75%" in tables(found, device("cpu"))
    assert rank_layouts(config, stages[0].at(0.9), device("cpu"), 1).accepted > 0
    assert keys_without_effect(config) == []
