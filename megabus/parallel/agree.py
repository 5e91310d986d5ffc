"""When one rank finds bad input, all of them stop, with its message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
