"""Training from Python: what `megabus train` does in a rank, in the process that calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.config import RunConfig, load_config, parse_config
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed

if TYPE_CHECKING:
    from megabus.train.callbacks import Callback
    from megabus.train.loop import Outcome


def train(config: RunConfig | Mapping[str, Any] | str | Path, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train to the end of the budget, from the run's newest checkpoint if there is one.

    config: a run's, the keys of one, or its YAML file. callbacks: beside those that it names. This process is one rank:
    the only one, or one of those that torchrun started, which all call this. Raises `UserError` for bad input, and
    where a callback ends the run.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    elif not isinstance(config, RunConfig):
        config = parse_config(dict(config))
    prepare_environment(config.train.deterministic)
    import torch

    joined = torch.distributed.is_initialized()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # where torch was imported before
    start_distributed(timedelta(seconds=config.faults.hang_timeout))
    from megabus.train.loop import train as train_rank

    try:
        return train_rank(config, callbacks)
    finally:
        if not joined:
            stop_distributed(together=False)
