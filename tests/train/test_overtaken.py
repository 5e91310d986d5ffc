"""Growths that come while the learning rate falls, or never: told from the configuration alone."""

from __future__ import annotations

import pytest

from megabus.config import parse_config, resolve_stages
from megabus.errors import UserError
from megabus.model.cost import flops_per_token
from megabus.train.overtaken import check_growths
from tests.support.small_runs import attempt, refusal, rows_of, run_config, write_corpus

STEP = 8 * 16  # tokens


def config_of(first=None, second=None, budget=None, growths=2, rule="kappa", **optimizer):
    """Stages of 100 steps' budget; caps of the first two in steps."""
    stages = [{"n_layers": 2, "max_tokens": second and second * STEP}, {"n_layers": 3}][2 - growths :]
    growth = {"max_tokens": first and first * STEP, "trigger": {"min_evals": 5, "rule": rule}, "stages": stages}
    sizes = {"vocab_size": 67, "d_model": 36, "n_layers": 1, "n_heads": 2, "head_dim": 6, "d_ff": 62}
    return parse_config(
        {
            "run_dir": "unused",
            "model": sizes,
            "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8} | (budget or {"max_steps": 100}),
            "optimizer": {"lr": 1e-2} | optimizer,
            "growth": growth,
            "data": {"train": "unused", "valid": "unused"},
            "eval": {"every": 10},
        }
    )


def told(config):
    return check_growths(config, resolve_stages(config, 1))


def test_growths_before_the_fall_are_not_spoken_of():
    assert told(config_of(20, 60)) == []  # the second one just where the rate begins to fall
    assert told(config_of(20, 500)) == []  # after the run's end, as in a short trial of a long configuration
    for schedule in ("cosine", "log", "constant"):
        assert told(config_of(20, 75, schedule=schedule)) == []


@pytest.mark.parametrize("budget", [{"max_steps": 100}, {"max_tokens": 100 * STEP, "max_steps": 1000}])
def test_growths_in_the_fall_are_told(budget):
    line = "growth.stages.0.max_tokens = 7680: ends this stage at 90% of the budget, and the rate falls from 80% on; "
    assert [text.startswith(line) for text in told(config_of(30, 60, budget))] == [True]
    assert [text.split(" = ")[0] for text in told(config_of(85, 5, budget))] == [
        "growth.max_tokens",
        "growth.stages.0.max_tokens",
    ]


def test_caps_and_budgets_in_flops():
    """A cap in FLOPs beside one in tokens; of two the one that is reached first is named."""
    cost = flops_per_token(config_of().model, 16)
    config = config_of(90, growths=1, budget={"max_flops": 100 * STEP * cost})
    growth = config.growth.model_copy(update={"max_flops": 85 * STEP * cost})
    (text,) = told(config.model_copy(update={"growth": growth}))
    assert text.startswith("growth.max_flops = ")
    assert "at 85% of the budget" in text
    (text,) = told(config)
    assert text.startswith("growth.max_tokens = ")


def test_a_stage_that_nothing_ends_is_refused():
    """Without a cap: kappa's fifth evaluation is the 31st step's at the earliest, or later in a second stage."""
    assert told(config_of(growths=1, decay_share=0.69)) == []
    problem = (
        r"^growth\.max_tokens = \(missing\): nothing ends this stage: rule kappa has 5 evaluations at 30% of the budget"
    )
    with pytest.raises(
        UserError, match=problem + ", and decides nothing while the rate falls, from 20% on; give it a cap"
    ):
        told(config_of(decay_share=0.8))
    assert told(config_of(growths=1, decay_share=0.8, schedule="log")) == []
    with pytest.raises(UserError, match=r"^growth\.stages\.0\.max_tokens = \(missing\): .* at 60% of the budget"):
        told(config_of(decay_share=0.5))
    assert told(config_of(5, decay_share=0.5)) == []  # by its cap the first stage ends earlier


def test_the_rule_that_cannot_decide_is_named():
    with pytest.raises(UserError, match=": rule marginal has 5 evaluations at 30% of the budget, and decides nothing"):
        told(config_of(budget={"max_steps": 100, "max_flops": 1e18}, decay_share=0.8, rule="marginal"))


def test_stages_that_whole_steps_leave_no_budget_for_are_told():
    """By the caps alone the last size would be reached: so it is meant. `growth: auto` has such caps."""
    (text,) = told(config_of(1, 0.5, {"max_tokens": 1.75 * STEP}, schedule="constant"))
    assert text.startswith("growth.stages.0.max_tokens = 64: leaves stage 2 something of the budget, and the whole ")
    tree = config_of(growths=1).model_dump(exclude={"growth"})
    for steps, keys in ((40, []), (3, ["growth.stages.0.max_tokens"]), (1, ["growth.max_tokens"])):
        tree["train"]["max_steps"] = steps
        config = parse_config(tree | {"growth": "auto", "model": tree["model"] | {"n_layers": 8}})
        assert len(config.growth.stages) == 3
        assert [line.split(" = ")[0] for line in told(config)] == keys


def test_a_run_is_refused_before_it_trains(tmp_path, capfd):
    corpus = write_corpus(tmp_path)
    layouts = [{"dp": 2}] * 3
    config = run_config(corpus, tmp_path / "run", layouts, growth__max_tokens=None, optimizer__decay_share=1.0)
    assert refusal(config, 2).startswith("growth.max_tokens = (missing): nothing ends this stage")
    assert not (tmp_path / "run").exists()
    config = run_config(corpus, tmp_path / "run", layouts, optimizer__decay_share=0.5, train__max_tokens=2100)
    assert all(rank.error is None for rank in attempt(config, 2))
    assert len(rows_of(config, "growth")) == 2
    assert "warning: growth.stages.0.max_tokens = 1024: ends this stage at 98%" in capfd.readouterr().err
