"""Prove that nothing is lost: kill small growing runs on 4 processes again and again, damage files, fill disks.

  megabus chaos
  megabus chaos --kills 100
  megabus chaos --kills 4 --damage 10 --seed 1

Exits non-zero if a run did not go on from its newest checkpoint, did not end with the very bits of the undisturbed
run, left a process hanging, or if damage was not found. Then what the runs have left is kept for a look.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megabus.command import Parser
from megabus.testing.chaos_ranks import prepare_parent

if TYPE_CHECKING:
    from megabus.testing.chaos import Kill, Workload

SUM_ROW = "{:<9}{:>5}{:>6}{:>9}{:>19}  {}"
KILL_ROW = "{:>4} {:>4} {:<9}{:<8}{:<14}{:<32}{:>4}{:>7}{:>8}{:>7}  {}"
DAMAGE_ROW = "{:<16}{:<14}{:>6}{:>9}{:>17}"
DISK_ROW = "{:<24}{:<17}{:>6}{:>7}{:>6}  {:<9} {}"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=36, help="at least so many (default: %(default)s)")
    parser.add_argument("--damage", type=int, default=100, help="damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of both (default: %(default)s)")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is mounted is unmounted
    prepare_parent()
    from megabus.testing.chaos import undisturbed
    from megabus.testing.chaos_runs import SCHEDULES, describe, make_corpora

    folder = Path(tempfile.mkdtemp(prefix="megabus-chaos-"))
    make_corpora(folder)
    for schedule in SCHEDULES:
        print(f"schedule {schedule}: {describe(schedule)}", flush=True)
    workloads = [undisturbed(folder, schedule) for schedule in SCHEDULES]
    failures = 0
    for title, part in (
        ("kills", lambda: _kills(workloads, folder, args.kills, args.seed)),
        ("damage", lambda: _damage(workloads, folder, args.damage, args.seed)),
        ("full disk", lambda: _full_disk(workloads, folder)),
    ):
        since = time.monotonic()
        failures += part()
        print(f"{title}: {time.monotonic() - since:.0f} s", flush=True)
    print(f"\n{failures or 'no'} failure(s) in {time.monotonic() - begun:.0f} s")
    if failures:
        print(f"what the runs have left is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failures > 0)


def _kills(workloads: Sequence[Workload], folder: Path, wanted: int, seed: int) -> int:
    from megabus.testing.chaos import kill_runs

    print(
        "\nA killed run ends by itself, goes on from its newest checkpoint, and ends with the undisturbed run's bits."
    )
    columns = (
        "kill",
        "run",
        "schedule",
        "ranks",
        "aimed at",
        "was in",
        "step",
        "newest",
        "resumed",
        "ended",
        "verdict",
    )
    print(KILL_ROW.format(*columns))
    numbers = itertools.count(1)

    def tell(kills: list[Kill]) -> None:
        for kill in kills:
            ranks = ",".join(map(str, sorted(kill.aim.victims)))
            resumed = "-" if kill.resumed is None else kill.resumed
            verdict = "; ".join(kill.problems[:3]) or "ok"
            cells = (next(numbers), kill.run, kill.schedule, ranks, kill.aim.phase.text, kill.real, kill.step)
            print(KILL_ROW.format(*cells, kill.newest or 0, resumed, f"{kill.seconds:.1f} s", verdict), flush=True)

    kills = kill_runs(workloads, folder, wanted, seed, tell)
    failed = sum(bool(kill.problems) for kill in kills) + (len(kills) < wanted)
    print()
    print(SUM_ROW.format("schedule", "runs", "kills", "failures", "last survivor", "killed in"))
    for workload in workloads:
        print(_sum(workload.schedule, [kill for kill in kills if kill.schedule == workload.schedule]))
    print(_sum("all", kills))
    print(f"{len(kills)} kills, {failed or 'no'} failure(s)")
    return failed


def _sum(name: str, kills: Sequence[Kill]) -> str:
    """What was aimed at is counted where it was hit."""
    phases = Counter(kill.aim.phase.text for kill in kills if kill.hit)
    missed = [f"another phase than was aimed at {len(kills) - phases.total()}"] if phases.total() < len(kills) else []
    hits = ", ".join([*(f"{phase} {count}" for phase, count in sorted(phases.items())), *missed])
    slowest = max((kill.seconds for kill in kills), default=0.0)
    runs, failed = len({kill.run for kill in kills}), sum(bool(kill.problems) for kill in kills)
    return SUM_ROW.format(name, runs, len(kills), failed, f"ended in {slowest:.1f} s", hits)


def _damage(workloads: Sequence[Workload], folder: Path, count: int, seed: int) -> int:
    from megabus.testing.chaos_faults import FILES, HOW, Finding, damages, find_damages

    print("\nA damaged file is named, and the newest good checkpoint is used instead; resume=strict refuses.")
    print(DAMAGE_ROW.format("file", "damage", "cases", "detected", "named by strict"))
    rng, findings = random.Random(seed), list[Finding]()
    for number, workload in enumerate(workloads):
        root = workload.run_dir / "checkpoints"
        share = count * (number + 1) // len(workloads) - count * number // len(workloads)
        findings += find_damages(root, folder / "damaged", damages(root, share, rng, first=len(findings)))
    for kind in FILES:
        for how in HOW:
            some = [finding for finding in findings if (finding.damage.kind, finding.damage.how) == (kind, how)]
            detected, strict = sum(f.detected for f in some), sum(f.strict_named for f in some)
            print(DAMAGE_ROW.format(kind, how, len(some), detected, strict))
    for finding in findings:
        if not finding.detected:
            print(f"not detected: {finding}")
    detected = sum(finding.detected for finding in findings)
    print(f"{detected} of {len(findings)} detected and named")
    return len(findings) - detected


def _full_disk(workloads: Sequence[Workload], folder: Path) -> int:
    from megabus.testing.chaos_faults import FULL_DISK_CASES, Disk, NoFiles, mounted

    print("\nA full disk costs no checkpoint, and once there is room the run ends with the undisturbed run's bits.")
    print(DISK_ROW.format("on_error", "disk", "saves", "kept", "rows", "verdict", "ends with"))
    print(DISK_ROW.format("", "", "lost", "step", "wait", "", ""))
    failed = 0
    with mounted(folder / "disk") as disk:
        for number, case in enumerate(FULL_DISK_CASES):
            disks: list[Disk] = [NoFiles(folder / f"refused-{number}", victim=number)]
            if disk is not None:
                disks.append(disk)
            for workload, place in zip([workloads[number % 2], workloads[1 - number % 2]], disks, strict=False):
                row = case(workload, place)
                verdict = "; ".join(row.problems[:3]) or "ok"
                cells = (row.case, row.disk, row.failed_saves, row.kept, "yes" if row.waited else "no", verdict)
                print(DISK_ROW.format(*cells, row.ending), flush=True)
                failed += bool(row.problems)
    return failed
