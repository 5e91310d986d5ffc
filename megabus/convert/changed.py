"""A source with something changed as it is read: a head of its own for a tied one, rows of length 1, a running mean of
the weights for the weights."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from megabus.checkpoint.state import weights_alone, without_run
from megabus.convert.source import FolderSource, Source, blocks
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape
from megabus.parallel.fragments import Kind, decay_of, ema_kind


class Untied:
    """Weights alone, without a run: the head that a tied model gets has no moments, and the run's model had none."""

    def __init__(self, source: Source) -> None:
        model = source.state.model
        if not model.tie_embeddings:
            raise UserError("--untie", True, "the head is its own already", "leave it out")
        self.inner, self.tokenizer = source, source.tokenizer
        self.tied = next(name for name, spec in param_specs(model).items() if spec.tied)
        untied = model.model_copy(update={"tie_embeddings": False})
        self.state = without_run(source.state, untied)

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        there = name in param_specs(self.inner.state.model)
        return self.inner.read(kind, name if there else self.tied, start, stop)


class RowsMadeUnit:
    """Weights alone, for Adam's moments are of other ones."""

    def __init__(self, source: Source) -> None:
        self.inner, self.tokenizer = source, source.tokenizer
        self.state = weights_alone(source.state)
        self.specs = param_specs(source.state.model)
        if not any(spec.unit for spec in self.specs.values()):
            raise UserError("--unit-rows", True, "the model has no unit rows", "leave it out")

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        spec = self.specs[name]
        if not spec.unit:
            return self.inner.read(kind, name, start, stop)
        (_, width) = global_shape(spec, self.state.model)
        first, last = start // width, -(-stop // width)
        rows = self.inner.read(kind, name, first * width, last * width).view(-1, width).double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
        return rows.float().reshape(-1)[start - first * width : stop - first * width]


def averaged(source: FolderSource, decay: float) -> Source:
    """Weights alone: a running mean of them in their place, its unit rows made unit, as a run evaluates it. Raises
    `UserError` where there is no such mean."""
    mean = _Mean(source, decay)
    return RowsMadeUnit(mean) if any(spec.unit for spec in param_specs(mean.state.model).values()) else mean


class _Mean:
    """Weights alone: a running mean of them in their place, as it is."""

    def __init__(self, source: FolderSource, decay: float) -> None:
        self.inner, self.tokenizer, self.folder = source, source.tokenizer, source.folder
        self.kind, kinds = ema_kind(decay), source.state.kinds
        if self.kind not in kinds:
            there = ", ".join(one for kind in kinds if (one := decay_of(kind)) is not None)
            remedy = "leave it out" if not there else "give one of them"
            raise UserError(
                "--ema", decay, f"is no decay of a mean in {source.folder} ({there or 'it has none'})", remedy
            )
        self.state = weights_alone(source.state)

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        return self.inner.read(self.kind, name, start, stop)


def unit_error(source: Source) -> tuple[float, str]:
    """The largest | |row| - 1 | over all rows that are to be unit vectors, and whose; (0, "") where none are."""
    model, worst = source.state.model, (0.0, "")
    for name, spec in param_specs(model).items():
        if spec.unit:
            shape = global_shape(spec, model)
            for start, stop in blocks(0, prod(shape), shape[1]):
                lengths = torch.linalg.vector_norm(source.read("weight", name, start, stop).view(-1, shape[1]), dim=1)
                worst = max(worst, (float((lengths - 1).abs().max()), name))
    return worst
