"""`growth: auto`: how to grow when nothing is said about it. `model` is then the size to end with.

It is written out before anything else sees it: a run, its saved configuration and its checkpoints know plain stages
only. docs/growth_results.md says what of it has been measured.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from megabus.config.schema import RunConfig, TrainConfig

AUTO = "auto"
ENDS = (0.10, 0.25, 0.40)  # of the run's FLOPs: where the last three doublings come


def depths(n_layers: int, pp: int = 1) -> list[int]:
    """Numbers of layers to grow through: halves, quarters and eighths of the last, none below `pp`."""
    found = [n_layers]
    while len(found) <= len(ENDS) and found[0] > 1 and -(-found[0] // 2) >= pp:
        found.insert(0, -(-found[0] // 2))
    return found


def written_out(config: RunConfig) -> dict[str, Any]:
    """What `growth: auto` means for a run of this final size, layout and budget: its `model` and `growth` sections.

    Depth is doubled up to three times, and the width is there from the start. A model of one layer, or of no more than
    `layout.pp`, does not grow.
    """
    final, sizes = config.model, depths(config.model.n_layers, config.layout.pp)
    caps = _caps(config.train, sizes)
    stages = [{"n_layers": layers} | cap for layers, cap in zip(sizes[1:], [*caps[1:], {}], strict=False)]
    # What was measured, beside the defaults: the pile of layers again, and growths by the caps alone.
    growth: dict[str, Any] = {"depth": "stack", "trigger": {"kappa": 1.0}, "stages": stages}
    return {
        "model": final.model_dump(exclude_unset=True) | {"n_layers": sizes[0]},
        "growth": growth | (caps[0] if caps else {}),
    }


def _mean_step(train: TrainConfig) -> float:
    """Tokens of a step, over all of the steps."""
    share, batch, length, mean = 0.0, train.global_batch_size, train.seq_len, 0.0
    for phase in train.phases:
        mean, share = mean + (phase.share - share) * batch * length, phase.share
        batch, length = phase.global_batch_size or batch, phase.seq_len or length
    return mean + (1 - share) * batch * length


def _caps(train: TrainConfig, sizes: list[int]) -> list[dict[str, float]]:
    """The caps of all stages but the last, one for each budget of the run. In budgets of tokens, a token is taken to
    cost as much as there are layers."""
    n = len(sizes) - 1
    if n == 0:
        return []
    flops = [after - before for before, after in pairwise((0.0, *ENDS[len(ENDS) - n :], 1.0))]
    tokens = [share / layers for share, layers in zip(flops, sizes, strict=True)]
    steps = train.max_steps * _mean_step(train) if train.max_steps else math.inf
    total = min(train.max_tokens or math.inf, steps)
    caps: list[dict[str, float]] = []
    for share, part in zip(flops[:n], tokens[:n], strict=True):
        # 12 digits: what is written out shows no rounding of a product.
        cap = {"max_flops": float(f"{share * train.max_flops:.12g}")} if train.max_flops else {}
        caps.append(cap | ({} if math.isinf(total) else {"max_tokens": max(1, int(part / sum(tokens) * total))}))
    return caps
