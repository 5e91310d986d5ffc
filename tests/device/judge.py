"""What is wrong with what a case was seen to ask for. The suite judges some cases, `python -m tests.device` all."""

from __future__ import annotations

from collections.abc import Iterable

from deepspeed.runtime.pipe.schedule import TrainSchedule

from tests.device.allowed import ALLOWED
from tests.device.cases import MICRO_BATCHES, Case, Seen
from tests.device.one_stream import program

STEPS = ("step", "step after growth")


def unknown_waits(seen: Seen) -> Iterable[str]:
    for what, asked in seen.asked.items():
        allowed = ALLOWED["step" if what in STEPS else what]
        for wait, count in asked.waits.items():
            if count > allowed.get(wait, 0):
                yield f"{what}: waits {count} times, {allowed.get(wait, 0)} allowed: {': '.join(wait)}"


def kept(seen: Seen) -> Iterable[str]:
    """Events after each step, and peaks set back."""
    if len(set(seen.events)) != 1:
        yield f"events that are kept after each step: {seen.events}"
    for place, count in seen.resets.items():
        yield f"sets the peak of memory back {count} times: {place}"


def missed_beats(seen: Seen) -> Iterable[str]:
    if set(seen.beats) != {MICRO_BATCHES}:
        yield f"heartbeats of steps of {MICRO_BATCHES} micro batches: {seen.beats}"


def held_scores(seen: Seen) -> Iterable[str]:
    for what, asked in seen.asked.items():
        if asked.quadratic:
            yield f"{what}: attention holds the scores {asked.quadratic} times"


def out_of_order(case: Case, seen: Seen) -> Iterable[str]:
    """Messages between pipeline ranks, against DeepSpeed's schedule."""
    tp, pp, dp = case.layout
    here = case.rank // (tp * dp)
    schedule = program(TrainSchedule(MICRO_BATCHES, pp, here), here)
    order = [(kind, case.rank + (to - here) * tp * dp) for kind, to in schedule]
    messages = [message for message in seen.asked["step"].messages if message[0] in ("send", "recv_")]
    found = [(name.rstrip("_"), to) for name, _, to, *_ in messages]
    if found != order:
        yield f"step: messages {found}, by the schedule {order}"


def problems(case: Case, seen: Seen) -> list[str]:
    """All of it."""
    return [*unknown_waits(seen), *kept(seen), *missed_beats(seen), *held_scores(seen), *out_of_order(case, seen)]
