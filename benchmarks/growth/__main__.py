"""Does growing pay? Runs an experiment's arms, and reports what they say.

python -m benchmarks.growth list benchmarks/growth/screen.yaml              # the runs, and what they cost
python -m benchmarks.growth run benchmarks/growth/screen.yaml --jobs 2      # goes on where it was stopped
python -m benchmarks.growth report benchmarks/growth/screen.yaml --out runs/growth
python -m benchmarks.growth report SMALL.yaml LARGE.yaml                    # the verdict of two scales
python -m benchmarks.growth instants benchmarks/growth/cpu.yaml --only late,middle   # when would each kappa have grown?
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.__main__ import machine
from benchmarks.growth.experiment import Experiment, best_rate, jobs, load_experiment
from benchmarks.growth.groups import groups
from benchmarks.growth.results import Results
from benchmarks.growth.runner import Runner
from megabus.command import Parser, run
from megabus.errors import UserError, say


def main() -> int:
    parser = Parser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("list", "run", "report", "instants"))
    parser.add_argument("experiment", type=Path, nargs="+", help="YAML; see benchmarks/growth/")
    parser.add_argument(
        "--results", type=Path, action="append", help="one an experiment; default: results/NAME.jsonl beside it"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/growth"), help="where runs live (%(default)s)")
    parser.add_argument("--only", metavar="ARM,...", help="run, list or judge (instants) only these arms")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    parser.add_argument("--hours", type=float, help="stop after so long; what is going on saves and can go on")
    parser.add_argument("--out", type=Path, help="report: a directory for tables and pictures")
    args = parser.parse_args()
    found = _loaded(args.experiment, args.results or [])
    if len(found) > 1:
        return _verdict(args.what, found, args.only, args.out)
    (experiment, results), path = found[0], found[0][1].path
    only = () if args.only is None else tuple(args.only.split(","))
    for name in only:
        if name not in experiment.arms:
            raise UserError("--only", name, "is no arm", f"name some of {', '.join(experiment.arms)}")
    if args.what == "report" and only:
        raise UserError("--only", args.only, "is not for a report, which is of all arms", "leave it out")
    if args.jobs < 1:
        raise UserError("--jobs", args.jobs, "runs nothing", "give 1 or more")
    if args.hours is not None and not args.hours > 0:
        raise UserError("--hours", args.hours, "is no time to run for", "give more than 0, or leave it out")
    if args.what == "run":
        _make("--work", args.work)
        _make("--results", path.parent)
    if args.out is not None:
        _make("--out", args.out)
    if args.what == "list":
        return _list(experiment, results, only)
    if args.what == "run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: runs save
        done = Runner(experiment, results, args.work, machine()).run(args.jobs, only, args.hours)
        return 0 if done else 75
    instants = args.what == "instants"
    judged = [group for group in groups(experiment, results) if not only or group.arm in only] if instants else []
    # A report groups runs itself, and tells of those that tune a rate too.
    if not (judged if instants else any(results.get(job) for job in jobs(experiment, results.loss_of))):
        problem = f"holds no run that {args.experiment[0]} asks for{f' of {args.only}' if only else ''}"
        raise UserError("--results", path, problem, "run the experiment first, or name the file that does")
    if instants:
        from benchmarks.growth.instants import instants_table

        say(instants_table(experiment, judged))
        return 0
    from benchmarks.growth.write_up import report

    say(report(experiment, results, args.out))
    return 0


def _loaded(paths: Sequence[Path], named: Sequence[Path]) -> list[tuple[Experiment, Results]]:
    """Experiments with their results, which are read from the files that are named or from those beside them."""
    if named and len(named) != len(paths):
        problem = f"are {len(named)} file(s) for {len(paths)} experiment(s)"
        raise UserError("--results", ", ".join(map(str, named)), problem, "name one for each, or none")
    found = []
    for number, path in enumerate(paths):
        experiment = load_experiment(path)
        file = named[number] if named else path.parent / "results" / f"{experiment.name}.jsonl"
        if file.is_dir():
            raise UserError("--results", file, "is no file of results", "name one")
        found.append((experiment, Results(file)))
    return found


def _verdict(what: str, found: Sequence[tuple[Experiment, Results]], only: str | None, out: Path | None) -> int:
    """Of two scales or more."""
    if what != "report":
        raise UserError("experiment", ", ".join(one.name for one, _ in found), f"are several to {what}", "name one")
    for option, value in (("--only", only), ("--out", out)):
        if value is not None:
            raise UserError(option, value, "is not for a verdict, which is one table of all arms", "leave it out")
    from benchmarks.growth.verdict import verdict_table

    say(verdict_table(found))
    return 0


def _make(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(option, folder, f"is no directory to write to ({error.strerror})", "name another") from error


def _list(experiment: Experiment, results: Results, only: tuple[str, ...]) -> int:
    total = left = 0.0
    for job in jobs(experiment, results.loss_of, only):
        result, flops = results.get(job), job.budget * experiment.budget
        total += flops
        left += 0 if result else flops
        print(f"{job.label:<48} {flops:.2e} FLOPs  {f'loss {result.loss:.4f}' if result else 'to do'}")
    arms = {arm: spec for arm, spec in experiment.arms.items() if not only or arm in only}
    waiting = sum(
        any(best_rate(experiment, arm, budget, results.loss_of) is None for budget in spec.budgets)
        for arm, spec in arms.items()
    )
    later = f"; {waiting} of {len(arms)} arms wait for a learning rate and come on top" if waiting else ""
    print(f"{total:.2e} FLOPs in all, {left:.2e} to do, before what runs share is counted once{later}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
