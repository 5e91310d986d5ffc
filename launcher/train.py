"""Train a model, growing it on the way. Started by a launcher, one process a device:

deepspeed --num_accelerators 4 launcher/train.py --config configs/demo.yaml [key=value ...]
torchrun --nproc-per-node 4 launcher/train.py --config configs/demo.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabus.config import load_config, resolve_stages
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed
from megabus.errors import UserError

PEER_GONE = ("closed by peer", "reset by peer")  # gloo's words for it
LOST = "lost the connection to another rank, which has probably ended: its log says why. The same command goes on."


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as any other bad input: once, not once a rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", " ".join(sys.argv[1:]), message, "see --help")


def main() -> int:
    prepare_environment()
    parser = Parser(description="Train a model that grows while it trains.")
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the file")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    resolve_stages(config, int(os.environ["WORLD_SIZE"]))  # bad input ends here, before anything heavy is imported
    # Later than the watchdog, which shows where the ranks hang.
    start_distributed(timedelta(seconds=config.faults.hang_timeout + 60))
    from megabus.train.loop import train

    outcome = train(config)
    if os.environ["RANK"] == "0" and outcome.stopped:
        print(f"stopped and saved: {outcome.checkpoint}; the same command goes on from there")
    elif os.environ["RANK"] == "0":
        from megabus.train.plots import plot_loss, summary_table

        picture = plot_loss([config.run_dir], Path(config.run_dir) / "loss.png")
        print(f"\n{summary_table(config.run_dir)}\n\nplot:       {picture}\ncheckpoint: {outcome.checkpoint}")
    stop_distributed()
    return config.faults.stop_exit_code if outcome.stopped else 0


def run() -> int:
    """`main`, with bad input told in one line, by rank 0 alone."""
    rank = os.environ.get("RANK", "0")
    try:
        return main()
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if any(words in str(error) for words in PEER_GONE):
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"rank {rank}: {LOST} ({where.name}: {str(error).splitlines()[0]})", file=sys.stderr)
            return 1
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after an error the communication threads would wait for ranks that are gone.
    os._exit(code)
