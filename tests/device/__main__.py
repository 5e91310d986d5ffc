"""Run cases on the GPU of shapes, and print what each asks of the device.

python -m tests.device            # those of the suite, and first and last rank of more layouts: some minutes
python -m tests.device --each     # the same, and each thing that a run does apart
python -m tests.device --suite    # those of the suite
python -m tests.device --sizes    # a micro batch of each shipped size, in plain and in Triton's kernels: minutes
python -m tests.device --write    # those of the suite, whose steps become the bound that the suite holds them to
"""

from __future__ import annotations

import argparse
import sys

from megabus.testing.ranks import preload
from tests.device.cases import CASES, MORE, look_at
from tests.device.judge import problems
from tests.device.micro_batch import SIZES, counted
from tests.device.micro_batch import lines as size_lines
from tests.device.step_table import lines, summary, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="only the cases of the suite")
    parser.add_argument("--each", action="store_true", help="each thing that a run does apart")
    parser.add_argument("--write", action="store_true", help="store what their steps ask for as the bound")
    parser.add_argument("--sizes", action="store_true", help="a micro batch of each shipped size")
    args = parser.parse_args()
    preload()
    if args.sizes:
        print("\n".join(size_lines(zip(SIZES, counted(SIZES), strict=True))))
        return 0
    cases = CASES if args.suite or args.write else [*CASES, *MORE]
    seen = dict(zip(cases, look_at([(case,) for case in cases]), strict=True))
    print("\n".join(lines(seen) if args.each else summary(seen)))
    if args.write:
        write(seen)
    wrong = [f"{case}: {problem}" for case, found in seen.items() for problem in problems(case, found)]
    print("\n".join(wrong) if wrong else f"of {len(seen)} cases none waits, keeps or sends what it should not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
