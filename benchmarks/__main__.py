"""Measures what docs/performance.md shows.

python -m benchmarks                          # on a CPU, some half an hour on 2 quiet cores; `make bench`
python -m benchmarks --gpu                    # on NVIDIA GPUs
python -m benchmarks --only layouts,growth

Each figure is a ratio of two arms, whose processes stay alive and take turns; the median of the rounds' ratios counts.
On GPUs one arm comes after the other, so that each has the memory to itself.
Writes the tables to the screen and, with machine, date and commit, to --json, whose other parts stay. `make bench`
keeps them in benchmarks/measured.json, and makes the tables of docs/performance.md from that. On a CPU a rank
computes on one thread.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import (
    conversion,
    generation,
    growth_stall,
    kernels,
    others,
    preprocessing,
    record,
    saving,
    scale,
    starting,
    telling,
    training,
)
from benchmarks.checkout import commit
from benchmarks.comparisons import Comparison, markdown
from megabus.command import Parser, run

Suite = Callable[[int, bool], list[Comparison]]
CPU: dict[str, Suite] = {
    "kernels": kernels.kernels,
    "step": training.step_times,
    "documents": training.documents,
    "layouts": training.layouts,
    "sizes": training.sizes,
    "growth": growth_stall.growths,
    "telling": telling.telling,
    "others": others.others,
    "generate": generation.generation,
    "save": saving.saves,
    "convert": conversion.conversions,
    "start": starting.starts,
    "scale": scale.scale,
    "preprocess": preprocessing.preprocessing,  # last: `datasets` starts threads, and the others' ranks are forked
}
ON_DEMAND: dict[str, Suite] = {"blocks": training.blocks, "large": others.large}  # on a CPU, where --only names them
GPU: dict[str, Suite] = {
    "kernels": kernels.kernels,
    "step": training.gpu_step_times,
    "blocks": training.blocks,
    "documents": training.documents,
    "mfu": training.mfu,
    "layouts": training.layouts,
    "growth": growth_stall.growths,
    "others": others.others,
}

MISSING: dict[str, Callable[[], str | None]] = {
    "others": others.missing,
    "generate": generation.missing,
    "preprocess": preprocessing.missing,
}


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return f"{os.cpu_count()} cores, {name}"


def main() -> int:
    parser = Parser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the suite for NVIDIA GPUs")
    parser.add_argument(
        "--only", metavar="NAME,...", help=f"of {', '.join(CPU | ON_DEMAND)}; with --gpu of {', '.join(GPU)}"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="of a comparison (%(default)s); growth at most 2, convert, start and preprocess 3",
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, no targets: does it run at all?")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    if not args.gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    suites = GPU if args.gpu else CPU | ON_DEMAND
    names = [name.strip() for name in args.only.split(",")] if args.only else list(GPU if args.gpu else CPU)
    for name in names:
        if name not in suites:
            parser.error(f"--only: {name!r} is none of {', '.join(suites)}")
        if (problem := MISSING.get(name, lambda: None)()) is not None:
            parser.error(f"{name}: {problem}")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is none")
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
            record.read(args.json)
        except OSError as error:
            parser.error(f"--json: {args.json} cannot be written ({error.strerror})")
        except ValueError:
            parser.error(f"--json: {args.json} holds something that is no record; name another file")
    import torch

    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU that torch can use")
    facts: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "commit": commit()}
    print(", ".join(facts.values()), flush=True)
    for name in names:
        facts |= {"date": f"{datetime.datetime.now():%Y-%m-%d}", "load": os.getloadavg()[0]}
        began = time.monotonic()
        found = suites[name](args.rounds, args.small)
        found = [replace(row, target="") for row in found] if args.small else found
        print(f"\n{name}\n\n{markdown(found)}", flush=True)
        if args.json:  # after every part: a long run that is stopped keeps what it has
            part = f"gpu {name}" if args.gpu else name
            record.keep(args.json, part, found, facts | {"seconds": time.monotonic() - began})
    if args.json and args.json.resolve() == record.OURS:
        record.fill()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
