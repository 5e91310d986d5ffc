"""Submit a training run, or a sweep of runs, to slurm. It saves before the time limit, is queued again, and goes on.

  megabus submit --nodes 16 --gpus-per-node 8 --time 24:00:00 --config configs/ngpt_1b.yaml [key=value ...]
  megabus submit --gpus-per-node 0 --ranks-per-node 4 --config configs/demo.yaml --dry-run
  megabus submit --gpus-per-node 8 --config configs/gpt_64m.yaml --array optimizer.lr=1e-3,2e-3

docs/cluster.md says what the job does and what its exit codes mean.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megabus.checkpoint.begun import growths_begun_with, stage_begun
from megabus.command import Parser
from megabus.config import RunConfig, load_config, resolve_stages
from megabus.durable import make_directory
from megabus.errors import UserError
from megabus.pathname import path_text
from megabus.slurm.render import Job, Member, render, seconds
from megabus.slurm.sweep import expand, folder

SBATCH_OPTIONS = ("time", "partition", "account", "qos", "constraint", "mem")
# What the job script says already: another value would break saving and queueing again, or the checks here.
OURS = {
    *("-J", "-N", "-c", "-o", "-a", "-t", "-p", "-A", "-q", "-C", "--job-name", "--nodes", "--ntasks-per-node"),
    *("--cpus-per-task", "--gres", "--output", "--open-mode", "--signal", "--requeue", "--no-requeue", "--array"),
    *(f"--{name}" for name in SBATCH_OPTIONS),
}
LONGEST_GRACE = 65535  # seconds: slurm keeps it in 16 bits


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    job = make_job(args)
    script = render(job)
    if args.dry_run:
        print(script, end="")
    else:
        number = submit(script, job.logs)
        runs = f"{len(job.members)} runs" if job.is_array else job.members[0].run_dir
        print(f"job {number}: {runs}; logs in {job.logs}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="megabus submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--config", type=path_text, required=True, help="YAML file; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, and submit nothing")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun", help="(%(default)s)")
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=_positive, default=1, help="machines (%(default)s)")
    size.add_argument("--gpus-per-node", type=_count, required=True, help="0 computes on CPUs")
    size.add_argument("--ranks-per-node", type=_positive, help="as many as GPUs when left out")
    size.add_argument("--cpus-per-rank", type=_positive, help="4 beside a GPU and 1 without when left out")
    size.add_argument("--mem", help="memory of each node, as sbatch has it")
    queue = parser.add_argument_group("queue")
    queue.add_argument("--time", help="the limit, as sbatch has it")
    queue.add_argument("--partition", help="as sbatch has it")
    queue.add_argument("--account", help="as sbatch has it")
    queue.add_argument("--qos", help="as sbatch has it")
    queue.add_argument("--constraint", help="as sbatch has it")
    queue.add_argument("--job-name", help="the name of the file when left out")
    queue.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other: --sbatch=--exclusive"
    )
    queue.add_argument("--grace", type=_positive, default=300, help="seconds before the time limit to save at (300)")
    queue.add_argument("--no-requeue", action="store_true", help="never queue the job again")
    queue.add_argument("--max-restarts", type=_count, default=3, help="failures in a row without a new checkpoint (3)")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--array", action="append", default=[], metavar="SWEEP", help="key=value,value or a file")
    sweep.add_argument("--at-once", type=_positive, help="most members that run at the same time")
    node = parser.add_argument_group("environment of the job")
    node.add_argument("--setup", action="append", default=[], metavar="LINE", help="bash, e.g. 'module load cuda'")
    node.add_argument("--python", default=sys.executable, help="on every node; this one when left out")
    return parser.parse_intermixed_args(argv)


def make_job(args: argparse.Namespace) -> Job:
    """The job, once every run of it has been found sound. Raises `UserError` for the first that is not."""
    ranks = args.ranks_per_node or args.gpus_per_node
    if ranks == 0:
        raise UserError("--gpus-per-node", 0, "leaves open how many ranks a node has", "give --ranks-per-node")
    if args.gpus_per_node and ranks > args.gpus_per_node:
        problem = f"exceeds the {args.gpus_per_node} GPU(s) of a node"
        raise UserError("--ranks-per-node", ranks, problem, "give each rank a GPU of its own, or none any")
    if args.time is not None and seconds(args.time) <= args.grace:
        problem = f"is not longer than the {args.grace} s before it at which the run is told to save"
        raise UserError("--time", args.time, problem, "give more time, or less --grace")
    for option in args.sbatch:
        name = option.partition("=")[0] if option.startswith("--") else option[:2]
        if name in OURS or not option.startswith("-"):
            problem = "is written by this program itself" if name in OURS else "does not begin with a dash"
            raise UserError(
                "--sbatch", option, problem, "see --help for what there is, and write others as --sbatch=--name"
            )
    if args.grace > LONGEST_GRACE:
        raise UserError("--grace", args.grace, "is more than slurm takes", f"give at most {LONGEST_GRACE}")
    if args.at_once is not None and not args.array:
        raise UserError("--at-once", args.at_once, "is of a sweep", "give --array, or leave it out")
    config = _sound(args, args.overrides, args.nodes * ranks)
    members = [Member(config.run_dir, tuple(_forced(config)))]
    if args.array:
        members = [
            _member(args, config, number, changes, args.nodes * ranks)
            for number, changes in enumerate(expand(args.array, args.overrides))
        ]
    return Job(
        name=args.job_name or Path(args.config).stem,
        directory=Path.cwd(),
        logs=Path(config.run_dir).absolute() / "slurm",
        python=args.python,
        launcher=args.launcher,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        ranks_per_node=ranks,
        cpus_per_node=ranks * (args.cpus_per_rank or (4 if args.gpus_per_node else 1)),
        arguments=("--config", args.config, *args.overrides),
        members=tuple(members),
        is_array=bool(args.array),
        grace=args.grace,
        requeue=not args.no_requeue,
        max_restarts=args.max_restarts,
        options={name: value for name in SBATCH_OPTIONS if (value := getattr(args, name)) is not None},
        extra=tuple(args.sbatch),
        at_once=args.at_once,
        setup=tuple(args.setup),
    )


def submit(script: str, logs: Path) -> str:
    """Hand the script to sbatch; the job's number. Makes the directory of the logs, without which slurm starts none."""
    made = make_directory("run_dir", logs)
    try:
        said = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        with contextlib.suppress(OSError):  # another has put something there meanwhile
            for path in made:
                path.rmdir()
        if isinstance(error, subprocess.CalledProcessError):
            remedy = "change the options, or submit where slurm answers (`sinfo` tells)"
            raise UserError("sbatch", error.returncode, error.stderr.strip(), remedy) from error
        problem = f"cannot be run ({error.strerror})"
        raise UserError("sbatch", "sbatch", problem, "submit where slurm is installed, or see --dry-run") from error
    return said.stdout.strip().split(";")[0]  # behind it a federation writes the cluster


def _member(args: argparse.Namespace, base: RunConfig, number: int, changes: list[str], world: int) -> Member:
    """One run of a sweep, in a directory of its own."""
    run_dir = f"{base.run_dir}/{folder(number, changes)}"
    return Member(run_dir, (*changes, *_forced(_sound(args, [*args.overrides, *changes], world))))


def _sound(args: argparse.Namespace, overrides: Sequence[str], world: int) -> RunConfig:
    config = load_config(args.config, overrides)
    resolve_stages(config, world, begun_with=partial(growths_begun_with, config), begun_at=partial(stage_begun, config))
    if config.resume == "never" and not args.no_requeue:
        problem = "refuses to go on when the job is queued again"
        raise UserError("resume", config.resume, problem, "write resume=auto, or give --no-requeue")
    return config


def _forced(config: RunConfig) -> list[str]:
    """What the job needs otherwise than the file has it."""
    # The job ends with a code of its own; launchers take one of a rank for a failure, and kill the others.
    return ["faults.stop_exit_code=0"] if config.faults.stop_exit_code else []


def _count(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least}")
    return int(text)
