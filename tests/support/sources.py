"""Models to convert: a source in memory, with weights that are no round numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megabus.checkpoint.state import Progress, SavedState
from megabus.config import Layout, ModelConfig
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape
from megabus.parallel.fragments import KINDS

SIZES = {"vocab_size": 67, "d_model": 36, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 62}


def model_config(kind: str, **changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"kind": kind} | SIZES | changes)


class MemorySource:
    """Every tensor of a model, all kinds drawn one after the other."""

    tokenizer = None

    def __init__(self, model: ModelConfig, step: int = 7) -> None:
        self.state = SavedState(
            progress=Progress(step=step, tokens=100, position=128, flops=1.0 / 3.0),
            stage=0,
            model=model,
            layout=Layout(1, 1, 1),
            optimizer_step=5,
            kinds=KINDS,
            monitor={},
            config={},
            data={},
        )
        draw = torch.Generator().manual_seed(0)
        self.tensors: dict[tuple[str, str], Tensor] = {}
        for kind in KINDS:
            for name, spec in param_specs(model).items():
                values = torch.randn(global_shape(spec, model), generator=draw)
                if spec.unit:
                    values = torch.nn.functional.normalize(values, dim=1)
                elif spec.is_matrix:
                    values = values / model.d_model**0.5
                elif kind == "weight":
                    values = spec.init * (1 + values / 4)
                self.tensors[kind, name] = values.abs() if kind == "exp_avg_sq" else values

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[kind, name].reshape(-1)[start:stop]

    def weights(self) -> dict[str, Tensor]:
        return {name: values for (kind, name), values in self.tensors.items() if kind == "weight"}
