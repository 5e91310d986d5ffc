"""What stages take of a run's budget, by the configuration alone. `train/horizon.py` counts the same in whole steps."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from megabus.config import Stage
from megabus.config.schema import TrainConfig
from megabus.model.cost import flops_per_token


@dataclass(frozen=True)
class Spent:
    """Steps, tokens and FLOPs since the run began."""

    steps: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def after(self, stage: Stage, tokens: float) -> Spent:
        """With so many tokens of a stage added."""
        cost = flops_per_token(stage.model, stage.seq_len)
        steps = tokens / stage.tokens_per_step
        return Spent(self.steps + steps, self.tokens + tokens, self.flops + tokens * cost)

    def left(self, train: TrainConfig, stage: Stage) -> float:
        """Tokens of a stage that are left until the first of the run's budgets is spent; below 0 past it."""
        tokens = (train.max_tokens or inf) - self.tokens
        steps = (train.max_steps or inf) - self.steps
        flops = (train.max_flops or inf) - self.flops
        return min(tokens, steps * stage.tokens_per_step, flops / flops_per_token(stage.model, stage.seq_len))


def cap_tokens(stage: Stage) -> float | None:
    """Tokens after which the first of the stage's caps is reached; None where it has none."""
    cost = flops_per_token(stage.model, stage.seq_len)
    caps = [stage.max_tokens, None if stage.max_flops is None else stage.max_flops / cost]
    return min((cap for cap in caps if cap is not None), default=None)
