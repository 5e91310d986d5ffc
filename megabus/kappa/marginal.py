"""Growing by marginal return: when a FLOP gives more at the next size than at the present one.

What the next size would do is a law's word, L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv
2203.15556), fitted to the stages of this run. As in `planner`, a grown model goes on as a model of its size that has
come to the same loss. Let a run take C1(L) FLOPs to the loss L at the present size, M to heal, and C2 at the next one:
C1(L) + M + C2(end) - C2(L) is least where dC1/dL = dC2/dL, whatever M is. So the instant is where the slopes are equal,
and healing decides whether to grow at all: over what is left of the run, the next size must come lower than the present
one in spite of it. All of this is of runs that FLOPs end. Where tokens or steps do, FLOPs cost nothing, and a larger
size is better per token at any time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabus.config.schema import ScalingLaw
from megabus.kappa.curve_fit import CurveFit

# How far this run's E, log A, log B, alpha and beta may lie from those of `growth.trigger.scaling_law` (std). One size
# tells little of A and alpha, so until a second one has been trained it is the given law that says what size is worth.
PRIOR_STD = np.array([0.2, 1.0, 1.5, 0.03, 0.03])
LAW_STD = 0.001  # nats by which a stage's own curve lies beside the law, whatever its noise
MIXING = 0.05  # FLOPs that healing takes, of the run's so far: before any growth of this run has been seen to heal
GROUPS = 16  # of a stage's validations, of which the medians count
STEPS = 60  # of Levenberg and Marquardt's method, at most
SMALL = 1e-4  # fall of the sum of squares, each over its variance: the last step's
LEAST = 1e-9  # nats above a floor
MANY = math.exp(300.0)  # tokens, at most: more than any run has


@dataclass(frozen=True)
class StagePath:
    """What a stage has shown once it had healed: medians of neighbouring validations, losses with their std at tokens
    since its begin.

    scratch: whether it began with nothing, so that these are all of its tokens. mixing: FLOPs that healing took.
    """

    n_params: int
    scratch: bool
    tokens: list[float]
    losses: list[float]
    std: list[float]
    mixing: float

    def wrongs(self) -> dict[str, bool]:
        """Whether each value is out of range: what no stage has shown."""
        return {
            "n_params": not 0 < self.n_params < 2**63,
            "tokens": not self.tokens or min(self.tokens) <= 0 or self.tokens != sorted(self.tokens),
            "losses": len(self.losses) != len(self.tokens) or min(self.losses, default=0.0) < 0,
            "std": len(self.std) != len(self.tokens) or min(self.std) <= 0,
            "mixing": self.mixing < 0,
        }


@dataclass(frozen=True)
class Ahead:
    """The next size, and where the run ends: in tokens and FLOPs, the earlier of the two; None = no such budget."""

    n_params: int
    flops_per_token: float
    run_tokens: float | None
    run_flops: float | None

    def wrongs(self) -> dict[str, bool]:
        """Whether each value is out of range."""
        return {
            "n_params": not 0 < self.n_params < 2**63,
            "flops_per_token": self.flops_per_token <= 0,
            "run_tokens": self.run_tokens is not None and self.run_tokens < 0,
            "run_flops": self.run_flops is not None and self.run_flops <= 0,
        }


@dataclass(frozen=True)
class Returns:
    """Nats per FLOP at the present size and at the next one; pays: whether the next one makes up for healing before
    the run ends."""

    now: float
    now_std: float
    following: float
    pays: bool

    def grow(self, max_std: float) -> bool:
        return self.pays and self.following >= self.now > 0 and self.now_std <= max_std * self.now


def path_of(fit: CurveFit, n_params: int, tokens: np.ndarray, losses: np.ndarray, flops_per_token: float) -> StagePath:
    """What a stage has shown, of its validations (n,) at `tokens` since its begin; `fit`: the fit of these."""
    mixing = min(fit.mixing(), 0.5 * float(tokens[-1]) * flops_per_token)
    healed = tokens * flops_per_token >= mixing
    groups = np.array_split(np.arange(len(tokens))[healed], min(GROUPS, int(np.count_nonzero(healed))))
    std = [math.hypot(1.25 * fit.noise / math.sqrt(len(group)), LAW_STD) for group in groups]  # 1.25: of a median
    at, seen = ([float(np.median(values[group])) for group in groups] for values in (tokens, losses))
    return StagePath(n_params, fit.begin == 0, at, seen, std, mixing)


def fit_run_law(paths: Sequence[StagePath], given: ScalingLaw) -> ScalingLaw:
    """The law that is likeliest after these stages of a run, `given` what was believed before (`PRIOR_STD`).

    A stage from scratch has its tokens. A grown one goes on as if it had come from scratch with more, and with how many
    is fitted too.
    """
    coefficients = np.array([given.E, math.log(given.A), math.log(given.B), given.alpha, given.beta])
    grown = [path for path in paths if not path.scratch]
    before = [math.log(_tokens(given, path.n_params, path.losses[0])) for path in grown]
    theta, width = np.array([*coefficients, *before]), np.array([*PRIOR_STD, *[1.0] * len(grown)])

    def residuals(theta: np.ndarray) -> np.ndarray:
        law, parts = _law(theta), [(theta[:5] - coefficients) / PRIOR_STD]
        skipped = iter(np.exp(np.clip(theta[5:], 0.0, 300.0)))
        for path in paths:
            tokens = np.array(path.tokens) + (0.0 if path.scratch else next(skipped))
            said = law.floor(path.n_params) + law.B * tokens**-law.beta
            parts.append((said - path.losses) / path.std)
        return np.concatenate(parts)

    damping, r = 1.0, residuals(theta)
    for _ in range(STEPS):
        moves = np.diag(1e-5 * width)
        jacobian = np.stack([(residuals(theta + move) - r) / move.sum() for move in moves], axis=1)
        normal = jacobian.T @ jacobian
        damped = normal + damping * np.diag(np.diag(normal)) + 1e-12 * np.diag(width**-2)
        step = np.clip(np.linalg.solve(damped, -jacobian.T @ r), -width, width)
        found = residuals(theta + step)
        fall = float(r @ r - found @ found)
        if fall > 0:
            theta, r, damping = theta + step, found, damping / 5
        else:
            damping = min(damping * 5, 1e12)
        if abs(fall) <= SMALL:
            break
    return _law(theta)


def _law(theta: np.ndarray) -> ScalingLaw:
    E, log_a, log_b, alpha, beta = theta[:5].tolist()
    A, B = math.exp(min(log_a, 50.0)), math.exp(min(log_b, 50.0))
    return ScalingLaw(E=max(E, LEAST), A=A, B=B, alpha=max(alpha, 0.01), beta=max(beta, 0.01))


def _tokens(law: ScalingLaw, n_params: int, loss: float) -> float:
    """Tokens at which the law has a loss; of one below its floor, those of a loss just above."""
    return min(law.tokens(n_params, max(loss, law.floor(n_params) + LEAST)), MANY)


def returns(
    fit: CurveFit,
    paths: Sequence[StagePath],
    given: ScalingLaw,
    ahead: Ahead,
    at: tuple[int, float],
    flops_per_token: float,
) -> Returns:
    """Both returns at these run totals `at` of (tokens, FLOPs). paths: all stages so far, the present one last, whose
    tokens cost `flops_per_token`."""
    tokens, flops = at
    law = fit_run_law(paths, given)
    loss = fit.healed(flops)
    now, std = fit.slope(flops)
    fall = law.fall(ahead.n_params, loss)
    if fall <= 0:
        return Returns(now, std, 0.0, False)
    reached = _tokens(law, ahead.n_params, loss)
    following = fall / (reached * ahead.flops_per_token)
    measured = [path.mixing for path in paths if not path.scratch]
    mixing = max(measured) if measured else MIXING * flops
    flops_left = math.inf if ahead.run_flops is None else ahead.run_flops - flops
    tokens_left = math.inf if ahead.run_tokens is None else ahead.run_tokens - tokens
    stays, grows = (min(flops_left, tokens_left * each) for each in (flops_per_token, ahead.flops_per_token))
    if math.isinf(grows):
        return Returns(now, std, following, True)
    after = reached + max(grows - mixing, 0.0) / ahead.flops_per_token
    grown = law.loss(ahead.n_params, after)
    return Returns(now, std, following, grows > mixing and grown < fit.healed(flops + stays))
