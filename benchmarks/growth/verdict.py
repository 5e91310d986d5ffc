"""Does growing pay? Two experiments, of a smaller and a larger scale, held against each other.

A claim needs both: what one scale saves may be gone at the next. So no claim is made whose S or S* falls from the
smaller to the larger scale, nor of scales that lie less than a factor of 4 apart in FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.growth.cells import saving_cell
from benchmarks.growth.experiment import Experiment
from benchmarks.growth.frontier import Claim, claims, short_of_ladder
from benchmarks.growth.groups import groups
from benchmarks.growth.ladder import SAME
from benchmarks.growth.results import Results
from benchmarks.growth.savings import Bound, Saving, Spread, overall

APART = 4.0  # in FLOPs, at least
ALIKE = 1.1  # in tokens a parameter of the final size, at most
Overall = tuple[Spread, Bound]


def verdict_table(scales: Sequence[tuple[Experiment, Results]]) -> str:
    """A line for each arm that two neighbouring scales have at the same tokens a final parameter."""
    ordered = sorted(scales, key=lambda scale: scale[0].budget)
    lines = [
        f"Scales: {', '.join(f'{experiment.name} ({experiment.budget:.3g} FLOPs)' for experiment, _ in ordered)}.",
        "",
        "| arm | tokens a final parameter | FLOPs | S | S* | verdict |",
        "|---|---|---|---|---|---|",
    ]
    judged = [(experiment, claims(experiment, results, groups(experiment, results))) for experiment, results in ordered]
    n_lines = len(lines)
    for (small, its), (large, theirs) in pairwise(judged):
        lacking = [short_of_ladder(small, its), short_of_ladder(large, theirs)]
        for one in its:
            other = next((claim for claim in theirs if _alike(one, claim)), None)
            if other is not None and one.s_star and other.s_star:
                lines.append(_line(one, other, lacking))
    if len(lines) == n_lines:
        return "No verdict: no arm has S* in both experiments at the same tokens a final parameter (within a tenth)."
    return "\n".join(lines)


def _alike(one: Claim, other: Claim) -> bool:
    ratio = one.kept.tokens / other.kept.tokens
    return one.group.arm == other.group.arm and 1 / ALIKE <= ratio <= ALIKE


def _line(one: Claim, other: Claim, lacking: Sequence[list[str]]) -> str:
    s, star = ([_overall(claim.s), _overall(claim.s_star)] for claim in (one, other))
    pairs = [(s[0], star[0]), (s[1], star[1])]  # of S, of S*: at the smaller scale and at the larger
    flops = [claim.group.finite[0].flops for claim in (one, other)]
    cells = [one.group.arm, f"{one.kept.tokens:.3g}", f"{flops[0]:.2e} → {flops[1]:.2e}"]
    counts = [len(claim.group.finite) for claim in (one, other)]
    cells += [" → ".join(saving_cell(x, n) for x, n in zip(pair, counts, strict=True)) for pair in pairs]
    words = _verdict(flops[1] / flops[0], pairs)
    names = ("smaller", "larger")
    for name, claim, missing in zip(names, (one, other), lacking, strict=True):
        short = claim.short + [f"fixed sizes: {', '.join(missing)}"] * bool(missing)
        if short:
            words += f"; short of the protocol at the {name} scale: {', '.join(short)}"
    return f"| {' | '.join([*cells, words])} |"


def _verdict(apart: float, pairs: Sequence[tuple[Overall | None, Overall | None]]) -> str:
    if apart * SAME < APART:
        return f"no claim: {apart:.1f}x apart in FLOPs, {APART:g}x wanted"
    for name, (small, large) in zip(("S", "S*"), pairs, strict=True):
        if small is None or large is None:
            return f"no claim: no {name} at one of the scales"
        falls = _falls(small, large)
        if falls:
            return f"no claim: {name} falls"
        if falls is None:
            return f"no claim: whether {name} falls is not known, for one is a bound"
    known = [found for pair in pairs for found in pair if found is not None]
    if all(_above_1(found) for found in known):
        return "pays at both scales, beyond the spread of seeds"
    return "does not fall, but is not above 1 beyond the spread of seeds"


def _falls(small: Overall, large: Overall) -> bool | None:
    """As printed; None where bounds leave it open."""
    a, b = round(small[0].mean, 2), round(large[0].mean, 2)
    if small[1] in ("", "<") and large[1] in ("", ">") and b >= a:
        return False
    if small[1] in ("", ">") and large[1] in ("", "<") and b < a:
        return True
    return None


def _above_1(found: Overall) -> bool:
    interval = found[0].interval
    return interval is not None and interval[0] > 1


def _overall(savings: dict[int, Saving]) -> Overall | None:
    return overall([*savings.values()]) if savings else None
