"""Initial values, drawn row by row from a counter: a shard of the initial state is the initial state's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from megabus import counter
from megabus.config.schema import ModelConfig
from megabus.model.decoder import Decoder, param_specs
from megabus.model.params import axis_sizes

BLOCK_ELEMENTS = 1 << 18  # rows are drawn in blocks of about this many entries: temporaries stay near the cache


def initial_rows(
    model: ModelConfig, name: str, seed: int, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows [start, stop) of a parameter's initial value, fp32: normal matrices (unit rows in nGPT), constant gains."""
    spec = param_specs(model)[name]
    if not spec.is_matrix:
        return torch.full((stop - start,), spec.init, device=device)
    width, key = axis_sizes(model)["embed"], counter.key(seed, name, "init")
    rows = torch.empty(stop - start, width, device=device)
    for block in rows.split(max(1, BLOCK_ELEMENTS // width)):
        draws = counter.normals(key, torch.arange(start, start + len(block), device=device), width)
        block.copy_(counter.unit_rows(draws) if spec.unit else draws * spec.init)
        start += len(block)
    return rows


def build_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A whole model in this process with its initial weights (fp32, CPU)."""
    module = Decoder(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_rows(config, name, seed, 0, parameter.shape[0]))
    return module
