"""When one rank finds bad input, all of them stop, with its message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megabus.errors import UserError, say
from megabus.upload import upload

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """Another rank failed; its own log has the traceback."""


def _other(error: Exception) -> OtherRankError:
    return OtherRankError(f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}")


@contextmanager
def agreement(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block on every rank; if any raises `UserError`, all raise the lowest such rank's. Collective over `group`,
    which holds all ranks (None: the default group).

    Any other exception is raised as it is where it happened, and as an `OtherRankError` elsewhere.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    sent = mine if mine is None or isinstance(mine, UserError) else _other(mine)
    errors: list[UserError | OtherRankError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, sent, group=group)
    if mine is not None and not isinstance(mine, UserError):
        raise mine
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
    mine: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message[0] = make()
        except Exception as error:
            mine = error
            message[1] = error if isinstance(error, UserError) else _other(error)
    dist.broadcast_object_list(message, src=0)
    if mine is not None:
        raise mine
    if message[1] is not None:
        raise message[1]
    return message[0]


def rank_0_says(text: str, how: Callable[[str], None] = say) -> None:
    """Tell it once: by `say`, or as `warn` does."""
    if dist.get_rank() == 0:
        how(text)


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag, or-ed over all ranks: one small all-reduce. Collective."""
    tensor = upload(flags, device, torch.uint8)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]
