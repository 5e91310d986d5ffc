"""What a GPU must do right, and how fast it is: at most 9 minutes on one GPU (`make gpu-check`).

python -m benchmarks.gpu_check
python -m benchmarks.gpu_check --only software,kernels
DS_ACCELERATOR=cpu python -m benchmarks.gpu_check --small      # does it run at all?

Parts come in the order of their worth, each in a process of its own with a time of its own. One that fails or is late
is told, and the others go on. What a part finds is in runs/gpu-check/PART.json as soon as it is found. Where software,
kernels, steps, growth and resume pass on a GPU, it is recorded in megabus/kernels/checked_devices.json: from then on
`train.kernels: auto` takes Triton's kernels on such a GPU. Commit that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.part import DONE, Part, PartResult, run_part
from megabus.command import Parser, run
from megabus.engine.startup import on_gpu
from megabus.table import aligned

LIMIT = 540.0  # seconds of all parts
RESULTS = Path("runs/gpu-check")


def parts() -> list[Part]:
    from benchmarks.gpu_check import attention, kernels, runs, software, speed, steps

    return [
        Part("software", software.software, 45, decides=True),
        Part("kernels", kernels.kernels, 80, decides=True),
        Part("steps", steps.steps, 80, decides=True),
        Part("growth", steps.growth_bits, 30, decides=True),
        Part("resume", runs.resume, 100, decides=True),
        Part("step_times", speed.step_times, 120, decides=False),
        Part("profile", speed.profile, 45, decides=False),
        Part("attention", attention.attention, 45, decides=False),
        Part("stall", runs.stall, 60, decides=False),
        Part("compiled", kernels.compiled, 80, decides=False),
    ]


def main() -> int:
    parser = Parser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME,...", help="some of the parts")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU; nothing is recorded")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of all parts (%(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for what is found (%(default)s)")
    args = parser.parse_args()
    all_parts = parts()
    names = args.only.split(",") if args.only else [part.name for part in all_parts]
    for name in names:
        if name not in {part.name for part in all_parts}:
            parser.error(f"--only: {name!r} is none of {', '.join(part.name for part in all_parts)}")
    gpu = on_gpu()
    if not gpu and not args.small:
        parser.error("there is no GPU that torch can use; --small runs tiny sizes on the CPU")
    if not gpu:
        from megabus.testing.ranks import preload

        os.environ["DS_ACCELERATOR"] = "cpu"
        preload()  # the parts are forked from here
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in all_parts if part.name in names]
    for part in chosen:
        clear(args.out, part)
    found: dict[Part, PartResult] = {}
    until = time.monotonic() + args.seconds
    for part in chosen:
        begun = time.monotonic()
        found[part] = run_part(part, args.out, args.small, min(part.seconds, until - begun))
        print(f"{part.name}: {found[part].state}, {time.monotonic() - begun:.0f} s", flush=True)
    print("\n" + table(found))
    print("\n" + verdict(all_parts, found, args.out, gpu and not args.small))
    late = [part.name for part, result in found.items() if part.is_only_late(result)]
    if late:
        print(f"not measured to the end, for lack of time: {', '.join(late)}")
    return int(bool(_bad(found)))


def _bad(found: dict[Part, PartResult]) -> list[str]:
    return [part.name for part, result in found.items() if not part.passed(result) and not part.is_only_late(result)]


def clear(out: Path, part: Part) -> None:
    """Remove what a part has left there when it ran before; all else in the folder stays."""
    for ending in (".json", ".new", ".log"):
        (out / f"{part.name}{ending}").unlink(missing_ok=True)
    if (out / part.name).is_dir():
        shutil.rmtree(out / part.name)


def table(found: dict[Part, PartResult]) -> str:
    """A row for everything that was found."""
    marks = {True: "right", False: "WRONG", None: ""}
    rows = []
    for part, result in found.items():
        rows += [[part.name, what, text, marks[ok]] for what, text, ok in result.rows]
        if result.state != DONE:
            rows.append([part.name, "the part itself", result.state, "" if part.is_only_late(result) else "NOT DONE"])
    return aligned(["part", "what", "found", ""], [[cell or "–" for cell in row] for row in rows], {0, 1, 2, 3})


def verdict(all_parts: list[Part], found: dict[Part, PartResult], out: Path, counts: bool) -> str:
    """Whether it has passed; where it counts, that is recorded."""
    if not counts:
        bad = _bad(found)
        return f"{'not passed: ' + ', '.join(bad) if bad else 'passed'}; nothing is recorded of tiny sizes"
    missing = [part.name for part in all_parts if part.decides and not (part in found and part.passed(found[part]))]
    if missing:
        return f"nothing is recorded, for these did not pass or did not run: {', '.join(missing)}"
    from megabus.kernels.checked import RECORDS, record

    device = next(result.facts["device"] for result in found.values() if "device" in result.facts)
    (out / "record.json").write_text(json.dumps(device, indent=1) + "\n")
    try:
        record(device, f"{datetime.date.today()}", RECORDS)
    except OSError as error:
        entry = f"add what {out / 'record.json'} says, with today's date"
        return f"passed, and {RECORDS} cannot be written ({error.strerror}): {entry}, to that file in your checkout"
    return (
        f"recorded in {RECORDS}, for you to commit: train.kernels = auto takes Triton's kernels on {device['device']}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
