"""Point-to-point messages as NCCL may order them at worst: all of a rank's on one stream, one after the other, each
done only once its other end is; those of a group begin together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Message = tuple[str, int]  # "send" or "recv", and the other rank
Group = Counter[Message]

MOVES = {
    "SendActivation": ("send", 1),
    "RecvActivation": ("recv", -1),
    "SendGrad": ("send", -1),
    "RecvGrad": ("recv", 1),
}


def program(schedule: Iterable[Any], stage: int) -> list[Message]:
    """What a pipeline rank sends and receives by one of DeepSpeed's schedules, to and from which stage."""
    names = [type(command).__name__ for commands in schedule for command in commands]
    return [(kind, stage + step) for kind, step in (MOVES[name] for name in names if name in MOVES)]


def stuck(programs: Sequence[Sequence[Group]]) -> list[int]:
    """Ranks that never end: each goes through its groups in order, and leaves one when all of its messages have met."""
    at = [0] * len(programs)
    left = [Counter(groups[0]) if groups else Counter() for groups in programs]
    moved = True
    while moved:
        moved = False
        for rank in range(len(programs)):
            for (kind, other), count in list(left[rank].items()):
                back = ("recv" if kind == "send" else "send", rank)
                meet = min(count, left[other][back])
                if meet:
                    left[rank] -= Counter({(kind, other): meet})
                    left[other] -= Counter({back: meet})
                    moved = True
            while at[rank] < len(programs[rank]) and not left[rank]:
                at[rank] += 1
                left[rank] = Counter(programs[rank][at[rank]]) if at[rank] < len(programs[rank]) else Counter()
                moved = True
    return [rank for rank in range(len(programs)) if at[rank] < len(programs[rank])]
