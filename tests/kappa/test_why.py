"""The line that says why κ has not grown the model: each condition in turn, and then growth."""

import pytest

from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan
from megabus.kappa.why import why

START = [4.0, 4.0, 4.0]
MET = "2.3000, 85% of the improvement; grows at 2.4000, 80%"


def said(losses, *, only_cap=False, max_tokens=None, **trigger):
    settings = KappaConfig(**{"predictor": "constant", "constant": 2.0, "min_evals": 4, "patience": 2} | trigger)
    monitor = KappaMonitor(settings)
    monitor.start_stage(StageSpan(0, 1000, 0.8, max_tokens=max_tokens))
    for i, loss in enumerate(losses):
        decision = monitor.observe(1000 * i, 1e6 * i, loss, only_cap=only_cap)
    return why(decision, decision.view, settings)


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        (START, {}, "κ waits: 3 of 4 evaluations (growth.trigger.min_evals)"),
        ([*START, 3.0, 3.0], {}, "κ is not met: 3.0000, 50% of the improvement; grows at 2.4000, 80%"),
        ([*START, 3.0, 3.0], {"only_cap": True}, "κ decides nothing while the learning rate decays"),
        ([*START, 3.0], {"constant": 5.0}, "κ is not met: no improvement is predicted (from 4.0000 to 5.0000)"),
        ([*START, 2.3, 2.3], {}, f"κ is met 1 of 2 times in a row (growth.trigger.patience): {MET}"),
        ([*START, 2.3, 2.3, 2.3], {}, f"κ is met: {MET}"),
        ([*START, 2.3, 2.3, 2.3], {"max_tokens": 5000}, f"κ is met: {MET}, and the stage's cap is reached"),
        ([*START, 3.0, 3.0], {"max_tokens": 4000}, "the stage's cap is reached"),
        ([*START, 2.3, 2.3, float("nan")], {}, "κ waits: the loss is not finite"),
        ([4.0, 2.3], {"min_evals": 1}, "κ waits: 2 evaluations, too few for a median"),
    ],
)
def test_the_condition_that_is_not_met_is_named(losses, options, expected):
    assert said(losses, **options) == expected


def test_a_vague_prediction_is_told_with_the_most_that_is_allowed():
    losses = [4.0, 3.4, 3.3, 3.1, 2.9, 3.2, 3.0, 2.8, 3.0, 2.9]
    text = said(losses, predictor="fit", constant=None, min_evals=5, max_std=1e-9)
    assert text.startswith(("κ is met, but its prediction is too vague: ", "κ is not met: "))


def test_the_next_size_and_the_present_one_are_compared_under_rule_marginal():
    assert said([4.0] * 5, rule="marginal", predictor="fit", constant=None, min_evals=5) == (
        "the next size's return is not known yet"
    )
