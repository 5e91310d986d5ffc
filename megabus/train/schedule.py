"""The learning rate as a pure function of the share of the budget that is spent."""

from __future__ import annotations

from math import cos, inf, log1p, pi

from megabus.config.after_growth import BoostConfig, RewarmConfig, SettleConfig
from megabus.config.schema import OptimizerConfig


def learning_rate(optim: OptimizerConfig, lr: float, share: float) -> float:
    """lr times the schedule's factor at `share` of the budget.

    constant; cosine and log from 1 to min_lr_ratio; wsd: 1, then to min_lr_ratio over the last decay_share.
    All start with a linear warm-up over warmup_share (0 for nGPT).
    """
    if share < optim.warmup_share:
        return lr * share / optim.warmup_share
    low = optim.min_lr_ratio
    if optim.schedule in ("cosine", "log"):
        way = (share - optim.warmup_share) / max(1.0 - optim.warmup_share, 1e-12)
        left = 0.5 * (1 + cos(pi * way)) if optim.schedule == "cosine" else log_decay(way, optim.decay_rho)
        return lr * (low + (1 - low) * left)
    if decays(optim, share):
        if optim.decay == "log":
            return lr * (low + (1 - low) * log_decay(1 - (1 - share) / optim.decay_share, optim.decay_rho))
        return lr * (low + (1 - low) * (1 - share) / optim.decay_share)
    return lr


def log_decay(way: float, rho: float) -> float:
    """1 - log(1 + way / rho) / log(1 + 1 / rho): from 1 at the beginning of a fall (way = 0) to 0 at its end (1).

    Steep at first, a long tail afterwards: on the sphere no growing weights do slow a constant rate down (Loshchilov &
    Ginsburg 2026, "Training nGPT", arXiv 2608.01284). The larger rho, the nearer to a line.
    """
    return 1 - log1p(way / rho) / log1p(1 / rho)


def decays(optim: OptimizerConfig, share: float) -> bool:
    """Whether wsd's decay has begun. No law of the loss holds there that κ could go by: only a cap grows.

    cosine and log fall all along. There the curve that κ goes by has the fall in it from the start, and no point of it
    is where another law begins: κ decides, as it would at a constant rate.
    """
    return optim.schedule == "wsd" and share > 1 - optim.decay_share


def boost_factor(boost: BoostConfig | None, tokens: float) -> float:
    """What the learning rate of added rows is multiplied by, `tokens` tokens after the growth that has added them:
    boost.factor at first, then linear to 1 over boost.tokens."""
    if boost is None or tokens >= boost.tokens:
        return 1.0
    return boost.factor + (1 - boost.factor) * tokens / boost.tokens


def rewarm_factor(rewarm: RewarmConfig | None, tokens: float) -> float:
    """What the learning rate of the whole model is multiplied by, `tokens` tokens after a growth: rewarm.share at
    first, then linear to 1 over rewarm.tokens."""
    if rewarm is None or tokens >= rewarm.tokens:
        return 1.0
    return rewarm.share + (1 - rewarm.share) * tokens / rewarm.tokens


def angle_bound(max_angle: float | None, settle: SettleConfig | None, tokens: float | None) -> float:
    """Radians that a row may turn by in a step, `tokens` tokens after the last growth (None: there was none).

    max_angle bounds all steps (None: nothing does). settle bounds those after a growth further: settle.max_angle at
    first, and its inverse falls linearly to that of max_angle, which is 0 where nothing bounds, over settle.tokens.
    """
    whole = inf if max_angle is None else max_angle
    if settle is None or tokens is None or tokens >= settle.tokens:
        return whole
    way = tokens / settle.tokens
    return 1 / ((1 - way) / settle.max_angle + way / whole)
