"""What is known before training of stages that κ will hardly end, or never."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megabus.config import Stage
from megabus.config.schema import KappaConfig
from megabus.config.stages import stage_section
from megabus.errors import UserError
from megabus.kappa.predictors import CurvePoint, StageSpan, make_predictor
from megabus.model.cost import count_parameters, flops_per_token


def outlook(stages: Sequence[Stage], trigger: KappaConfig) -> list[str]:
    """Lines to tell. Raises `UserError` for a stage that neither κ nor a cap can ever end.

    A predicted loss that is no less than a guess among all tokens has (log of the vocabulary, in nats) leaves nothing
    to gain. A law without the stage's end says what it comes to in infinite time, of which κ is seldom achieved.
    """
    messages = []
    for stage in stages[:-1]:
        capped = stage.max_tokens is not None or stage.max_flops is not None
        section = stage_section(stage.index, "growth")
        if trigger.rule == "kappa" and trigger.predictor != "fit":
            guess, mp = math.log(stage.model.vocab_size), _predicted(stage, trigger)
            if mp is None or mp < guess:
                continue
            key, problem = (
                f"growth.trigger.{trigger.predictor}",
                f"is no less than a guess has, {guess:.4f}: κ never ends",
            )
            if not capped:
                remedy = f"correct what it is given, use predictor fit, or set {section}.max_tokens"
                raise UserError(key, f"{mp:.4f} for stage {stage.index}", f"{problem} it, and it has no cap", remedy)
            messages.append(f"{key} = {mp:.4f} for stage {stage.index} {problem} it, its cap does")
        elif not capped:
            why = "without one fit predicts what its losses come to in infinite time, and κ is seldom reached"
            if trigger.rule == "marginal":
                why = "without one nothing ends it where the next size never becomes worth more"
            messages.append(f"{section}.max_tokens = (missing): {why}; set it, or max_flops")
    return messages


def _predicted(stage: Stage, trigger: KappaConfig) -> float | None:
    """mp, of predictors that look at no losses."""
    per_token = flops_per_token(stage.model, stage.seq_len)
    caps = (stage.max_tokens, stage.max_flops)
    span = StageSpan(stage.index, count_parameters(stage.model), stage.kappa, 0, 0.0, *caps)
    prediction = make_predictor(trigger)(span, [CurvePoint(1, per_token, 0.0)])  # FLOPs per token, and no loss yet
    return None if prediction is None else prediction.loss
