"""Runs beside the best fixed size: what each saved against it, and whether one run that grows ends below it always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.growth.cells import bound_cell, difference_cell, saving_cell
from benchmarks.growth.experiment import Experiment
from benchmarks.growth.groups import Group, decayed, each_saving
from benchmarks.growth.ladder import Best, envelope, saving_by_best, sizes_of
from benchmarks.growth.protocol import SIZES, Kept, kept, ledger, seeds_in_pairs, worst
from benchmarks.growth.results import Results
from benchmarks.growth.savings import Bound, Saving, Spread, overall, spread

NO_LADDER = "No fixed size has results: mark arms that never grow with `ladder: true`, and run them at several budgets."


@dataclass(frozen=True)
class Claim:
    """What a group of runs saved, by seed: S, S*, and the best fixed size at a run's FLOPs. below: by how much they end
    below that. unpaired: a fixed size stands in with other seeds. short: of the protocol, in words."""

    group: Group
    s: dict[int, Saving]
    s_star: dict[int, Saving]
    best: dict[int, Best]
    below: Spread | None
    unpaired: bool
    kept: Kept
    short: list[str]

    @property
    def is_open(self) -> bool:
        """Whether a size that was not run at these FLOPs may lie lower than the best that is known."""
        return any(best.is_open for best in self.best.values())


def claims(experiment: Experiment, results: Results, found: Sequence[Group]) -> list[Claim]:
    """Of all groups with runs that ended well. Those of fixed sizes claim nothing, but must keep the protocol too."""
    seeds = {run.seed for group in found for run in group.finite}
    ladder = {seed: sizes_of(experiment, found, seed) for seed in seeds}
    done = ledger(experiment, results)
    judged = []
    for group in (group for group in found if group.finite):
        fixed = experiment.arms[group.arm].ladder
        keeps = kept(experiment, done, group, len(group.finite) if fixed else seeds_in_pairs(group, ladder))
        short = (worst([keeps]) if fixed else keeps).short_by()
        if fixed or not decayed(experiment, group):
            judged.append(Claim(group, {}, {}, {}, None, False, keeps, short))
            continue
        stars = {run.seed: saving_by_best(run.loss, run.flops, ladder[run.seed]) for run in group.finite}
        bests = {run.seed: envelope(ladder[run.seed], run.flops) for run in group.finite}
        known = {seed: best for seed, best in bests.items() if best is not None}
        gains = [known[run.seed].loss - run.loss for run in group.finite if run.seed in known]
        judged.append(
            Claim(
                group=group,
                s=each_saving(experiment, found, group),
                s_star={seed: star for seed, star in stars.items() if star is not None},
                best=known,
                below=spread(gains) if gains else None,
                unpaired=any(not size.paired for run in group.finite for size in ladder[run.seed]),
                kept=keeps,
                short=short,
            )
        )
    return judged


def short_of_ladder(experiment: Experiment, found: Sequence[Claim]) -> list[str]:
    """By what the fixed sizes fall short, and what all runs share: it weakens every claim."""
    fixed = [claim for claim in found if experiment.arms[claim.group.arm].ladder]
    n_sizes = len({claim.group.arm for claim in fixed})
    short = [] if n_sizes >= SIZES else [f"{n_sizes or 'no'} size{'s' * (n_sizes != 1)}"]
    short += worst([claim.kept for claim in fixed]).short_by() if fixed else []
    return short + ([f"text seen up to {experiment.epochs:g} times"] if experiment.epochs > 1 else [])


def frontier_table(experiment: Experiment, found: Sequence[Claim]) -> str:
    """A line for each arm and budget that is no fixed size of the ladder."""
    rows = [claim for claim in found if not experiment.arms[claim.group.arm].ladder]
    if not any(experiment.arms[claim.group.arm].ladder for claim in found):
        return NO_LADDER
    lines = [
        f"| arm | budget | S by seed | S (to {experiment.reference}) | S* by seed | S* (to the best fixed size) "
        "| below it by | which |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in rows:
        cells = [claim.group.arm, f"{claim.group.budget:g}"]
        if not decayed(experiment, claim.group):
            cells += ["not decayed"] * 4 + ["–", "–"]
        else:
            n = len(claim.group.finite)
            cells += [_each(claim.s), saving_cell(_overall(claim.s), n)]
            cells += [_each(claim.s_star), saving_cell(_overall(claim.s_star), n) + _others(claim)]
            cells += [below_cell(claim), ", ".join(dict.fromkeys(best.arm for best in claim.best.values())) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "`<`, `>`: at most, at least. Fixed sizes that may be better were not run with so few or so many FLOPs.",
    ]
    if any(claim.unpaired for claim in rows):
        lines += ["`†`: for a seed that a fixed size lacks, the mean of its other seeds stands in."]
    return "\n".join(lines)


def anytime_table(experiment: Experiment, found: Sequence[Claim]) -> str:
    """Arms whose growths have a place of their own, so that runs of all budgets are one trunk and its decays."""
    lines = []
    for arm in trunks(experiment):
        mine = [claim for claim in found if claim.group.arm == arm and claim.below is not None]
        if not mine:
            continue
        sure = [claim for claim in mine if claim.below is not None and claim.below.mean > 0 and not claim.is_open]
        beyond = [claim for claim in sure if claim.below and claim.below.interval and claim.below.interval[0] > 0]
        budgets = [claim.group.budget for claim in mine]
        lines += [
            f"`{arm}` ends below the best fixed size at {len(sure)} of {len(mine)} budgets over "
            f"{max(budgets) / min(budgets):g}x, at {len(beyond)} of them beyond the spread of seeds (95%).",
            "",
            "| budget | FLOPs | sizes | loss | below the best fixed size by | which |",
            "|---|---|---|---|---|---|",
        ]
        for claim in mine:
            runs = claim.group.finite
            cells = [f"{claim.group.budget:g}", f"{runs[0].flops:.2e}", f"{1 + len(runs[0].growths)}"]
            cells += [f"{math.fsum(run.loss for run in runs) / len(runs):.4f}", below_cell(claim)]
            cells.append(", ".join(dict.fromkeys(best.arm for best in claim.best.values())))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip() or "No arm with `caps_at` has results that fixed sizes were run beside."


def protocol_table(experiment: Experiment, found: Sequence[Claim]) -> str:
    """What was tried for each arm and budget, the fixed sizes too, and by what that falls short."""
    lines = [
        "| arm | budget | tokens a final parameter | seeds in pairs | rates tried | decay shares tried | short by |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in found:
        keeps = claim.kept
        rates = ", ".join(f"{rate:g}" for rate in keeps.rates) + (" (by transfer)" if keeps.transfer else "")
        cells = [claim.group.arm, f"{claim.group.budget:g}", f"{keeps.tokens:.3g}", f"{keeps.pairs}", rates]
        cells += [", ".join(f"{share:g}" for share in keeps.decay_shares), ", ".join(claim.short) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    short = short_of_ladder(experiment, found)
    lines += ["", f"The fixed sizes, and with them every claim, fall short: {', '.join(short)}." if short else ""]
    return "\n".join(lines).rstrip()


def trunks(experiment: Experiment) -> list[str]:
    """The arms that grow at places of their own."""
    return [arm for arm in experiment.arms if experiment.capping(arm).caps_at and "growth" in experiment.tree(arm)]


def below_cell(claim: Claim) -> str:
    """At most so much where a size was not run that may lie lower."""
    return ("<" if claim.is_open else "") + difference_cell(claim.below) + _others(claim)


def _overall(savings: dict[int, Saving]) -> tuple[Spread, Bound] | None:
    return overall([*savings.values()]) if savings else None


def _each(savings: dict[int, Saving]) -> str:
    return ", ".join(bound_cell(one.value, one.bound) for _, one in sorted(savings.items())) or "–"


def _others(claim: Claim) -> str:
    return " †" if claim.unpaired and claim.s_star else ""
