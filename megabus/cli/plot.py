"""Draw the loss curves of runs, and print a table of their stages, from their metrics.jsonl.

  megabus plot runs/demo
  megabus plot runs/a runs/b --out loss.png --x tokens --log-x

Runs that still go on can be drawn too.
"""

from __future__ import annotations

from collections.abc import Sequence

from megabus.command import Parser
from megabus.extras import need
from megabus.pathname import path_text
from megabus.report.plots import plot_loss, summary_table


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus plot", description=__doc__)
    parser.add_argument("run_dirs", type=path_text, nargs="+", metavar="RUN_DIR", help="directory of a run")
    parser.add_argument("--out", type=path_text, default="loss.png", help="picture to write (default: %(default)s)")
    parser.add_argument("--x", choices=("flops", "tokens", "time"), default="flops", help="x axis")
    parser.add_argument("--log-x", action="store_true", help="shows small stages beside large ones")
    args = parser.parse_args(argv)
    need("report", "command", "plot")
    for run_dir in args.run_dirs:
        print(f"{run_dir}\n{summary_table(run_dir)}\n")
    print(plot_loss(args.run_dirs, args.out, args.x, args.log_x))
    return 0
