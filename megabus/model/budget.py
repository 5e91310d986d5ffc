"""What a run has spent of its budget, and what its stages will spend of it: known without training."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from megabus.config import Stage
from megabus.config.schema import TrainConfig
from megabus.model.cost import flops_per_token


def spent_share(train: TrainConfig, step: float, tokens: float, flops: float) -> float:
    """The largest share of any budget that is used up; 1 ends the run."""
    pairs = ((step, train.max_steps), (tokens, train.max_tokens), (flops, train.max_flops))
    return min(1.0, max(used / budget for used, budget in pairs if budget))


@dataclass(frozen=True)
class Spent:
    """Steps, tokens and FLOPs since the run began; parts of a step too."""

    steps: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def share(self, train: TrainConfig) -> float:
        return spent_share(train, self.steps, self.tokens, self.flops)

    def tokens_to(self, train: TrainConfig, part: Stage, share: float) -> float:
        """Tokens that a stage in one of its phases takes from here to a share of the budget, which may be infinite."""
        cost = flops_per_token(part.model, part.seq_len)
        left = [share * train.max_tokens - self.tokens] if train.max_tokens else []
        left += [(share * train.max_flops - self.flops) / cost] if train.max_flops else []
        left += [(share * train.max_steps - self.steps) * part.tokens_per_step] if train.max_steps else []
        return max(0.0, min(left))

    def plus(self, part: Stage, tokens: float) -> Spent:
        """With tokens of a stage in one of its phases."""
        cost, steps = flops_per_token(part.model, part.seq_len), tokens / part.tokens_per_step
        return Spent(self.steps + steps, self.tokens + tokens, self.flops + tokens * cost)

    def after(
        self, train: TrainConfig, stage: Stage, tokens: float = inf, flops: float = inf, share: float = inf
    ) -> Spent:
        """With a stage, through its phases, until it has had so many tokens or FLOPs, or the run has spent such a share
        of its budget: whichever comes first. One of them must be finite."""
        now = self
        for part, end in stage.onward(self.share(train)):
            own = min(tokens, flops / flops_per_token(part.model, part.seq_len))
            taken = min(own, now.tokens_to(train, part, min(end, share)))
            before, now = now, now.plus(part, taken)
            tokens, flops = tokens - taken, flops - (now.flops - before.flops)
            if taken == own or share <= end:
                break
        return now


def mean_length(train: TrainConfig, stage: Stage) -> float:
    """Tokens of a sequence, over all tokens that the stage alone would get of the budget, through its phases."""
    now, seen = Spent(), 0.0
    for part, end in stage.onward():
        tokens = now.tokens_to(train, part, min(end, 1.0))
        now, seen = now.plus(part, tokens), seen + tokens * part.seq_len
    return seen / now.tokens if stage.phases else stage.seq_len
