"""An experiment's YAML: arms, each a run's configuration laid over a common one; seeds, budgets and learning rates.

A run of an arm is a `Job`. Which jobs there are depends on results: an arm whose rate is to be tuned gets its other
seeds at the rate that did best.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from megabus.config import RunConfig, Stage, parse_config, resolve_stages
from megabus.config.read import described, read_tree
from megabus.config.schema import OptimizerConfig
from megabus.config.section import Positive, Section, Share
from megabus.data.indexed import read_meta
from megabus.errors import UserError

NOT_THE_MATHEMATICS = ("run_dir", "resume", "log", "checkpoint", "faults", "preflight")
OWN_KEYS = {
    "run_dir": "leave it out: runs live under --work",
    "train.seed": "name it in `seeds`",
    "train.max_flops": "name it in `budget` and `budgets`",
    "optimizer.lr": "name it in the arm's `lr`",
}
MOST_DRAWN = 6  # curves that can be told apart


def _name(text: str) -> str:
    """It becomes part of a file's name, and of a list with commas."""
    if re.fullmatch(r"\w[\w.-]{,63}", text) is None:
        raise ValueError("is no name; use up to 64 letters, digits, _, . and -, the last two not in front")
    return text


Name = Annotated[str, AfterValidator(_name)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Rate(Section):
    """An arm's learning rate: `value`, or the best of `tune`, or that `of` another arm. at: budgets at which `tune` is
    tried, else the experiment's tune_budget alone; a run takes what the nearest of them chose."""

    value: Positive | None = None
    tune: list[Positive] | None = Field(None, min_length=1)
    at: list[Positive] | None = Field(None, min_length=1)
    of: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Rate:
        if sum(x is not None for x in (self.value, self.tune, self.of)) != 1:
            raise ValueError("is not one rate; give a number, `tune: [...]`, or `of: ARM`")
        if self.at is not None and self.tune is None:
            raise ValueError("has budgets to tune at and nothing to tune; give `tune: [...]` too, or leave out `at`")
        return self


def _rate(value: Any) -> Any:
    return value if isinstance(value, dict) else {} if value is None else {"value": value}


class Arm(Section):
    """One way to train. Budgets are in units of the experiment's."""

    about: str = Field(description="a few words for tables")
    like: str | None = Field(None, description="arm whose `set` this one's is laid over")
    set: dict[str, Any] = Field(default_factory=dict, description="keys of a run's configuration")
    caps: list[Share] | None = Field(None, description="of the stages but the last: shares of a run's FLOPs")
    caps_at: list[Positive] | None = Field(
        None,
        min_length=1,
        description="instead: FLOPs at which a run of any budget grows, in units of the experiment's",
    )
    lr: Annotated[Rate, BeforeValidator(_rate)]
    budgets: list[Positive] = Field(default_factory=lambda: [1.0], min_length=1)
    seeds: list[Seed] | None = Field(None, min_length=1)
    ladder: bool = Field(False, description="a fixed size, trained like the reference: S* and the law are of these")
    drawn: bool = Field(False, description="among the curves of the picture (six at most)")


class Experiment(Section):
    """`base` is a run's configuration without run_dir; `budget` the FLOPs of a run of budget 1.

    tune_budget: what a run that tunes a learning rate may spend, with the first of `seeds`. epochs: how often a run may
    see its training text at most.
    reference: the arm against whose loss over FLOPs others are held; versus: the one whose final losses others are
    compared with.
    """

    extends: str | None = None  # what the file was laid over: here so that a misspelt one is known
    name: Name
    budget: Positive
    seeds: list[Seed] = Field(min_length=1)
    tune_budget: Positive = 1.0
    epochs: Positive = 1.0
    reference: str
    versus: str
    base: dict[str, Any]
    arms: dict[Name, Arm] = Field(min_length=1)

    def tree(self, arm: str) -> dict[str, Any]:
        """What an arm's runs have in common."""
        spec = self.arms[arm]
        return overlaid(self.tree(spec.like) if spec.like else self.base, spec.set)

    def capping(self, arm: str) -> Arm:
        """The arm whose caps hold for this one: itself, or else that of the one that it is like. It may have none."""
        spec = self.arms[arm]
        return self.capping(spec.like) if spec.like and spec.caps is None and spec.caps_at is None else spec

    def tuned_at(self, arm: str) -> list[float]:
        """The budgets at which an arm with rates to tune tries them."""
        return sorted(self.arms[arm].lr.at or [self.tune_budget])


@dataclass(frozen=True)
class Job:
    """One run. `budget` in units of the experiment's; `tuning`: it is there to find a learning rate."""

    experiment: str
    arm: str
    seed: int
    lr: float
    budget: float
    tree: Mapping[str, Any]
    tuning: bool = False

    @property
    def label(self) -> str:
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}-x{self.budget:g}"

    def config(self, run_dir: Path) -> RunConfig:
        return parse_config({**self.tree, "run_dir": str(run_dir)})

    @cached_property
    def asked(self) -> RunConfig:
        """The configuration, wherever it is run."""
        return self.config(Path("unused"))

    @cached_property
    def digest(self) -> str:
        """Of all that the run's mathematics was asked to be: a result counts only for what was asked. What an arm
        leaves to a default is not in it, so that new options do not void old results: where a default changes, name
        the old value in the arms that have results."""
        keys = self.asked.model_dump(mode="json", exclude_unset=True, exclude={*NOT_THE_MATHEMATICS})
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def data(self) -> str:
        """What the token files that are at hand hold."""
        data = self.asked.data
        return fingerprint((*(path for paths, _ in data.train_corpora for path in paths), data.valid))


@lru_cache(maxsize=64)
def fingerprint(prefixes: tuple[str, ...]) -> str:
    """Token files by their contents, as the .meta.json beside each says; empty where one of them does not."""
    found = [(read_meta(prefix) or {}).get("bin_sha256", "") for prefix in prefixes]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16] if all(found) else ""


Losses = Callable[[Job], float | None]


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment, every arm's configuration included. Raises `UserError`."""
    try:
        experiment = Experiment.model_validate(_read(path))
    except ValidationError as error:
        raise described(error, Experiment).within(f"{path}") from None
    _check_names(experiment, path)
    for name in experiment.arms:
        _check_own(experiment.tree(name), f"{path}: arms.{name}")
        arm = experiment.arms[name]
        grows = len(_stages(experiment.tree(name))) > 1
        if grows:
            _check_caps(experiment, name, path)
        stages: list[Stage] = []
        try:
            # Where growths have a place of their own, a run of few FLOPs ends before some of them.
            for budget in sorted({*arm.budgets, *experiment.tuned_at(name)}) if grows else [1.0]:
                job = make_job(experiment, name, experiment.seeds[0], 1e-3, budget)
                stages = resolve_stages(job.asked, world_size=1)
        except UserError as error:
            raise error.within(f"{path}: arms.{name}") from None
        if arm.ladder and len(stages) > 1:
            problem, remedy = "grows, and a ladder is of fixed sizes", "leave out `ladder`, or set its growth to null"
            raise UserError(f"{path}: arms.{name}.ladder", True, problem, remedy)
        if (arm.caps or arm.caps_at) and not grows:  # what is no growth at all has been refused above
            key, problem = "caps" if arm.caps else "caps_at", "are of an arm that does not grow by stages of its own"
            raise UserError(
                f"{path}: arms.{name}.{key}", arm.caps or arm.caps_at, problem, "give it growth.stages, or none"
            )
    return experiment


def _read(path: Path, above: tuple[Path, ...] = (), key: str = "experiment") -> dict[str, Any]:
    """The file's keys, laid over those of the experiment beside it that it `extends`."""
    tree = read_tree(path, key, f"{'' if above else 'benchmarks/growth/'}screen.yaml")
    below = tree.get("extends")
    if below is None:
        return tree
    if not isinstance(below, str) or (path.parent / below).resolve() in (*above, path.resolve()):
        raise UserError(f"{path}: extends", below, "is no other file", "name an experiment beside this one")
    return overlaid(_read(path.parent / below, (*above, path.resolve()), f"{path}: extends"), tree)


def _check_names(experiment: Experiment, path: Path) -> None:
    known = ", ".join(experiment.arms)
    for key in ("reference", "versus"):
        if (name := getattr(experiment, key)) not in experiment.arms:
            raise UserError(f"{path}: {key}", name, "is no arm", f"name one of {known}")
    drawn = [name for name, arm in experiment.arms.items() if arm.drawn]
    if len(drawn) > MOST_DRAWN:
        raise UserError(f"{path}: arms", ", ".join(drawn), "are drawn", f"draw {MOST_DRAWN} at most")
    for name, arm in experiment.arms.items():  # a run that counts twice makes intervals too narrow
        for key, values in (
            ("seeds", arm.seeds or experiment.seeds),
            ("budgets", arm.budgets),
            ("lr.tune", arm.lr.tune or ()),
            ("lr.at", arm.lr.at or ()),
        ):
            if len(set(values)) < len(values):
                raise UserError(f"{path}: arms.{name}.{key}", values, "names one twice", "name it once")
    for name, arm in experiment.arms.items():
        for key, start in (("like", arm.like), ("lr.of", arm.lr.of)):
            seen, other = {name}, start
            while other is not None:
                if other not in experiment.arms:
                    raise UserError(f"{path}: arms.{name}.{key}", other, "is no arm", f"name one of {known}")
                if other in seen:
                    raise UserError(f"{path}: arms.{name}.{key}", other, "comes back to itself", "name another arm")
                seen.add(other)
                other = experiment.arms[other].like if key == "like" else experiment.arms[other].lr.of


def _check_own(tree: Mapping[str, Any], where: str) -> None:
    """Keys that every run gets from the experiment: a value in the file would do nothing."""
    for key, remedy in OWN_KEYS.items():
        section, _, name = key.rpartition(".")
        found = tree.get(section, {}) if section else tree
        if not isinstance(found, dict):  # the rate and the seed would be laid over it, and it be lost
            raise UserError(f"{where}: {section}", found, "is no section of keys", "give its keys")
        if found.get(name) is not None:
            raise UserError(f"{where}: {key}", found[name], "would do nothing", remedy)


def _check_caps(experiment: Experiment, name: str, path: Path) -> None:
    spec, stages = experiment.capping(name), _stages(experiment.tree(name))
    if spec.caps and spec.caps_at:
        problem = "stands beside caps_at, which says the same otherwise"
        raise UserError(f"{path}: arms.{name}.caps", spec.caps, problem, "leave out one of the two")
    if not spec.caps and not spec.caps_at:
        return
    for number, stage in enumerate(stages):
        if stage.get("max_flops") is not None:
            key = f"{path}: arms.{name}: growth{f'.stages.{number - 1}' if number else ''}.max_flops"
            raise UserError(key, stage["max_flops"], "would do nothing beside caps", "leave out one of the two")
    if spec.caps_at:
        _check_caps_at(experiment, name, spec.caps_at, f"{path}: arms.{name}")
    elif spec.caps and (len(spec.caps) != len(stages) - 1 or sum(spec.caps) >= 1):
        problem = f"do not end {len(stages) - 1} stage(s) before the run does"
        raise UserError(f"{path}: arms.{name}.caps", spec.caps, problem, "give one a growth, of less than 1 in all")


def _check_caps_at(experiment: Experiment, name: str, places: Sequence[float], where: str) -> None:
    tree = experiment.tree(name)
    n_growths = len(_stages(tree)) - 1
    if len(places) != n_growths or sorted(set(places)) != list(places):
        problem = f"are not the places of {n_growths} growth(s), one after the other"
        raise UserError(f"{where}.caps_at", places, problem, "give one a growth, each later than the last")
    try:
        optimizer = _optimizer(tree)
    except ValidationError as error:
        raise described(error, OptimizerConfig).within(f"{where}: optimizer") from None
    if optimizer.schedule != "wsd":
        problem = "has no constant rate that runs of several budgets have in common"
        raise UserError(f"{where}: optimizer.schedule", optimizer.schedule, problem, "choose wsd, or use `caps`")
    if optimizer.transfer is not None and optimizer.transfer.steps is not None:
        problem = "makes the rate depend on the budget, so that runs of several have none in common"
        raise UserError(f"{where}: optimizer.transfer.steps", optimizer.transfer.steps, problem, "use `caps`")
    begins = max(experiment.arms[name].budgets) * (1 - optimizer.decay_share)
    if places[-1] >= begins:
        problem = f"is where no run of the arm can grow: the rate of the largest falls from {begins:g} on"
        raise UserError(f"{where}.caps_at", places[-1], problem, "place it before, or give a larger budget")


def _optimizer(tree: Mapping[str, Any]) -> OptimizerConfig:
    return OptimizerConfig.model_validate({**tree.get("optimizer", {}), "lr": 1.0})


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, values and lists are replaced, and null takes a key away."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, dict):
            was = merged.get(key)
            merged[key] = overlaid(was if isinstance(was, dict) else {}, value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _stages(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sections that hold the stages' caps. None for `growth: auto`, which has caps of its own, and for what the
    configuration will refuse."""
    growth = tree.get("growth")
    if not isinstance(growth, dict):
        return []
    stages = growth.get("stages", [])
    return [growth, *stages] if isinstance(stages, list) and all(isinstance(x, dict) for x in stages) else []


def make_job(experiment: Experiment, arm: str, seed: int, lr: float, budget: float, *, tuning: bool = False) -> Job:
    flops = budget * experiment.budget
    settings = {"train": {"seed": seed, "max_flops": flops}, "optimizer": {"lr": lr}}
    tree = overlaid(experiment.tree(arm), settings)
    spec, stages = experiment.capping(arm), _stages(tree)
    caps = [cap * flops for cap in spec.caps or ()]
    if spec.caps_at and len(stages) > 1:
        # What a run would grow into while its rate falls already is left to runs of more FLOPs.
        places = [place for place in spec.caps_at if place < budget * (1 - _optimizer(tree).decay_share)]
        caps = [(b - a) * experiment.budget for a, b in pairwise([0.0, *places])]
        tree["growth"]["stages"] = stages[1 : 1 + len(caps)]
    for stage, cap in zip(stages, caps, strict=False):
        stage["max_flops"] = cap
    return Job(experiment.name, arm, seed, lr, budget, tree, tuning)


def tuning_jobs(experiment: Experiment, arm: str, at: Sequence[float] | None = None) -> list[Job]:
    """The runs that an arm's learning rate is chosen from, at the budgets in `at` or at all; none where it is given."""
    rate = experiment.arms[arm].lr
    if rate.of is not None:
        return tuning_jobs(experiment, rate.of, at)
    budgets = experiment.tuned_at(arm) if at is None else at
    return [
        make_job(experiment, arm, experiment.seeds[0], lr, budget, tuning=True)
        for budget in budgets
        for lr in rate.tune or ()
    ]


def best_rate(experiment: Experiment, arm: str, budget: float, loss_of: Losses) -> float | None:
    """An arm's learning rate for a budget: what the nearest budget (by its ratio, the smaller of two) chose at which
    rates were tried. None while runs that it is chosen from are not done. A run that failed, whose loss is infinite, is
    never the best: None too where all failed."""
    rate = experiment.arms[arm].lr
    if rate.of is not None:
        return best_rate(experiment, rate.of, budget, loss_of)
    if rate.value is not None:
        return rate.value
    nearest = min(experiment.tuned_at(arm), key=lambda at: abs(math.log(at / budget)))
    losses = [(loss_of(job), job.lr) for job in tuning_jobs(experiment, arm, [nearest])]
    if any(loss is None for loss, _ in losses):
        return None
    finite = [(loss, lr) for loss, lr in losses if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def jobs(experiment: Experiment, loss_of: Losses, only: Sequence[str] = ()) -> Iterator[Job]:
    """All jobs of the arms (of those in `only`) that can be known by now, in the order in which to run them: learning
    rates, then seed by seed, and of a seed small budgets first, which larger ones go on from."""
    arms = {arm: spec for arm, spec in experiment.arms.items() if not only or arm in only}
    seen = set()

    def fresh(job: Job) -> bool:
        new = job.digest not in seen
        seen.add(job.digest)
        return new

    for arm in arms:
        yield from filter(fresh, tuning_jobs(experiment, arm))
    rates = {(arm, x): best_rate(experiment, arm, x, loss_of) for arm, spec in arms.items() for x in spec.budgets}
    for number in range(max(len(spec.seeds or experiment.seeds) for spec in arms.values())):
        for arm, spec in arms.items():
            seeds = spec.seeds or experiment.seeds
            for budget in sorted(spec.budgets) if number < len(seeds) else ():
                if (lr := rates[arm, budget]) is not None:
                    yield from filter(fresh, [make_job(experiment, arm, seeds[number], lr, budget)])
