"""Entries that no save writes: a weight or moment that is not finite, a mean of squares below zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megabus.checkpoint.manifest import DamagedError, Heartbeat, idle
from megabus.parallel.fragments import Kind

BLOCK = 1 << 22  # entries looked at once


def odd_entry(kind: Kind, values: Tensor) -> str | None:
    """What a tensor of this kind holds that it cannot hold, if it does. values: not empty."""
    low, high = (bound.item() for bound in values.aminmax())  # NaN where there is one
    if math.isnan(low):
        return "NaN"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "an infinity"
    return f"{low:g}, and a mean of squares is 0 or more" if kind == "exp_avg_sq" and low < 0 else None


def check_entries(path: Path, tensors: Mapping[str, tuple[Kind, int]], heartbeat: Heartbeat = idle) -> None:
    """Raise `DamagedError` where one of a shard's 1-D tensors, key -> (kind, entries), holds such an entry."""
    with safe_open(path, framework="pt") as file:
        for key, (kind, numel) in tensors.items():
            values = file.get_slice(key)
            for start in range(0, numel, BLOCK):
                odd = odd_entry(kind, values[start : min(start + BLOCK, numel)])
                if odd is not None:
                    raise DamagedError(path, f"is damaged ({key} holds {odd})")
                heartbeat()
