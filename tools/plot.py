"""Plot and tabulate runs: `python tools/plot.py RUN_DIR [RUN_DIR ...] --out loss.png --x tokens`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that an uninstalled checkout works too

from megabus.command import Parser, run
from megabus.train.plots import plot_loss, summary_table


def main() -> int:
    parser = Parser(description="Loss curves and stages of runs, from their metrics.jsonl.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", default="loss.png", help="picture to write (default: %(default)s)")
    parser.add_argument("--x", choices=("flops", "tokens", "time"), default="flops", help="x axis")
    parser.add_argument("--log-x", action="store_true", help="shows small stages beside large ones")
    args = parser.parse_args()
    for run_dir in args.run_dirs:
        print(f"{run_dir}\n{summary_table(run_dir)}\n")
    print(plot_loss(args.run_dirs, args.out, args.x, args.log_x))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
