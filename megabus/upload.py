"""Values of the CPU on a GPU, without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(
    values: Tensor | np.ndarray | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The values on `device`, in their own dtype where none is given; as they are, not copied, where they lie there.

    Through pinned memory: a copy from any other waits until the GPU has finished all that is queued.
    """
    there = torch.as_tensor(values, dtype=dtype)
    if there.device.type == device.type:
        return there
    return there.pin_memory().to(device, non_blocking=True)
