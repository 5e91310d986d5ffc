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
from megabus.config.effects import keys_without_effect
from megabus.config.precision import itemsize
from megabus.config.stages import by_batches, longest_sequence, stage_section
from megabus.engine.startup import local_ranks
from megabus.errors import UserError, warn
from megabus.estimate.devices import Device, like
from megabus.estimate.layouts import pipeline_memory, that_fit
from megabus.evaluation import check_tasks
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.outlook import outlook
from megabus.kernels.choice import Choice, automatic
from megabus.model.cost import count_parameters
from megabus.parallel.agree import rank_0_says, rank_0_tells
from megabus.preflight.findings import size_text
from megabus.train.on_gpu import check_bf16, check_deterministic
from megabus.train.overtaken import check_growths
from megabus.train.profile import check_profile
from megabus.train.resume import check_begins, check_stage
from megabus.train.samples import check_prompts
from megabus.train.settled import rows_of

UNSURE = 1.1  # times a GPU's memory that the estimate of what a rank takes may reach: no GPU has confirmed it yet


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
    check_prompts(config, stages)
    if config.eval.extra.tasks:
        check_tasks("eval.extra.tasks", config.eval.extra.tasks, config.eval.extra.task_path)
    KappaMonitor(config.growth.trigger)  # which asks for what its predictor needs
    form, why_eager = _kernels(config, stages)
    said = [*outlook(stages, config.growth.trigger), *why_eager]
    check_profile(config, stages)
    warned = _of_device(config)
    computed = config.model_copy(update={"train": config.train.model_copy(update={"kernels": form})})
    warned += _check_memory(computed, stages)  # before a preflight, which looks more closely and takes longer for it
    if complete(checkpoints_of(config.run_dir)):
        found = None if config.resume == "never" else _newest(config)
        if found is not None:
            check_stage(found, config, stages)
        return Notes(said, [*keys_without_effect(config), *warned])
    if config.init_from is not None:
        # Slow to import, and most runs begin with nothing.
        from megabus.convert.begin import past_context, read_description

        origin = read_description(config.init_from)
        check_begins(origin, stages[0], config.extend_vocabulary)
        warned += past_context(origin, longest_sequence(stages))
    return Notes(said, [*keys_without_effect(config), *warned, *check_growths(config, stages)])


def _of_device(config: RunConfig) -> list[str]:
    """What the devices of this run make of it: lines to warn of."""
    device = torch.device(get_accelerator().device_name())
    if device.type == "cuda":
        check_bf16(config, device)
    if device.type != "cpu":
        check_deterministic(config)
    elif config.train.deterministic:
        same = UserError("train.deterministic", "true", "has no effect on CPUs, which are so anyway", "leave it out")
        return [str(same)]
    return []


def _kernels(config: RunConfig, stages: list[Stage]) -> tuple[Choice, list[str]]:
    """The form that this rank would compute with, and a line where `train.kernels: auto` does not take Triton's on a
    GPU, in a stage at least."""
    if config.train.kernels != "auto":
        return config.train.kernels, []
    form, problem = automatic(torch.device(get_accelerator().device_name()), rows_of(stages))
    return form, [] if problem is None else [f"train.kernels: auto computes in eager form: {problem}"]


def _newest(config: RunConfig) -> Found | None:
    """Of the run's checkpoints, the newest that says what a checkpoint can say."""
    for folder in complete(checkpoints_of(config.run_dir)):
        try:
            return look(folder)
        except DamagedError:
            if config.resume == "strict":
                return None
    return None


def _check_memory(config: RunConfig, stages: list[Stage]) -> list[str]:
    """What this machine's ranks take of a stage at least, weights, masters, moments and means, must fit into all of its
    memory. On GPUs the estimate of all that a rank takes must fit into one, or nearly: a line for what may not."""
    local, gpu = local_ranks(), None
    if get_accelerator().device_name() == "cuda":
        gpu = torch.cuda.get_device_properties(0)
    there = psutil.virtual_memory().total if gpu is None else gpu.total_memory * local
    entry, owned = itemsize(config.train.precision), 12 + 4 * len(config.train.ema)
    warned: list[str] = []
    for _, stage in by_batches(stages):
        layout = stage.layout
        need = count_parameters(stage.model) * (owned / layout.world + entry / (layout.tp * layout.pp)) * local
        if need > there:
            problem = f"takes {size_text(need)} on this machine at least, which has {size_text(there)}"
            remedy = "use more ranks, a higher tp or pp, or a smaller model; megabus estimate says what fits"
            raise UserError(stage_section(stage.index), f"stage {stage.index}", problem, remedy)
        if gpu is not None:
            warned += _check_estimate(config, stage, like(gpu.name, gpu.total_memory, local))
    return warned


def _check_estimate(config: RunConfig, stage: Stage, gpu: Device) -> list[str]:
    """Of a stage's fullest rank. An estimate may be off, so what is a little too much for it is a warning."""
    need = max(memory.total for memory in pipeline_memory(config, stage, gpu.on_gpu))
    if need <= gpu.memory:
        return []
    problem = f"takes some {size_text(need)} of a GPU in {stage.layout} by the estimate, and a {gpu.name} has "
    problem += size_text(gpu.memory)
    fit = that_fit(config, stage, gpu, 3)
    if fit:
        remedy = f"these would fit: {'; '.join(map(str, fit))} (recompute is of all stages)"
    else:
        remedy = "use many more ranks, or a smaller model"
    error = UserError(stage_section(stage.index), f"stage {stage.index}", problem, remedy)
    if need > UNSURE * gpu.memory:
        raise error
    return [str(error)]
