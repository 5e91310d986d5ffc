"""Tensors that are cuts of one tensor, side by side in memory: what was made as one can be taken as one again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The view that `parts` are cuts of along `dim`, in their order; None where they lie anywhere else."""
    first, length = parts[0], 0
    step, start, storage = first.stride(dim), first.storage_offset(), first.untyped_storage()._cdata
    for part in parts:
        there = part.untyped_storage()._cdata == storage and part.storage_offset() == start + length * step
        if (
            not there
            or part.dtype != first.dtype
            or part.stride() != first.stride()
            or _rest(part, dim) != _rest(first, dim)
        ):
            return None
        length += part.shape[dim]
    shape = list(first.shape)
    shape[dim] = length
    return first.as_strided(shape, first.stride(), start)


def _rest(x: Tensor, dim: int) -> list[int]:
    """Its lengths along all other axes."""
    shape = list(x.shape)
    del shape[dim]
    return shape
