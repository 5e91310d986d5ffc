"""The rules by which growing is judged.

Two are kept by refusing: a run that would see text twice is not started, and runs whose rate has not decayed at their
end (groups.py) get no S. Of the others a report says how far each arm keeps them, and by what a claim falls short.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.growth.experiment import NOT_THE_MATHEMATICS, Experiment, Job, jobs, make_job, tuning_jobs
from benchmarks.growth.groups import Group
from benchmarks.growth.ladder import Size
from benchmarks.growth.results import Results
from megabus.config import RunConfig, resolve_stages
from megabus.data.indexed import IndexedTokens, pair_paths
from megabus.errors import UserError
from megabus.model.cost import count_parameters, flops_per_token

SEEDS, RATES, DECAYS, SIZES = 5, 3, 2, 2  # at least
TOKENS = 19  # a parameter of the final size, if all of a run's FLOPs were spent on it: 20, within a twentieth


# ---- no text twice


def most_tokens(config: RunConfig) -> int:
    """Tokens that a run sees if each stage lasts until its cap: κ can only lead to larger sizes sooner."""
    train, stages = config.train, resolve_stages(config, world_size=1)
    steps, tokens, flops = 0, 0, 0.0
    for stage in stages:
        cost = stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len)
        left = [
            math.inf if train.max_steps is None else train.max_steps - steps,
            math.inf if train.max_tokens is None else (train.max_tokens - tokens) / stage.tokens_per_step,
            math.inf if train.max_flops is None else (train.max_flops - flops) / cost,
            math.inf if stage.max_tokens is None else stage.max_tokens / stage.tokens_per_step,
            math.inf if stage.max_flops is None else stage.max_flops / cost,
        ]
        taken = max(0, math.ceil(min(left)))
        steps, tokens, flops = steps + taken, tokens + taken * stage.tokens_per_step, flops + taken * cost
    return tokens


def check_text(experiment: Experiment, only: Sequence[str] = ()) -> None:
    """Raises `UserError` for an arm whose runs would see text more often than `epochs` allows. Token files that are not
    there are left for the runs to complain of."""
    asked: dict[tuple[str, float], Job] = {}  # neither a rate nor a seed changes how many tokens there are
    for arm, spec in experiment.arms.items():
        if not only or arm in only:
            runs = [make_job(experiment, arm, experiment.seeds[0], 1.0, budget) for budget in sorted(spec.budgets)]
            asked |= {(job.arm, job.budget): job for job in [*tuning_jobs(experiment, arm), *runs]}
    for (arm, budget), job in asked.items():
        _check_text(job.asked, experiment.epochs, f"arms.{arm} at budget {budget:g}")


def _check_text(config: RunConfig, epochs: float, where: str) -> None:
    corpora = config.data.train_corpora
    tokens, whole = most_tokens(config), sum(weight for _, weight in corpora)
    by_kappa = any(stage.max_tokens is stage.max_flops is None for stage in resolve_stages(config, world_size=1)[:-1])
    for prefixes, weight in corpora:
        if not all(path.is_file() for prefix in prefixes for path in pair_paths(prefix)):
            continue
        seen, there = tokens * weight / whole, sum(IndexedTokens(prefix).n_tokens for prefix in prefixes)
        if seen > epochs * there:
            problem = (
                f"{'may' if by_kappa else 'would'} see the {there} of {', '.join(prefixes)} {seen / there:.2f} times"
            )
            remedy = "lower the budget, add text, or allow it with `epochs`, which weakens every claim"
            raise UserError(where, f"{seen:.0f} tokens", problem, remedy)


# ---- what was tried


@dataclass(frozen=True)
class Entry:
    """A run that is done. recipe: all that it is but for its seed and rate; kind: but for its decay share too."""

    job: Job
    recipe: str
    kind: str


@dataclass(frozen=True)
class Kept:
    """How far a group keeps the rules. pairs: of its seeds those that all fixed sizes have too, or all if it is one of
    these. tokens: a parameter of the final size, if all FLOPs went into it. at_edge: the rate is the lowest or the
    highest of those tried. transfer: it comes by a rule from where it was tuned."""

    pairs: int
    rates: list[float]
    decay_shares: list[float]
    tokens: float
    at_edge: bool
    transfer: bool

    def short_by(self) -> list[str]:
        """What is missing, in words."""
        said = [_count(self.pairs, SEEDS, "paired seed")]
        if not self.transfer:
            said.append(_count(len(self.rates), RATES, "rate"))
            said.append("best rate the last tried" if self.at_edge and len(self.rates) > 1 else "")
            said.append(_count(len(self.decay_shares), DECAYS, "decay share"))
        said.append(f"{self.tokens:.2g} tokens a parameter" if self.tokens < TOKENS else "")
        return [words for words in said if words]


def ledger(experiment: Experiment, results: Results) -> list[Entry]:
    """Of all runs that are done, those that tune a rate included."""
    return [_entry(job) for job in jobs(experiment, results.loss_of) if results.get(job) is not None]


def _entry(job: Job) -> Entry:
    tree = job.asked.model_dump(mode="json", exclude_unset=True, exclude={*NOT_THE_MATHEMATICS})
    del tree["train"]["seed"], tree["optimizer"]["lr"]
    recipe = json.dumps(tree, sort_keys=True)
    tree["optimizer"].pop("decay_share", None)
    return Entry(job, recipe, json.dumps(tree, sort_keys=True))


def kept(experiment: Experiment, done: Sequence[Entry], group: Group, pairs: int) -> Kept:
    """Of a group with runs that ended well. pairs: seeds that are in pairs, see `Kept`."""
    mine = _entry(make_job(experiment, group.arm, experiment.seeds[0], group.lr, group.budget))
    rates = sorted({entry.job.lr for entry in done if entry.recipe == mine.recipe})
    shares = sorted({entry.job.asked.optimizer.decay_share for entry in done if entry.kind == mine.kind})
    last = resolve_stages(mine.job.asked, world_size=1)[-1]
    cost = flops_per_token(last.model, last.seq_len) * count_parameters(last.model)
    transfer = mine.job.tree["optimizer"].get("transfer") is not None
    at_edge = group.lr in (rates[0], rates[-1]) if rates else False
    return Kept(pairs, rates, shares, group.finite[0].flops / cost, at_edge, transfer)


def seeds_in_pairs(group: Group, ladder: dict[int, list[Size]]) -> int:
    """Seeds of a group that all fixed sizes have run too, on the same data in the same order. ladder: sizes by seed."""
    return sum(bool(ladder[run.seed]) and all(size.paired for size in ladder[run.seed]) for run in group.finite)


def worst(found: Sequence[Kept]) -> Kept:
    """What all of the fixed sizes' groups keep. How many tokens each saw is no matter: a ladder has small budgets."""
    rates, shares = min((k.rates for k in found), key=len), min((k.decay_shares for k in found), key=len)
    edge, transfer = any(k.at_edge for k in found), all(k.transfer for k in found)
    return Kept(min(k.pairs for k in found), rates, shares, math.inf, edge, transfer)


def _count(n: int, least: int, what: str) -> str:
    return "" if n >= least else f"{n or 'no'} {what}{'s' * (n != 1)}"
