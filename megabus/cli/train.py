"""Train a model, growing it on the way: in this process, or in several, one a device.

  megabus train --config run.yaml layout.dp=1 layout.tp=1 layout.pp=1
  megabus train --nproc-per-node 4 --config run.yaml optimizer.lr=2e-3
  torchrun --nnodes 2 --nproc-per-node 8 ... -m megabus train --config run.yaml
  deepspeed --module --no_local_rank megabus train --config run.yaml

With --preflight-only nothing is trained: it shows what the preflight finds (docs/preflight.md), and leaves nothing
but what callbacks of your own write when they are made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from megabus.checkpoint.begun import growths_begun_with, stage_begun
from megabus.cli.ranks import check_ranks, start_ranks
from megabus.command import RankParser, tell_outcome
from megabus.config import load_config, resolve_stages
from megabus.engine.startup import importing, prepare_environment, start_distributed, stop_distributed
from megabus.errors import UserError, say, warn
from megabus.extras import SINKS, need, need_sink
from megabus.pathname import path_text


def main(argv: Sequence[str]) -> int:
    parser = RankParser(prog="megabus train", description=__doc__)
    parser.add_argument("--config", type=path_text, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--preflight-only", action="store_true", help="check everything, train nothing")
    args = parser.parse_intermixed_args(argv)
    check_ranks(args.nproc_per_node)
    config = load_config(args.config, args.overrides)
    world = args.nproc_per_node or int(os.environ.get("WORLD_SIZE", "1"))
    # Bad input ends here, before anything heavy is imported.
    resolve_stages(config, world, begun_with=partial(growths_begun_with, config), begun_at=partial(stage_begun, config))
    # Of rank 0 alone, which writes them: the other machines need neither.
    writes = args.nproc_per_node is not None or os.environ.get("RANK", "0") == "0"
    for name in SINKS:
        if writes and getattr(config.log, name):
            need_sink(name)
    if args.nproc_per_node is not None:
        return start_ranks(args.nproc_per_node, "train", argv, "megabus.train.loop")
    prepare_environment(config.train.deterministic)
    # The watchdog, which shows where the ranks hang, ends them sooner once they have met.
    start_distributed(timedelta(seconds=config.faults.hang_timeout))
    if args.preflight_only:
        from megabus.train.run import check_only

        check_only(config)
        stop_distributed()
        return 0
    with importing():
        from megabus.train.callbacks import CallbackError
        from megabus.train.loop import Outcome, train

    failure = None
    try:
        outcome = train(config)
    except CallbackError as error:
        if error.complete is None:
            raise
        outcome, failure = Outcome(error.complete, stopped=False), error  # its table and page are as good as any
    if os.environ["RANK"] == "0" and outcome.stopped:
        if outcome.checkpoint is None:
            say("stopped during the start, before anything was trained; the same command starts again")
        else:
            say(f"stopped and saved: {outcome.checkpoint}; the same command goes on from there")
        tell_outcome("stopped")
    elif os.environ["RANK"] == "0":
        tell_outcome("finished")
        try:
            _show(config.run_dir)
        except UserError as error:  # no reason to call a run failed that has trained to its end
            warn(f"no picture or no page: {error}; `megabus report {config.run_dir}` draws them")
        say(f"checkpoint: {outcome.checkpoint}")
    stop_distributed()
    if failure is not None:
        raise failure
    return config.faults.stop_exit_code if outcome.stopped else 0


def _show(run_dir: str) -> None:
    from megabus.report.plots import plot_loss, summary_table

    say(f"\n{summary_table(run_dir)}\n")
    need("report", "run_dir", run_dir, "the run is complete without it")
    from megabus.report.page import write_page

    say(f"plot:       {plot_loss([run_dir], Path(run_dir) / 'loss.png')}")
    say(f"report:     {write_page([run_dir], run_dir)}")
