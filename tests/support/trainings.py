"""A whole run's configuration around a training, for what needs more of it than an engine does."""

from __future__ import annotations

from dataclasses import asdict

from megabus.config import parse_config


def run_of(training, **sections):
    """The run that consists of a training; `sections` are set in place of its own."""
    tree = {
        "run_dir": "unused",
        "model": training.stage.model.model_dump(),
        "layout": asdict(training.stage.layout),
        "train": training.train.model_dump() | {"max_steps": 5},
        "optimizer": training.optimizer.model_dump(),
        "data": {"train": "unused", "valid": "unused"},
    }
    return parse_config(tree | sections)
