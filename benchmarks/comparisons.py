"""What benchmarks find: comparisons of two arms, and the table of them that documents show."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arms import Timing


@dataclass(frozen=True)
class Comparison:
    """`one` against `other`: ratio is one's figure divided by the other's, the median over rounds.

    spread: the smallest and the largest ratio of a round. target: what the ratio is held against, such as `<= 1.15`.
    memory: bytes a rank at the peak of each, where it was measured.
    """

    what: str
    one: str
    other: str
    figures: tuple[float, float]
    unit: str
    ratio: float
    spread: tuple[float, float]
    target: str = ""
    memory: tuple[int | None, int | None] = (None, None)

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, bar = self.target.split()
        return self.ratio <= float(bar) if sign == "<=" else self.ratio >= float(bar)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def compare_seconds(what: str, one: str, other: str, timings: dict[str, Timing], target: str = "") -> Comparison:
    """Seconds a step."""
    return compare(what, one, other, timings[one], timings[other], target)


def compare_speeds(what: str, one: str, other: str, timings: dict[str, Timing], target: str = "") -> Comparison:
    """Steps a second: how many times as fast as the other `one` is."""
    a, b = (Timing([1 / s for s in timings[label].seconds], timings[label].memory) for label in (one, other))
    return compare(what, one, other, a, b, target, "/s")


def compare(what: str, one: str, other: str, a: Timing, b: Timing, target: str = "", unit: str = "s") -> Comparison:
    """Figures of two arms, which were measured in the same rounds."""
    ratios = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    spread = (min(ratios), max(ratios))
    figures, memory = (a.median, b.median), (a.memory or None, b.memory or None)
    return Comparison(what, one, other, figures, unit, statistics.median(ratios), spread, target, memory)


def markdown(found: Sequence[Comparison]) -> str:
    lines = [
        "| what | A | B | of A | of B | A / B | in the rounds | target | memory a rank, A and B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        figures = " | ".join(f"{figure:.3g} {row.unit}" for figure in row.figures)
        verdict = {None: "–", True: f"{row.target} ✓", False: f"{row.target} ✗"}[row.met]
        memory = ", ".join("–" if m is None else f"{m / 2**20:,.0f} MiB" for m in row.memory)
        low, high = row.spread
        lines.append(
            f"| {row.what} | {row.one} | {row.other} | {figures} | **{row.ratio:.3g}** | {low:.3g} to {high:.3g} "
            f"| {verdict} | {memory} |"
        )
    return "\n".join(lines)
