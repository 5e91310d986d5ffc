"""How far a step moves parameters of each role, at every size of a run: a coordinate check (Yang et al. 2022, app. D).

Rates transfer where a step at the peak learning rate does the same at every size: where a row turns by the same angle,
and where the product that a matrix is there for changes by the same share of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megabus.config import RunConfig, Stage
from megabus.data.order import align_up
from megabus.data.sources import Sources
from megabus.engine.engine import Batch, Engine
from megabus.growth.transition import grow_engine, stage_engine
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec, spec_of
from megabus.model.rates import relative_rate
from megabus.train.corpora import Corpora

ROLES = ("embedding", "read", "write", "head", "gains")


def role_of(spec: ParamSpec) -> str:
    """One of `ROLES`: what the coordinates of a parameter are told under."""
    if not spec.is_matrix:
        return "gains"
    if spec.lookup:
        return "embedding"
    return "head" if spec.rows == "vocab" else spec.role


@dataclass(frozen=True)
class Moved:
    """What a step does, in the root mean square over the parameters of a role.

    angle: that a row turns by, in radians; None for gains. change: |dW h| / |W h| over a micro batch's h, which are as
    before the step; of gains |dg| / |g|. What was 0 before the step, as the gates of silent layers are, has neither:
    None where that is all there is.
    """

    angle: float | None
    change: float | None


@dataclass(frozen=True)
class StateRow:
    """A stage in some state: moves by role, the mean over some steps; `lr`: peak learning rates by role of matrix,
    where it has any."""

    stage: Stage
    state: str
    lr: dict[str, float]
    moved: dict[str, Moved]


def coordinates(config: RunConfig, stages: Sequence[Stage], sources: Sources, steps: int) -> list[StateRow]:
    """Every stage from scratch, and grown from the stage before: that one `steps` steps old, at its peak rate.

    Of `steps` steps the last quarter is measured, and of a grown stage the first quarter too. In this process alone,
    whose world has one rank.
    """
    corpora, few = Corpora(sources), measured(steps)
    rows = []
    for stage in stages[1:]:
        engine = stage_engine(config, stage, None)
        engine.write_initial(config.train.seed)
        seen, _ = _steps(engine, corpora, steps, 0)
        rows.append(_row(config, stage, "from scratch", seen[-few:]))
        engine.close()
    engine, position = stage_engine(config, stages[0], None), 0
    engine.write_initial(config.train.seed)
    for stage in stages:
        if stage.index:
            engine = grow_engine(engine, config, stage).engine
        seen, position = _steps(engine, corpora, steps, position)
        if stage.index:
            rows.append(_row(config, stage, "just grown", seen[:few]))
        rows.append(_row(config, stage, "grown" if stage.index else "from scratch", seen[-few:]))
    engine.close()
    return sorted(rows, key=lambda row: row.stage.index)  # those of a stage stay in this order


def measured(steps: int) -> int:
    """How many of `steps` steps are."""
    return max(1, steps // 4)


def _row(config: RunConfig, stage: Stage, state: str, seen: Sequence[dict[str, Moved]]) -> StateRow:
    return StateRow(stage, state, _rates(config, stage), {role: _mean([each[role] for each in seen]) for role in ROLES})


def _rates(config: RunConfig, stage: Stage) -> dict[str, float]:
    tuned, rates = config.optimizer.transfer, {}
    for spec in param_specs(stage.model).values():
        if spec.is_matrix:
            rates[role_of(spec)] = stage.lr * (relative_rate(spec, stage.model, tuned.d_model) if tuned else 1.0)
    return rates


def _steps(engine: Engine, corpora: Corpora, count: int, position: int) -> tuple[list[dict[str, Moved]], int]:
    """What each of `count` steps did, and where in the data order the next one begins."""
    seen, position = [], align_up(position, engine.stage.seq_len)
    for _ in range(count):
        seen.append(moves(engine, corpora.train_batches(engine, position)))
        position += engine.stage.tokens_per_step
    return seen, position


def moves(engine: Engine, batches: Sequence[Batch]) -> dict[str, Moved]:
    """Take a step at the stage's peak rate, and tell what it did, by role."""
    inputs, before = _inputs(engine, batches[0]), _masters(engine)
    engine.train_step(batches, engine.stage.lr)
    angles: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    changes: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for name, after in _masters(engine).items():
        spec, was = engine.placement.specs[name], before[name]
        role = role_of(spec)
        if spec.is_matrix:
            turned = _angles(was, after)
            angles[role] += [turned] if len(turned) else []
            was, after = (_product(spec, matrix, inputs[name]) for matrix in (was, after))
        if was.any():
            changes[role].append(((after - was).norm() / was.norm()).view(1))
    return {role: Moved(_rms(angles[role]), _rms(changes[role])) for role in ROLES}


def _masters(engine: Engine) -> dict[str, Tensor]:
    """Copies, (rows, width); the one rank owns all of each."""
    width = engine.placement.width
    return {piece.name: x["weight"].clone().view(-1, width(piece.name)) for piece, x in engine.read().items()}


def _angles(one: Tensor, other: Tensor) -> Tensor:
    """Between rows that are not 0 in `one`, radians; by distance on the sphere, which small angles do not cancel in."""
    there = one.any(dim=1)
    one, other = one[there], other[there]
    one, other = (torch.nn.functional.normalize(x, dim=1) for x in (one, other))
    return 2 * ((one - other).norm(dim=1) / 2).clamp(max=1).asin()


def _product(spec: ParamSpec, matrix: Tensor, x: Tensor) -> Tensor:
    """What a matrix makes of its input: rows that are picked, that take inner products with h, or that are summed."""
    if not x.is_floating_point():
        return matrix[x]
    return x @ matrix if spec.role == "write" else x @ matrix.T


def _rms(values: Sequence[Tensor]) -> float | None:
    return float(torch.cat(list(values)).square().mean().sqrt()) if values else None


def _mean(moved: Sequence[Moved]) -> Moved:
    return Moved(_average([each.angle for each in moved]), _average([each.change for each in moved]))


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


class _Watch(TorchFunctionMode):
    """Keeps what each of some matrices is multiplied with, or picked by."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.names = {id(matrix): spec_of(matrix).name for matrix in matrices}
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        for arg in tensors:
            if id(arg) in self.names and len(tensors) > 1:
                other = next(tensor for tensor in tensors if tensor is not arg)
                self.seen[self.names[id(arg)]] = other.flatten(0, -2) if other.is_floating_point() else other
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _inputs(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    """Of every matrix, in a micro batch: (tokens, width) in fp32, or token ids."""
    matrices = [p for p in engine.module.parameters() if spec_of(p).is_matrix]
    tokens, _, *apart = batch
    engine.deepspeed.eval()
    with _Watch(matrices) as watch:
        engine.decoder(tokens.to(engine.device), None, *(each.moved(lambda x: x.to(engine.device)) for each in apart))
    missed = sorted({*watch.names.values()} - {*watch.seen})
    if missed:
        raise RuntimeError(f"the model multiplies {missed[0]} in a way that is not seen from outside")
    return {name: x.float() if x.is_floating_point() else x for name, x in watch.seen.items()}
