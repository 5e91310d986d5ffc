"""What speaks against a run before anything of it is made, opened or measured: its configuration, and what the
checkpoint says that it would go on or begin from."""

from __future__ import annotations

from typing import NamedTuple

from megabus.checkpoint.contents import Found, look
from megabus.checkpoint.load import checkpoint_at
from megabus.checkpoint.manifest import DamagedError
from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig, Stage
from megabus.config.effects import unheeded
from megabus.errors import warn
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.outlook import outlook
from megabus.parallel.agree import rank_0_says, rank_0_tells
from megabus.train.overtaken import check_growths
from megabus.train.resume import check_begins, check_stage


class Foreseen(NamedTuple):
    """Lines to tell before training."""

    said: list[str]
    warned: list[str]

    def tell(self) -> None:
        """On rank 0."""
        for line in self.said:
            rank_0_says(line)
        for line in self.warned:
            rank_0_says(line, warn)


def foresee(config: RunConfig, stages: list[Stage]) -> Foreseen:
    """Raises `UserError` on all ranks where the run cannot be what its configuration says. Collective.

    Of checkpoints only what they say is read, and damaged ones are passed over: they are told of when they are set
    aside.
    """
    return rank_0_tells(lambda: _foreseen(config, stages))


def _foreseen(config: RunConfig, stages: list[Stage]) -> Foreseen:
    KappaMonitor(config.growth.trigger)  # which asks for what its predictor needs
    said = outlook(stages, config.growth.trigger)
    if complete(checkpoints_of(config.run_dir)):
        found = _newest(config)
        if found is not None and config.resume != "never":
            check_stage(found, config, stages)
        return Foreseen(said, unheeded(config))
    if config.init_from is not None:
        check_begins(look(checkpoint_at(config.init_from)), stages[0])
    return Foreseen(said, [*unheeded(config), *check_growths(config, stages)])


def _newest(config: RunConfig) -> Found | None:
    """Of the run's checkpoints, the newest that says what a checkpoint can say."""
    for folder in complete(checkpoints_of(config.run_dir)):
        try:
            return look(folder)
        except DamagedError:
            if config.resume == "strict":
                return None
    return None
