"""When one rank finds bad input, all of them stop, with its message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megabus.errors import UserError

T = TypeVar("T")


@contextmanager
def agreement(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block on every rank; if any raises `UserError`, all raise the lowest such rank's. Collective over `group`,
    which holds all ranks (None: the default group)."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine, group=group)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first


def raise_together(error: UserError | None, device: torch.device) -> None:
    """If any rank has an error, all ranks raise one. Collective; while none has, it costs one small all-reduce."""
    if any(on_any_rank([error is not None], device)):
        with agreement():
            if error is not None:
                raise error


def rank_0_tells(make: Callable[[], T]) -> T:
    """What `make` answers on rank 0, on every rank; its `UserError` is raised by all. Collective."""
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = make()
        except UserError as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag, or-ed over all ranks: one small all-reduce. Collective."""
    tensor = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]
