"""What speaks against a run before anything of it is made, opened or measured: its configuration, and what the
checkpoint says that it would go on or begin from."""

from __future__ import annotations

from typing import NamedTuple

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from megabus.checkpoint.contents import Found, look
from megabus.checkpoint.manifest import DamagedError
from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig, Stage
from megabus.config.effects import unheeded
from megabus.config.stages import stage_section
from megabus.engine.startup import local_ranks
from megabus.errors import UserError, warn
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.outlook import outlook
from megabus.model.cost import count_parameters
from megabus.parallel.agree import rank_0_says, rank_0_tells
from megabus.preflight.findings import size_text
from megabus.train.on_gpu import check_deterministic, slow_heads
from megabus.train.overtaken import check_growths
from megabus.train.resume import check_begins, check_stage


class Notes(NamedTuple):
    """Lines to tell before training."""

    said: list[str]
    warned: list[str]

    def tell(self) -> None:
        """On rank 0."""
        for line in self.said:
            rank_0_says(line)
        for line in self.warned:
            rank_0_says(line, warn)


def check_before(config: RunConfig, stages: list[Stage]) -> Notes:
    """Raises `UserError` on all ranks where the run cannot be what its configuration says. Collective.

    Of checkpoints only what they say is read, and damaged ones are passed over: they are told of when they are set
    aside.
    """
    return rank_0_tells(lambda: _checked(config, stages))


def _checked(config: RunConfig, stages: list[Stage]) -> Notes:
    KappaMonitor(config.growth.trigger)  # which asks for what its predictor needs
    said = outlook(stages, config.growth.trigger)
    warned = _of_device(config, stages)
    _check_memory(config, stages)  # before a preflight, which looks more closely and takes longer for it
    if complete(checkpoints_of(config.run_dir)):
        found = None if config.resume == "never" else _newest(config)
        if found is not None:
            check_stage(found, config, stages)
        return Notes(said, [*unheeded(config), *warned])
    if config.init_from is not None:
        from megabus.convert.begin import read_description  # slow to import, and most runs begin with nothing

        check_begins(read_description(config.init_from), stages[0], config.extend_vocabulary)
    return Notes(said, [*unheeded(config), *warned, *check_growths(config, stages)])


def _of_device(config: RunConfig, stages: list[Stage]) -> list[str]:
    """What the devices of this run make of it: lines to warn of."""
    if get_accelerator().device_name() != "cpu":
        check_deterministic(config, stages)
        return list(slow_heads(config, stages))
    if config.train.deterministic:
        same = UserError("train.deterministic", "true", "has no effect on CPUs, which are so anyway", "leave it out")
        return [str(same)]
    return []


def _newest(config: RunConfig) -> Found | None:
    """Of the run's checkpoints, the newest that says what a checkpoint can say."""
    for folder in complete(checkpoints_of(config.run_dir)):
        try:
            return look(folder)
        except DamagedError:
            if config.resume == "strict":
                return None
    return None


def _check_memory(config: RunConfig, stages: list[Stage]) -> None:
    """What this machine's ranks take of a stage at least, masters, moments and weights, must fit into all of its
    memory, or into that of its GPUs."""
    local, gpu = local_ranks(), get_accelerator().device_name() == "cuda"
    there = torch.cuda.get_device_properties(0).total_memory * local if gpu else psutil.virtual_memory().total
    itemsize = 2 if config.train.precision == "bf16" else 4
    for stage in stages:
        layout = stage.layout
        need = count_parameters(stage.model) * (12 / layout.world + itemsize / (layout.tp * layout.pp)) * local
        if need > there:
            problem = f"takes {size_text(need)} on this machine at least, which has {size_text(there)}"
            remedy = "use more ranks, a higher tp or pp, or a smaller model; megabus estimate says what fits"
            raise UserError(stage_section(stage.index), f"stage {stage.index}", problem, remedy)
