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
from megabus.errors import UserError, warn


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
        tell_outcome("finished")
        try:
            _show(config.run_dir)
        except UserError as error:  # no reason to call a run failed that has trained to its end
            warn(f"no picture or no page: {error}; `python tools/report.py {config.run_dir}` draws them")
        print(f"checkpoint: {outcome.checkpoint}")
    stop_distributed()
    return config.faults.stop_exit_code if outcome.stopped else 0


def _show(run_dir: str) -> None:
    from megabus.train.plots import plot_loss, summary_table
    from megabus.train.report.page import write_page

    print(f"\n{summary_table(run_dir)}\n")
    print(f"plot:       {plot_loss([run_dir], Path(run_dir) / 'loss.png')}")
    print(f"report:     {write_page([run_dir], run_dir)}")


if __name__ == "__main__":
    end_rank(main)
