"""Show that the preflight finds what is wrong: plant a fault in a small run on 4 processes, check it, and look.

  megabus preflight-faults
  megabus preflight-faults --table

Prints what each preflight said of its fault, and exits non-zero if one was not found or a sound run was not passed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megabus.command import Parser
from megabus.testing.chaos_ranks import prepare_parent


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus preflight-faults", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print every preflight's whole table")
    args = parser.parse_args(argv)
    begun, missed = time.monotonic(), 0
    prepare_parent()
    from megabus.testing.preflight_faults import FAULTS, NONE, check, problems, row_of

    with tempfile.TemporaryDirectory(prefix="megabus-preflight-") as folder:
        ranks = check(NONE, Path(folder) / "sound")
        sound = all(rank.error is None for rank in ranks) and "nothing refused, no warning(s)" in ranks[0].out
        print(
            f"a sound run: {'passed' if sound else 'NOT PASSED'}\n\n{ranks[0].out.replace(folder, '...')}", flush=True
        )
        for number, fault in enumerate(FAULTS, start=1):
            ranks = check(fault, Path(folder) / str(number))
            wrong = problems(fault, ranks)
            missed += bool(wrong)
            print(f"{number}. {fault.name}: {'; '.join(wrong) or 'found'}")
            said = ranks[0].out.rstrip() if args.table else row_of(ranks[0].out, fault.check)
            print("\n".join(f"   {line}" for line in said.replace(folder, "...").splitlines()), flush=True)
    print(f"\n{len(FAULTS) - missed} of {len(FAULTS)} faults found in {time.monotonic() - begun:.0f} s")
    return int(missed > 0 or not sound)
