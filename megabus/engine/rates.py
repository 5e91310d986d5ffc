"""Learning rates by parameter, though ZeRO hands Adam parameters in flat partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megabus.engine.adam import Segment
from megabus.engine.fragments import Place, flat_partitions, inner_optimizer
from megabus.model.params import ParamSpec


def set_rates(engine: Any, own: Iterable[Place], rate: Callable[[ParamSpec], float]) -> None:
    """Let every parameter learn at `rate` times its group's learning rate.

    engine: DeepSpeed's, around a `SegmentedAdamW`. own: what this rank owns, and where.
    """
    found: dict[int, list[Segment]] = {}
    for place in own:
        found.setdefault(place.group, []).append(Segment(place.part.start, place.part.stop, rate(place.spec)))
    flats, groups = flat_partitions(engine), inner_optimizer(engine).param_groups
    for number, segments in found.items():
        groups[number]["segments"] = merged(segments, flats[number].numel())


def merged(segments: Iterable[Segment], length: int) -> list[Segment]:
    """Segments of a partition of `length` entries, in order, as few as can be: neighbours of one rate become one.
    Entries between them and at the end are padding, and join what is before."""
    joined: list[Segment] = []
    for segment in sorted(segments):
        if not joined or joined[-1].rate != segment.rate:
            joined.append(segment)
    starts = [0, *(segment.start for segment in joined[1:]), length]
    return [Segment(start, stop, s.rate) for s, start, stop in zip(joined, starts[:-1], starts[1:], strict=True)]
