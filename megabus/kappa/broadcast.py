"""One rank decides, all ranks agree: the growth decision as one tensor of four int64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megabus.kappa.monitor import Reason

_REASONS: tuple[Reason | None, ...] = (None, "kappa", "cap")


@dataclass(frozen=True)
class GrowthSignal:
    """Grow (or stay) at the boundary after `step`; `stage` is the stage to be in afterwards."""

    grow: bool
    reason: Reason | None
    stage: int
    step: int


def broadcast_decision(
    signal: GrowthSignal | None,
    group: dist.ProcessGroup | None = None,
    src: int = 0,
    device: torch.device | str = "cpu",
) -> GrowthSignal:
    """The signal of global rank `src`, on every rank of `group` (None: all). A collective: all must call.

    Only `src` needs a signal; the others' are ignored. `device` is the accelerator's under NCCL. Without an
    initialised process group the answer is the caller's own signal. Raises ValueError where `src` has none.
    """
    distributed = dist.is_available() and dist.is_initialized()
    fields = [0, 0, 0, 0]
    if not distributed or dist.get_rank() == src:
        if signal is None:
            raise ValueError("the rank that decides must pass a GrowthSignal")
        if not distributed:
            return signal
        fields = [int(signal.grow), _REASONS.index(signal.reason), signal.stage, signal.step]
    message = torch.tensor(fields, dtype=torch.int64, device=device)
    dist.broadcast(message, src=src, group=group)
    grow, reason, stage, step = message.tolist()
    return GrowthSignal(bool(grow), _REASONS[reason], stage, step)
