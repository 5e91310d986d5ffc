"""Where a snapshot lies: tensors of a GPU are copied into one pinned buffer, and waited for once."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megabus.parallel.fragments import Fragments

ALIGNMENT = 256  # bytes between which tensors begin


class HostMemory:
    """Memory of the CPU for one snapshot at a time; `copies` of the next one may lie where those of the last did.

    Pinned memory takes copies from a GPU while others are on their way, and at the full speed of the link; into any
    other each would be waited for by itself. Pinning takes longer than copying, so the buffer is kept. Where tensors
    lie on the CPU each copy has memory of its own, which is free again with the snapshot.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copies(self, live: Fragments) -> Fragments:
        """Of all tensors, on the CPU and nobody else's."""
        tensors = [values for kinds in live.values() for values in kinds.values()]
        if all(values.device.type == "cpu" for values in tensors):
            return {
                piece: {kind: values.to("cpu", copy=True) for kind, values in kinds.items()}
                for piece, kinds in live.items()
            }
        self._reserve(sum(_room(values) for values in tensors))
        start, copies = 0, Fragments()
        for piece, kinds in live.items():
            copies[piece] = {}
            for kind, values in kinds.items():
                there = self._buffer[start : start + values.nbytes].view(values.dtype).view(values.shape)
                copies[piece][kind] = there.copy_(values, non_blocking=True)
                start += _room(values)
        get_accelerator().synchronize()
        return copies

    def _reserve(self, size: int) -> None:
        if len(self._buffer) < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # before the larger one is there
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _room(values: Tensor) -> int:
    return -(-values.nbytes // ALIGNMENT) * ALIGNMENT
