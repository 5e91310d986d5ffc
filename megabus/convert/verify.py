"""Compare two sources tensor by tensor, a block at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megabus.checkpoint.tensor_file import DTYPES
from megabus.convert.source import Source, blocks
from megabus.errors import UserError
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Placement


def verify(a: Source, b: Source, dtype: str = "float32", kinds: Sequence[Kind] | None = None) -> int:
    """Compare all tensors of `b`, which was made from `a` in `dtype`; their fp32 bytes. Raises `UserError` at the first
    bit that differs. kinds: the kinds of tensors that b must hold; those of a if left out."""
    if tuple(kinds or a.state.kinds) != b.state.kinds:
        raise UserError("--verify", ", ".join(b.state.kinds), "are not all tensors of the original", "convert it again")
    if b.state.model != a.state.model:
        raise UserError("--verify", b.state.model, f"the original is {a.state.model}", "convert it again")
    placement, total, stored = Placement(a.state.model, a.state.layout), 0, DTYPES[dtype][1]
    for kind in b.state.kinds:
        for name in placement.specs:
            numel = placement.numel(name)
            for start, stop in blocks(0, numel):
                left = a.read(kind, name, start, stop).to(stored).float().view(torch.int32)
                right = b.read(kind, name, start, stop).view(torch.int32)
                if not left.equal(right):
                    entry = start + int((left != right).nonzero()[0])
                    problem = f"{kind} differs from the original at entry {entry}"
                    raise UserError("--verify", name, problem, "convert it again, and look at the disk")
            total += 4 * numel
    return total
