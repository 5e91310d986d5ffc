"""Where a snapshot lies: in memory that is kept. A GPU's tensors are copied into pinned memory, and waited for once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megabus.errors import UserError, warn
from megabus.parallel.fragments import Fragments

ALIGNMENT = 256  # bytes between which tensors begin
CHUNK = 64 << 20  # bytes; larger tensors get chunks of their own. PyTorch pins powers of two, whatever is asked for


class HostMemory:
    """Memory of the CPU for one snapshot at a time; `copies` of the next one may lie where those of the last did.

    Pinned memory takes copies from a GPU while others are on their way, and at the full speed of the link; into any
    other each would be waited for by itself. Pinning takes longer than copying, and so does fresh memory where tensors
    lie on the CPU. So it is kept, in chunks: a larger snapshot needs some more of them, and those that it has no use
    for are given up first.
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._pins = True

    def copies(self, live: Fragments) -> Fragments:
        """Of all tensors, on the CPU and nobody else's. Raises `UserError` as `reserve`, which a rank calls before with
        the others: after that there is nothing to ask for."""
        self._pins = self._pins and not _on_cpu(live)
        copied = self._copied(live)
        if not _on_cpu(live):
            get_accelerator().synchronize()
        return copied

    def reserve(self, live: Fragments) -> None:
        """Memory for copies of tensors like these. Raises `UserError` where there is none. What cannot be pinned is
        pageable from then on, and told."""
        self._pins = self._pins and not _on_cpu(live)
        self._places([values.nbytes for values in _tensors(live)])

    def _copied(self, live: Fragments) -> Fragments:
        places = iter(self._places([values.nbytes for values in _tensors(live)]))
        copies = Fragments()
        for piece, kinds in live.items():
            copies[piece] = {}
            for kind, values in kinds.items():
                there = next(places).view(values.dtype).view(values.shape)
                copies[piece][kind] = there.copy_(values, non_blocking=True)
        return copies

    def _places(self, sizes: Sequence[int]) -> list[Tensor]:
        """Memory for tensors of so many bytes each. The largest are placed first, each where it first fits."""
        room = [len(chunk) for chunk in self._chunks]
        filled = [0] * len(room)
        at: dict[int, tuple[int, int]] = {}
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            size = max(1, -(-sizes[number] // ALIGNMENT)) * ALIGNMENT
            chunk = next((i for i, most in enumerate(room) if filled[i] + size <= most), len(room))
            if chunk == len(room):
                room.append(max(CHUNK, 1 << (size - 1).bit_length()))
                filled.append(0)
            at[number] = chunk, filled[chunk]
            filled[chunk] += size
        # What is not needed goes before more is asked for.
        chunks = {i: chunk for i, chunk in enumerate(self._chunks) if filled[i]}
        self._chunks = list(chunks.values())
        for i, size in enumerate(room):
            if filled[i] and i not in chunks:
                chunks[i] = self._memory(size)
                self._chunks.append(chunks[i])
        return [chunks[at[i][0]][at[i][1] : at[i][1] + size] for i, size in enumerate(sizes)]

    def _memory(self, size: int) -> Tensor:
        try:
            if self._pins:
                try:
                    return _pinned(size)
                except RuntimeError as error:
                    self._pins = False
                    warn(f"no memory could be pinned for snapshots ({_first_line(error)}): they take longer")
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            problem = f"there is no main memory for a snapshot's next {size:,} bytes ({_first_line(error)})"
            remedy = "use machines with more memory, or more ranks"
            raise UserError("checkpoint", "snapshot", problem, remedy) from error


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]


def _on_cpu(live: Fragments) -> bool:
    return all(values.device.type == "cpu" for values in _tensors(live))


def _tensors(live: Fragments) -> list[Tensor]:
    return [values for kinds in live.values() for values in kinds.values()]
