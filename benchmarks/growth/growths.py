"""What growths did to the loss: at the instant, at worst in the stage after it, and how soon that was made up for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.growth.groups import Group
from benchmarks.growth.results import Result, points_of_stages

HEAD = (
    "| arm | budget | growth | at share of FLOPs | tokens before | why | loss just before and after | rise at most "
    "| below again after |"
)
UNSEEN = 1e-4  # nats: no rise


@dataclass(frozen=True)
class Mixing:
    """After a growth. rise: of the highest validation of the next stage over the loss before the growth, in nats.
    flops, tokens: spent until the first validation after it that lies below the loss before, 0 where none was above it;
    None where there is none."""

    rise: float
    flops: float | None
    tokens: int | None


def mixing(run: Result, number: int) -> Mixing | None:
    """Of a run's growth `number`, as finely as the run was validated. None where no loss before it is known."""
    growth, parts = run.growths[number], points_of_stages(run)[number + 1 :]
    before, after = growth["loss_before"], [point for part in parts for point in part]
    if before is None or not parts or not parts[0]:
        return None
    peak = max(range(len(parts[0])), key=lambda i: parts[0][i].loss)
    rise = after[peak].loss - before
    if rise < UNSEEN:
        return Mixing(rise, 0.0, 0)
    back = next((point for point in after[peak + 1 :] if point.loss < before), None)
    if back is None:
        return Mixing(rise, None, None)
    return Mixing(rise, back.flops - growth["flops"], back.tokens - growth["tokens"])


def growth_table(found: Sequence[Group]) -> str:
    """A line for each growth of an arm and budget: when it came, in shares of a run's FLOPs, why, and what it did."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|---|"]
    for group in found:
        for number in range(max((len(run.growths) for run in group.finite), default=0)):
            runs = [(run, run.growths[number]) for run in group.finite if len(run.growths) > number]
            shares = [g["flops"] / run.flops for run, g in runs]
            tokens = statistics.fmean(g["tokens"] for _, g in runs)
            why = ", ".join(sorted({"κ" if g["reason"] == "kappa" else g["reason"] for _, g in runs}))
            pairs = [(g["loss_before"], g["loss_after"]) for _, g in runs]
            sound = [(before, after) for before, after in pairs if before is not None and after is not None]
            jump = "–"
            if sound:
                jump = f"{statistics.fmean(b for b, _ in sound):.4f} {statistics.fmean(a - b for b, a in sound):+.1e}"
            share = f"{min(shares):.0%}" + (f" to {max(shares):.0%}" if max(shares) - min(shares) > 0.005 else "")
            cells = [group.arm, f"{group.budget:g}", _sizes(runs[0][1]), share, f"{tokens / 1e6:.2f}M", why, jump]
            cells += _mixing_cells([mix for run, _ in runs if (mix := mixing(run, number)) is not None])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sizes(growth: dict[str, Any]) -> str:
    """What changes of width and depth."""
    old, new = growth["old"], growth["new"]
    names = [("d", "d_model"), ("L", "n_layers")]
    parts = [f"{name} {old[key]} → {new[key]}" for name, key in names if key in old and old[key] != new[key]]
    return ", ".join(parts) or f"d {old['d_model']}, L {old.get('n_layers', '–')}, other sizes"


def _mixing_cells(found: Sequence[Mixing]) -> list[str]:
    """Means over runs."""
    if not found:
        return ["–", "–"]
    rise = f"{statistics.fmean(mix.rise for mix in found):+.4f}"
    if all(mix.tokens == 0 for mix in found):
        return [rise, "at once"]
    back = [(mix.flops, mix.tokens) for mix in found if mix.flops is not None and mix.tokens is not None]
    if not back:
        return [rise, "never"]
    flops, tokens = statistics.fmean(f for f, _ in back), statistics.fmean(t for _, t in back)
    never = f", never in {len(found) - len(back)} of {len(found)}" if len(back) < len(found) else ""
    return [rise, f"{tokens / 1e6:.2f}M tokens, {flops:.1e} FLOPs{never}"]
