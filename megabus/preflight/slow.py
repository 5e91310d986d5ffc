"""Which of many measurements are far below the others of their kind, and which rank explains them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

Pair = tuple[int, int]


def usual(values: Sequence[float]) -> float:
    """The upper quartile: one slow rank of a ring of three or four spoils half of its links or more, and a median."""
    return sorted(values)[len(values) * 3 // 4]


def blame(slow: set[Pair], links: Iterable[Pair]) -> tuple[list[int], list[Pair]]:
    """Ranks whose links are all slow while each of their neighbours has a good one too; and what no such rank explains.

    links: all pairs of one kind that were measured, `slow` among them.
    """
    at: dict[int, set[Pair]] = defaultdict(set)
    for pair in links:
        for rank in pair:
            at[rank].add(pair)
    neighbours = {rank: {other for pair in at[rank] for other in pair if other != rank} for rank in at}
    ranks = [
        rank for rank in sorted(at) if at[rank] <= slow and all(not at[other] <= slow for other in neighbours[rank])
    ]
    return ranks, sorted(pair for pair in slow if not set(pair) & set(ranks))
