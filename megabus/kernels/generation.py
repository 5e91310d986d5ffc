"""Which generation of NVIDIA's GPUs one is of: by its compute capability, as (major, minor)."""

from __future__ import annotations

import torch

AMPERE = (8, 0)  # the first with bf16, for which PyTorch's flash kernels are written


def older_than(oldest: tuple[int, int], device: torch.device) -> str | None:
    """What a GPU lacks, or None: for a line that says what it is needed for."""
    has = torch.cuda.get_device_capability(device)
    if has >= oldest:
        return None
    need, mine = (".".join(map(str, each)) for each in (oldest, has))
    return f"needs a GPU of compute capability {need} or newer, and {torch.cuda.get_device_name(device)} has {mine}"
