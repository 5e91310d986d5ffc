"""Write curves, growths, faults and configurations of runs on one page, for a browser without a network.

  megabus report runs/demo
  megabus report runs/a runs/b --out compared

Runs that still go on can be reported too.
"""

from __future__ import annotations

from collections.abc import Sequence

from megabus.command import Parser
from megabus.errors import UserError
from megabus.extras import need
from megabus.pathname import path_text


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus report", description=__doc__)
    parser.add_argument("run_dirs", type=path_text, nargs="+", metavar="RUN_DIR", help="directory of a run")
    parser.add_argument(
        "--out", type=path_text, help="folder for report.html and its PNGs (default: RUN_DIR, where there is one)"
    )
    args = parser.parse_args(argv)
    if args.out is None and len(args.run_dirs) > 1:
        raise UserError("RUN_DIR", " ".join(args.run_dirs), "are several runs", "name a folder for the page: --out DIR")
    if args.out is not None and args.out.endswith(".html"):
        raise UserError("--out", args.out, "names a page", "name the folder that report.html shall be in")
    need("report", "command", "report")
    from megabus.report.page import write_report

    print(write_report(args.run_dirs, args.run_dirs[0] if args.out is None else args.out))
    return 0
