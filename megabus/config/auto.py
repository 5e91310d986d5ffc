"""`growth: auto`: how to grow when nothing is said about it. `model` is then the size to end with.

It is written out before anything else sees it: a run, its saved configuration and its checkpoints know plain stages
only. docs/growth_log.md says what of it has been measured.
"""

from __future__ import annotations

import math
from typing import Any

from megabus.config.fractions import fraction_of
from megabus.config.pair import sizes_of
from megabus.config.schema import ModelConfig, RunConfig, TrainConfig

AUTO = "auto"
# Of the final size, and the most that the stage may take of the run's FLOPs and of its tokens. The last takes the rest.
SIZES_OF_AUTO = ((1 / 2, 0.05, 0.19), (3 / 4, 0.15, 0.20))
HOW = {"write": "tilt", "read": "tilt", "channels": "even", "depth": "append", "moments": "grow"}
TRIGGER = {"kappa": 0.95, "predictor": "fit"}


def written_out(config: RunConfig) -> dict[str, Any]:
    """What `growth: auto` means for a run of this final size, layout and budget: its `model` and `growth` sections.

    A size equal to the next one is left out, so a model of one layer and few channels may not grow at all.
    """
    final, layout = config.model, config.layout
    models: list[ModelConfig] = []
    caps: list[dict[str, float]] = []
    for fraction, flops, tokens in SIZES_OF_AUTO:
        model = fraction_of(final, fraction, layout.tp, layout.pp)
        if model == final:
            continue
        if model in models:  # not left out: that is the one before
            del models[-1], caps[-1]
        models.append(model)
        caps.append(_cap(config.train, flops, tokens))
    models.append(final)
    stages = [sizes_of(model) | cap for model, cap in zip(models[1:], [*caps[1:], {}], strict=True)] if caps else []
    growth: dict[str, Any] = {**HOW, "trigger": dict(TRIGGER), "stages": stages}
    return {
        "model": final.model_dump(exclude_unset=True) | sizes_of(models[0]),
        "growth": growth | (caps[0] if caps else {}),
    }


def _cap(train: TrainConfig, flops: float, tokens: float) -> dict[str, float]:
    """A stage's caps, one for each budget of the run."""
    cap: dict[str, float] = {"max_flops": flops * train.max_flops} if train.max_flops else {}
    steps = train.max_steps * train.global_batch_size * train.seq_len if train.max_steps else math.inf
    total = min(train.max_tokens or math.inf, steps)
    return cap | ({} if math.isinf(total) else {"max_tokens": max(1, int(tokens * total))})
