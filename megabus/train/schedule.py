"""The learning rate as a pure function of the share of the budget that is spent."""

from __future__ import annotations

from math import cos, pi

from megabus.config.schema import BoostConfig, OptimizerConfig, TrainConfig


def spent_share(train: TrainConfig, step: float, tokens: float, flops: float) -> float:
    """The largest share of any budget that is used up; 1 ends the run."""
    pairs = ((step, train.max_steps), (tokens, train.max_tokens), (flops, train.max_flops))
    return min(1.0, max(used / budget for used, budget in pairs if budget))


def learning_rate(optim: OptimizerConfig, lr: float, share: float) -> float:
    """lr times the schedule's factor at `share` of the budget.

    constant; cosine from 1 to min_lr_ratio; wsd: 1, then linear to min_lr_ratio over the last decay_share.
    All start with a linear warm-up over warmup_share (0 for nGPT).
    """
    if share < optim.warmup_share:
        return lr * share / optim.warmup_share
    low = optim.min_lr_ratio
    if optim.schedule == "cosine":
        way = (share - optim.warmup_share) / max(1.0 - optim.warmup_share, 1e-12)
        return lr * (low + (1 - low) * 0.5 * (1 + cos(pi * way)))
    if decays(optim, share):
        return lr * (low + (1 - low) * (1 - share) / optim.decay_share)
    return lr


def decays(optim: OptimizerConfig, share: float) -> bool:
    """Whether wsd's decay has begun. No law of the loss holds there that κ could go by: only a cap grows."""
    return optim.schedule == "wsd" and share > 1 - optim.decay_share


def boost_factor(boost: BoostConfig | None, tokens: float) -> float:
    """What the learning rate of added rows is multiplied by, `tokens` tokens after the growth that has added them:
    boost.factor at first, then linear to 1 over boost.tokens."""
    if boost is None or tokens >= boost.tokens:
        return 1.0
    return boost.factor + (1 - boost.factor) * tokens / boost.tokens
