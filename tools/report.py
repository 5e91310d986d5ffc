"""One page about runs, for a browser without a network: `python tools/report.py RUN_DIR [RUN_DIR ...] --out DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that an uninstalled checkout works too

from megabus.command import Parser, run
from megabus.errors import UserError
from megabus.train.report.page import write_report


def main() -> int:
    parser = Parser(description="Curves, growths, faults and configurations of runs, on one page.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", help="folder for report.html and its PNGs (default: RUN_DIR, where there is one)")
    args = parser.parse_args()
    if args.out is None and len(args.run_dirs) > 1:
        raise UserError("RUN_DIR", " ".join(args.run_dirs), "are several runs", "name a folder for the page: --out DIR")
    if args.out is not None and args.out.endswith(".html"):
        raise UserError("--out", args.out, "names a page", "name the folder that report.html shall be in")
    print(write_report(args.run_dirs, args.out or args.run_dirs[0]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
