"""A training of one size in the form in which an engine takes it: without a run's files, data and growths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megabus.config import Layout, ModelConfig, Stage
from megabus.config.schema import LayoutConfig, OptimizerConfig, TrainConfig
from megabus.config.stages import single_stage


@dataclass(frozen=True)
class Training:
    """What `Engine` is made from: `Engine(training.train, training.optimizer, training.stage)`."""

    train: TrainConfig
    optimizer: OptimizerConfig
    stage: Stage


def make_training(model: dict[str, Any], layout: Layout, train: dict[str, Any], optimizer: dict[str, Any]) -> Training:
    """From the keys of a configuration's sections. Raises `UserError` where they do not fit together."""
    batches, adam = TrainConfig.model_validate(train), OptimizerConfig.model_validate(optimizer)
    degrees = LayoutConfig(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    stage = single_stage(ModelConfig.model_validate(model), degrees, batches, adam, layout.world)
    return Training(batches, adam, stage)
