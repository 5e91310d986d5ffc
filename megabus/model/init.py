"""Initial values, drawn row by row from a counter: a shard of the initial state is the initial state's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from megabus import counter
from megabus.config.schema import ModelConfig
from megabus.model.decoder import Decoder, param_specs
from megabus.model.params import axis_sizes


def initial_rows(model: ModelConfig, name: str, seed: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a parameter's initial value, fp32: normal matrices (unit rows in nGPT), constant gains."""
    spec = param_specs(model)[name]
    if not spec.is_matrix:
        return torch.full((stop - start,), spec.init)
    draws = counter.normals(counter.key(seed, name, "init"), torch.arange(start, stop), axis_sizes(model)["embed"])
    return (counter.unit_rows(draws) if spec.unit else draws * spec.init).float()


def build_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A whole model in this process with its initial weights (fp32, CPU)."""
    module = Decoder(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_rows(config, name, seed, 0, parameter.shape[0]))
    return module
