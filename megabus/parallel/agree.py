"""When one rank finds bad input, all of them stop, with its message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megabus.errors import UserError


@contextmanager
def agreement() -> Iterator[None]:
    """Run a block on every rank; if any raises `UserError`, all raise the lowest such rank's. Collective."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first


def raise_together(error: UserError | None, device: torch.device) -> None:
    """If any rank has an error, all ranks raise one. Collective; while none has, it costs one small all-reduce."""
    failed = torch.tensor(int(error is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed:
        with agreement():
            if error is not None:
                raise error
