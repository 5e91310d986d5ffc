"""Growing by marginal return: on ladders of a known law, where the right instant has a closed form."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megabus.config.schema import KappaConfig, ScalingLaw
from megabus.kappa.curve_fit import fit_curve
from megabus.kappa.marginal import MIXING, Ahead, StagePath, fit_run_law, path_of, returns
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan

TRUTH = ScalingLaw(E=1.7, A=40.0, B=60.0, alpha=0.3, beta=0.3)
SIZES = (100_000, 800_000, 6_400_000)
TRIGGER = {"rule": "marginal", "scaling_law": TRUTH.model_dump()}


def tokens_to(size, loss):
    return (TRUTH.B / (loss - TRUTH.floor(size))) ** (1 / TRUTH.beta)


def price(size, loss):
    """FLOPs per nat of a size at a loss, at 6 FLOPs a parameter and token."""
    return 6 * size * tokens_to(size, loss) / (TRUTH.beta * (loss - TRUTH.floor(size)))


def best_loss(small, large):
    """At which the larger size becomes cheaper."""
    low, high = TRUTH.floor(small) + 1e-6, 20.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if price(small, middle) > price(large, middle) else (low, middle)
    return high


def stage(number, done, noise, seed=0, h=0.0, validations=50):
    """Tokens, FLOPs and losses of a stage that has `done` tokens of its size behind it, to three times its best end."""
    size = SIZES[number]
    best = tokens_to(size, best_loss(size, SIZES[number + 1])) - done
    i = np.arange(1, 3 * validations)
    tokens = np.round(i * best / validations)
    losses = np.array([TRUTH.loss(size, done + t) for t in tokens]) + h * np.exp(-i / 4.5)
    return best, tokens, losses + noise * np.random.default_rng(seed).standard_normal(len(i))


def watched(number=0, begin=(0, 0.0), run_flops=1e30, trigger=TRIGGER, monitor=None):
    monitor = monitor or KappaMonitor(KappaConfig(**trigger))
    following = SIZES[number + 1]
    ahead = Ahead(following, 6.0 * following, None, run_flops)
    monitor.start_stage(StageSpan(number, SIZES[number], 0.95, *begin, ahead=ahead))
    return monitor


def growth(monitor, tokens, losses, number=0):
    """Tokens of the stage at which the monitor grows, and its decision; None where it does not."""
    span = monitor.state.span
    for t, loss in zip(tokens, losses, strict=True):
        decision = monitor.observe(int(span.tokens + t), span.flops + 6.0 * SIZES[number] * t, float(loss))
        if decision.grow:
            return t, decision
    return None


@pytest.mark.parametrize("seed", [0, 1])
def test_grows_where_the_next_size_becomes_cheaper(seed):
    """By a law that is right, on a first stage and, after a bump, on a second one: within 15% of the best FLOPs."""
    best, tokens, losses = stage(0, 0.0, noise=0.0005, seed=seed)
    monitor = watched()
    at, decision = growth(monitor, tokens, losses)
    assert decision.reason == "marginal"
    assert decision.view.gain_next >= decision.view.gain_now
    assert at == pytest.approx(best, rel=0.15)

    done = tokens_to(SIZES[1], TRUTH.loss(SIZES[0], at))  # what a second size from scratch would have behind it
    begin = (int(at), 6.0 * SIZES[0] * at)
    best, tokens, losses = stage(1, done, noise=0.0005, seed=seed, h=0.1)
    at, _ = growth(watched(1, begin, monitor=monitor), tokens, losses, 1)
    assert begin[1] + 6 * SIZES[1] * at == pytest.approx(begin[1] + 6 * SIZES[1] * best, rel=0.15)


def test_what_healing_costs_must_be_earned_before_the_run_ends():
    best, tokens, losses = stage(0, 0.0, noise=0.0005)
    spent = 6.0 * SIZES[0] * best
    assert growth(watched(run_flops=1.001 * spent), tokens[:60], losses[:60]) is None
    assert growth(watched(run_flops=10 * spent), tokens, losses) is not None


@pytest.mark.parametrize("left", [0.003, 0.01, 0.5, 5.0])
def test_at_the_end_in_tokens_either_size_has_seen_as_many(left):
    """Whether growing pays, by the law alone; `left`: tokens, over those so far."""
    at, size, following = 2e6, *SIZES[:2]
    tokens = np.linspace(0.02, 1.0, 50) * at
    fit = fit_curve(6.0 * size * tokens, np.array([TRUTH.loss(size, t) for t in tokens]), 0.0)
    path = path_of(fit, size, tokens, np.array([TRUTH.loss(size, t) for t in tokens]), 6.0 * size)
    ahead = Ahead(following, 6.0 * following, (1 + left) * at, None)
    found = returns(fit, [path], TRUTH, ahead, (int(at), 6.0 * size * at), 6.0 * size)
    healing = MIXING * at * size / following  # in tokens of the next size
    grown = tokens_to(following, TRUTH.loss(size, at)) + left * at - healing
    assert found.pays == (left * at > healing and TRUTH.loss(following, grown) < TRUTH.loss(size, (1 + left) * at))
    assert found.pays == (left > 0.007)


def test_a_law_is_corrected_by_the_stages_of_the_run():
    """The given one is wrong; two sizes say what size is worth."""
    given = TRUTH.model_copy(update={"A": 60.0, "B": 90.0})

    def path(size, skipped):
        tokens = np.linspace(0.1, 1.0, 16) * 4e6
        losses = [TRUTH.loss(size, skipped + t) for t in tokens]
        return StagePath(size, skipped == 0, tokens.tolist(), losses, [0.001] * 16, 0.0)

    both = [path(SIZES[0], 0.0), path(SIZES[1], 1.5e6)]
    errors = [abs(law.loss(SIZES[2], 2e7) - TRUTH.loss(SIZES[2], 2e7)) for law in (given, fit_run_law(both, given))]
    assert errors[0] > 0.3
    assert errors[1] < 0.1


def test_resume_is_bitwise():
    _, tokens, losses = stage(0, 0.0, noise=0.002)
    whole = watched()
    at, _ = growth(whole, tokens, losses)
    begin = (int(at), 6.0 * SIZES[0] * at)
    watched(1, begin, monitor=whole)
    done = tokens_to(SIZES[1], TRUTH.loss(SIZES[0], at))
    _, tokens, losses = stage(1, done, noise=0.002)
    growth(whole, tokens[:12], losses[:12], 1)
    after = KappaMonitor(KappaConfig(**TRIGGER))
    after.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert after.state == whole.state
    assert len(after.state.past) == 1
    more = [int(begin[0] + t) for t in tokens[12:16]]
    told = [
        [
            monitor.observe(t, begin[1] + 6.0 * SIZES[1] * (t - begin[0]), x)
            for t, x in zip(more, losses[12:], strict=False)
        ]
        for monitor in (whole, after)
    ]
    assert told[0] == told[1]
    assert told[0][-1].view.gain_next is not None


def test_without_a_next_size_nothing_is_decided():
    _, tokens, losses = stage(0, 0.0, noise=0.0005)
    monitor = watched()
    monitor.retarget(replace(monitor.state.span, ahead=None, last=True))
    assert growth(monitor, tokens[:80], losses[:80]) is None
