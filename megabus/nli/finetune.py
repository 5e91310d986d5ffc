"""Fine-tune a model to say the gold label: the same engine, the same sphere, the same prompts as in scoring."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megabus.config.schema import OptimizerConfig
from megabus.data.order import permute
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.nli.pairs import PairSet
from megabus.nli.prompt import Encoder
from megabus.nli.score import padded, width_of
from megabus.train.schedule import learning_rate

Row = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune. epochs may be a fraction; curve_every: steps between two points of the curve."""

    epochs: float
    curve_every: int
    seed: int


def steps_of(n_pairs: int, batch_size: int, epochs: float) -> int:
    return max(1, math.ceil(n_pairs * epochs / batch_size))


def batch_places(step: int, batch_size: int, n_pairs: int, seed: int) -> list[int]:
    """The pairs of a step, as a pure function. Epoch follows epoch, each in an order of its own; where the last batch
    is not full, it is filled from the epoch that would follow."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [permute(place % n_pairs, n_pairs, seed, place // n_pairs) for place in places]


def fine_tune(
    engine: Engine,
    optimizer: OptimizerConfig,
    encoder: Encoder,
    train: PairSet,
    tuning: Tuning,
    measure: Callable[[], Row],
    tell: Callable[[Row], None],
    heartbeat: Callable[[], None],
) -> list[Row]:
    """Train on the gold labels. The curve: before the first step, every `curve_every` steps and at the end a row with
    what `measure` finds and the mean training loss since the row before (nats a label). Collective.

    Raises `UserError` where the loss is not finite.
    """
    stage = engine.stage
    steps = steps_of(len(train), stage.global_batch_size, tuning.epochs)
    curve: list[Row] = [{"step": 0, "pairs": 0, "lr": 0.0, "train_loss": None} | measure()]
    tell(curve[-1])
    losses: list[float] = []
    for step in range(steps):
        lr = learning_rate(optimizer, stage.lr, (step + 0.5) / steps)  # at its middle, as in pre-training
        losses.append(_step(engine, encoder, train, tuning.seed, step, lr))
        heartbeat()
        if (step + 1) % tuning.curve_every == 0 or step + 1 == steps:
            now: Row = {"step": step + 1, "pairs": (step + 1) * stage.global_batch_size, "lr": lr}
            curve.append(now | {"train_loss": sum(losses) / len(losses)} | measure())
            tell(curve[-1])
            losses = []
    return curve


def _step(engine: Engine, encoder: Encoder, train: PairSet, seed: int, step: int, lr: float) -> float:
    stage = engine.stage
    places = batch_places(step, stage.global_batch_size, len(train), seed)
    # Every rank encodes the whole batch: all of them must pad it to the same length.
    encoded = [encoder.encode(pair.premise, pair.hypothesis, pair.label) for pair in (train.pairs[p] for p in places)]
    width = width_of(max(scored.n_inputs for scored in encoded))
    batches = []
    if engine.needs_data:
        rows = [engine.micro_rows(micro) for micro in range(stage.grad_accum)]
        batches = [padded([encoded[row] for row in part], width) for part in rows]
    result = engine.train_step(batches, lr, width)
    if not result.is_finite:  # known to all ranks
        problem = f"the loss of step {step + 1} is {result.loss}, its gradient's norm {result.grad_norm}"
        raise UserError("--lr", stage.lr, problem, "lower it")
    return result.loss
