"""What a layer is worth: the loss of a trained model while one of its branches is silent.

A layer that growth has added can stay nearly as silent as it began, and nothing in the loss curve shows it
(docs/growth_log.md, "where new layers go").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megabus.model.decoder import Decoder, param_specs
from megabus.model.documents import Documents

BATCH = 8  # sequences at a time


class Branch(NamedTuple):
    """A branch of a layer, named after its gate. strength: the mean of |alpha| in nGPT, the root mean square of the
    write matrix in gpt. loss: of the model without the branch, in nats per token."""

    layer: int
    gate: str
    strength: float
    loss: float


@torch.no_grad()
def ablate(
    model: Decoder, inputs_BT: Tensor, targets_BT: Tensor, documents: Sequence[Documents] = ()
) -> tuple[float, list[Branch]]:
    """(the model's loss, every branch in the order of layers), over the tokens of (B, T) int64 inputs and targets.

    documents: of every `BATCH` rows, where they are kept apart.
    """
    specs, branches = param_specs(model.config), []
    whole = _loss(model, inputs_BT, targets_BT, documents)
    for name, parameter in model.named_parameters():
        spec = specs[name]
        if not spec.gate or spec.layer is None:
            continue
        kept = parameter.clone()
        strength = kept.square().mean().sqrt() if spec.is_matrix else (kept * spec.multiplier).abs().mean()
        try:
            parameter.zero_()
            loss = _loss(model, inputs_BT, targets_BT, documents)
        finally:
            parameter.copy_(kept)
        branches.append(Branch(spec.layer, spec.namesake, float(strength), loss))
    return whole, sorted(branches, key=lambda branch: branch.layer)


def _loss(model: Decoder, inputs_BT: Tensor, targets_BT: Tensor, documents: Sequence[Documents]) -> float:
    parts = inputs_BT.split(BATCH), targets_BT.split(BATCH)
    apart_or_not: Sequence[Documents | None] = documents or [None] * len(parts[0])
    losses = [
        model.loss(model.hidden(inputs, None, apart), targets, torch.sum)[0].double()
        for inputs, targets, apart in zip(*parts, apart_or_not, strict=True)
    ]
    return float(torch.stack(losses).sum() / targets_BT.numel())
