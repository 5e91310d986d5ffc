"""A training of one size in the form in which an engine takes it: without a run's files, data and growths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megabus.config import Layout, ModelConfig, Stage
from megabus.config.schema import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Training:
    """What `Engine` is made from: `Engine(training.train, training.optimizer, training.stage)`."""

    train: TrainConfig
    optimizer: OptimizerConfig
    stage: Stage


def make_training(model: dict[str, Any], layout: Layout, train: dict[str, Any], optimizer: dict[str, Any]) -> Training:
    """From the keys of a configuration's sections. That they fit together is not checked (`resolve_stages` does)."""
    batches, adam = TrainConfig.model_validate(train), OptimizerConfig.model_validate(optimizer)
    stage = Stage(
        index=0,
        model=ModelConfig.model_validate(model),
        layout=layout,
        seq_len=batches.seq_len,
        micro_batch_size=batches.micro_batch_size,
        global_batch_size=batches.global_batch_size,
        lr=adam.lr,
        kappa=1.0,  # what decides on growth, of which there is none
        max_tokens=None,
        max_flops=None,
    )
    return Training(batches, adam, stage)
