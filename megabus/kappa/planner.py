"""Which sizes to grow through and when, before anything is trained: from a law of losses and what each size costs.

The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556) says what a model of N
parameters reaches with D tokens. A growth keeps the loss. What it gives is assumed here: **the grown model goes on as a
model of its size that has come to the same loss**, so its loss falls along its own law from where it equals the
smaller one's. docs/growth_log.md compares that with what happened.

From loss a to loss b a size N then takes F(N) (D(N, b) - D(N, a)) FLOPs, with F its FLOPs per token and D(N, L) the
tokens at which its law gives L. At each loss the best of some sizes is the one for which F dD/dL is least, so sizes and
the losses at which to grow follow from each other. Which sizes to take is searched.

The law is of finished runs, whose learning rate has decayed. Here it is read as a trajectory: a run that goes on has at
D tokens the loss of one that ends there. A run's own curve lies above that until its decay, and what a loss is reached
with at the end is what this predicts. For the same reason a run should end with its final size, which its learning rate
decays at: see `LAST_SHARE`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megabus.config.fractions import fraction_of
from megabus.config.schema import ModelConfig, OptimizerConfig, ScalingLaw
from megabus.model.cost import count_parameters, flops_per_token

STEPS = 60  # of a bisection: more than fp64 resolves
# Of a plan's FLOPs, that the final size gets at least: the share that wsd's decay takes when nothing else is given.
LAST_SHARE: float = OptimizerConfig.model_fields["decay_share"].default


@dataclass(frozen=True)
class Size:
    """A model under a law. Losses in nats per token."""

    model: ModelConfig
    seq_len: float  # a mean, where it changes
    law: ScalingLaw

    @cached_property
    def flops_per_token(self) -> float:
        return flops_per_token(self.model, self.seq_len)

    @cached_property
    def n_params(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def floor(self) -> float:
        """What it approaches with ever more tokens."""
        return self.law.floor(self.n_params)

    def loss(self, tokens: float) -> float:
        return self.law.loss(self.n_params, tokens) if tokens > 0 else math.inf

    def tokens(self, loss: float) -> float:
        """Tokens to reach a loss from scratch; infinity for one that it never reaches."""
        return self.law.tokens(self.n_params, loss)

    def flops(self, loss: float) -> float:
        return self.flops_per_token * self.tokens(loss)

    def price(self, loss: float) -> float:
        """FLOPs per nat at a loss: F |dD/dL|; infinity where it does not get."""
        fall = self.law.fall(self.n_params, loss)
        return self.flops(loss) / fall if fall > 0 else math.inf


@dataclass(frozen=True)
class PlannedStage:
    """A size, the losses between which it trains (the first starts at infinity), and what it takes for that."""

    model: ModelConfig
    start: float
    end: float
    tokens: float
    flops: float
    floor: float

    @property
    def way(self) -> float | None:
        """Share of the way to its floor, from where it starts, that it has gone when it ends; None for the first, which
        starts from no finite loss, and for one that starts below its floor.

        No kappa to configure: growth.trigger's is of the way to the loss predicted at the stage's cap, and from the
        loss that the run or the stage starts with.
        """
        if not self.floor < self.start < math.inf:
            return None
        return (self.start - self.end) / (self.start - self.floor)


@dataclass(frozen=True)
class GrowthPlan:
    """stages: in order; the last is of the final size, unless the plan was free to end before it (`reach_final`).
    loss: at the end, in nats per token. scratch_flops: what the final size takes alone to the same loss."""

    stages: list[PlannedStage]
    loss: float
    scratch_flops: float

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def saving(self) -> float:
        """Predicted S: scratch's FLOPs over all of the plan's, at equal loss."""
        return self.scratch_flops / self.flops


def plan_stages(sizes: Sequence[Size], loss: float, *, reach_final: bool = True) -> GrowthPlan:
    """The way from nothing to `loss` through all of `sizes`, which grow; each where the next becomes cheaper per nat.

    Sizes that are never the cheapest are left out. With few tokens the final size is one of these: then a smaller model
    is the better choice, and `reach_final=False` returns the plan that says so. With `reach_final` the final size gets
    `LAST_SHARE` of the plan's FLOPs or more: if it would get less, it begins at the loss at which it gets just that,
    and what the smaller sizes would have done from there on is dropped. No plan with such a last share is cheaper,
    since the FLOPs only rise from the free plan's loss to begin at upwards. It costs what the final size takes more for
    that last way than the others would, and never more than the final size from scratch, as whose `saving` is 1.

    Raises ValueError if the last never reaches the loss.
    """
    last = sizes[-1]
    if math.isinf(last.tokens(loss)):
        raise ValueError(f"the final size never gets below {last.floor:.3f}, and {loss:.3f} is asked for")
    kept, ends = _cheapest(sizes, loss)
    stages = _staged(kept, ends, loss)
    final = stages[-1].flops if not ends or ends[-1] > loss else 0.0  # what the last size gets
    if not reach_final or final >= LAST_SHARE * sum(stage.flops for stage in stages):
        return GrowthPlan(stages, loss, last.flops(loss))
    before, ends = _cheapest(sizes[:-1], loss)  # of the smaller ones, on the way to wherever the final one begins
    low, high = 0.0, last.tokens(loss)  # from scratch, to the loss that the final size begins with
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        begin = last.loss(middle)
        final = (last.tokens(loss) - middle) * last.flops_per_token
        smaller = sum(stage.flops for stage in _staged(before, ends, begin))
        if final >= LAST_SHARE * (smaller + final):
            low = middle
        else:
            high = middle
    begin, tokens = last.loss(low), last.tokens(loss) - low
    stages = _staged(before, ends, begin)
    stages.append(PlannedStage(last.model, begin, loss, tokens, tokens * last.flops_per_token, last.floor))
    return GrowthPlan(stages, loss, last.flops(loss))


def spend(sizes: Sequence[Size], flops: Sequence[float]) -> GrowthPlan:
    """A run whose sizes take so many FLOPs each, and what the law says of it. Its scratch_flops are infinite for a loss
    that the last size never reaches.

    A size that comes to a loss below its own floor gains nothing, and what it takes is lost.
    """
    stages, loss = [], math.inf
    for size, spent in zip(sizes, flops, strict=True):
        start, tokens = loss, spent / size.flops_per_token
        done = size.tokens(start) if math.isfinite(start) else 0.0
        if math.isfinite(done):
            loss = size.loss(done + tokens)
        stages.append(PlannedStage(size.model, start, loss, tokens, spent, size.floor))
    return GrowthPlan(stages, loss, sizes[-1].flops(loss))


def _cheapest(sizes: Sequence[Size], loss: float) -> tuple[list[Size], list[float]]:
    """The sizes that are the cheapest per nat somewhere above `loss`, and the losses at which each becomes the next."""
    kept: list[Size] = []
    ends: list[float] = []
    for size in sizes:
        while kept:
            end = _equal_price(kept[-1], size, loss)
            if not ends or end < ends[-1]:
                break
            kept.pop()  # by the time that it would begin, the next is cheaper already
            ends.pop()
        if kept:
            ends.append(_equal_price(kept[-1], size, loss))
        kept.append(size)
    return kept, ends


def _staged(kept: Sequence[Size], ends: Sequence[float], loss: float) -> list[PlannedStage]:
    """The stages of these sizes down to `loss`, each to its end, those that would begin below it left out."""
    stages, start = [], math.inf
    for size, planned in zip(kept, [*ends, loss], strict=True):
        end = max(planned, loss)
        if end >= start:
            continue
        tokens = size.tokens(end) - (size.tokens(start) if math.isfinite(start) else 0.0)
        stages.append(PlannedStage(size.model, start, end, tokens, tokens * size.flops_per_token, size.floor))
        start = end
    return stages


def _equal_price(small: Size, large: Size, lowest: float) -> float:
    """The loss at which the larger size becomes cheaper per nat; `lowest` if it does not before."""
    low = max(lowest, small.floor)
    if small.price(low) <= large.price(low):
        return lowest
    high = low + 1.0
    while small.price(high) > large.price(high):
        high += high - low
        if high - low > 1e6:
            return math.inf  # the larger one is cheaper from the start
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        if small.price(middle) > large.price(middle):
            low = middle
        else:
            high = middle
    return high


def plan_growth(
    final: ModelConfig,
    seq_len: float,
    tokens: float,
    law: ScalingLaw,
    max_stages: int,
    tp: int = 1,
    pp: int = 1,
    *,
    reach_final: bool = True,
) -> GrowthPlan:
    """The cheapest plan of at most `max_stages` sizes to the loss that `final` reaches alone with `tokens` tokens.

    Sizes are fractions of the final one (`fraction_of`), from a sixth up. With `reach_final` the final size always
    trains, at the cost that `plan_stages` names. Raises ValueError where tokens, by the law, no longer change the loss.
    """
    last = Size(final, seq_len, law)
    loss = last.loss(tokens)
    models: dict[ModelConfig, None] = {}
    for twelfths in range(2, 12):
        model = fraction_of(final, twelfths / 12, tp, pp)
        if model != final:
            models[model] = None
    smaller = [Size(model, seq_len, law) for model in models]
    best = plan_stages([last], loss)
    for count in range(1, max_stages):
        for chosen in itertools.combinations(smaller, count):
            plan = plan_stages([*chosen, last], loss, reach_final=reach_final)
            if plan.flops < best.flops:
                best = plan
    return best
