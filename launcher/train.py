"""Train a model, growing it on the way. Started by a launcher, one process a device:

deepspeed --num_accelerators 4 launcher/train.py --config configs/demo.yaml [key=value ...]
torchrun --nproc-per-node 4 launcher/train.py --config configs/demo.yaml [key=value ...]

With --preflight-only nothing is trained: it shows what the preflight finds (docs/preflight.md), and leaves nothing.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabus.command import RankParser, end_rank, tell_outcome
from megabus.config import load_config, resolve_stages
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed


def main() -> int:
    prepare_environment()
    parser = RankParser(description="Train a model that grows while it trains.")
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--preflight-only", action="store_true", help="check everything, train nothing")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    resolve_stages(config, int(os.environ["WORLD_SIZE"]))  # bad input ends here, before anything heavy is imported
    # Later than the watchdog, which shows where the ranks hang.
    start_distributed(timedelta(seconds=config.faults.hang_timeout + 60))
    if args.preflight_only:
        from megabus.train.run import check_only

        check_only(config)
        stop_distributed()
        return 0
    from megabus.train.loop import train

    outcome = train(config)
    if os.environ["RANK"] == "0" and outcome.stopped:
        print(f"stopped and saved: {outcome.checkpoint}; the same command goes on from there")
        tell_outcome("stopped")
    elif os.environ["RANK"] == "0":
        from megabus.train.plots import plot_loss, summary_table
        from megabus.train.report.page import write_page

        picture = plot_loss([config.run_dir], Path(config.run_dir) / "loss.png")
        report = write_page([config.run_dir], config.run_dir)
        print(f"\n{summary_table(config.run_dir)}\n\nplot:       {picture}\nreport:     {report}")
        print(f"checkpoint: {outcome.checkpoint}")
        tell_outcome("finished")
    stop_distributed()
    return config.faults.stop_exit_code if outcome.stopped else 0


if __name__ == "__main__":
    end_rank(main)
