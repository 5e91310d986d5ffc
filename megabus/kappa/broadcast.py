"""Rank 0 decides about growth, and all ranks hear of it in one tensor of three int64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist

from megabus.config.reasons import Reason
from megabus.upload import upload

_REASONS: tuple[Reason | None, ...] = (None, *get_args(Reason))


@dataclass(frozen=True)
class GrowthSignal:
    """Grow (or stay) at this step's end; `stage` is the stage to be in afterwards."""

    grow: bool
    reason: Reason | None
    stage: int


def broadcast_decision(signal: GrowthSignal | None, device: torch.device | str = "cpu") -> GrowthSignal:
    """Rank 0's signal, on every rank. Collective.

    Only rank 0 needs a signal; the others' are ignored. `device` is the accelerator under NCCL. Raises ValueError where
    rank 0 has none.
    """
    fields = [0, 0, 0]
    if dist.get_rank() == 0:
        if signal is None:
            raise ValueError("rank 0, which decides, must pass a GrowthSignal")
        fields = [int(signal.grow), _REASONS.index(signal.reason), signal.stage]
    message = upload(fields, torch.device(device), torch.int64)
    dist.broadcast(message, src=0)
    grow, reason, stage = message.tolist()
    return GrowthSignal(bool(grow), _REASONS[reason], stage)
