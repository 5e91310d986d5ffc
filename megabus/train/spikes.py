"""Finite spikes: a loss or a gradient norm that stands far out of those of the updates before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megabus.config.faults import SpikesConfig
from megabus.engine.engine import StepResult
from megabus.upload import upload

NORMAL = 1.4826  # times the median absolute deviation: the standard deviation of what is normally distributed
LEAST = 1e-3  # times the median: what no spread is below, for updates may be all but alike


class Level(NamedTuple):
    """A loss in nats and a gradient norm before clipping: an update's, or the most that is no spike."""

    loss: float
    grad_norm: float


def broken(loss: float, grad_norm: float, most: Level) -> dict[str, tuple[float, float]]:
    """Of a spike, what stands out of the scale: value and limit, by its name in the metrics."""
    pairs = {"loss": (loss, most.loss), "grad_norm": (grad_norm, most.grad_norm)}
    return {name: pair for name, pair in pairs.items() if pair[0] > pair[1]}


def limits(recent: Sequence[Level], deviations: float) -> Level:
    """median + deviations * 1.4826 MAD of both; robust: what few of them are does not move it (Rousseeuw & Croux 1993,
    "Alternatives to the median absolute deviation"). Nothing stands out of what is zero: that is no scale. recent: not
    empty."""
    values = np.array(recent)
    median = np.median(values, axis=0)
    spread = np.maximum(NORMAL * np.median(np.abs(values - median), axis=0), LEAST * median)
    return Level(*np.where(spread > 0, median + deviations * spread, np.inf).tolist())


class Spikes:
    """The running scale of a stage's updates, in order, and what stands out of it. A growth, a phase with other samples
    and an accepted level begin it anew. Steps without an update leave no trace in it.

    Every rank has one; rank 0's alone is asked and saved, and its answer holds for all. config: None looks for none.
    """

    def __init__(self, config: SpikesConfig | None, device: torch.device) -> None:
        self.config, self._device = config, device
        self.recent: deque[Level] = deque(maxlen=0 if config is None else config.window)
        self.limits: Level | None = None  # by which the step now was judged
        self.stands_out = False  # the last step
        self.last: StepResult | None = None  # and what it was

    @property
    def asked(self) -> Callable[[StepResult], bool] | None:
        """What an engine is to ask about a step, if anything."""
        return None if self.config is None else self._refuses

    def _refuses(self, result: StepResult) -> bool:
        """Collective: last bits of a sum may differ between ranks, and no two of them may decide otherwise."""
        assert self.config is not None
        self.limits = None
        if 2 * len(self.recent) >= self.config.window:
            self.limits = limits(self.recent, self.config.deviations)
        found = self.limits is not None and bool(broken(result.loss, result.grad_norm, self.limits))
        answer = upload([found], self._device, torch.uint8)
        dist.broadcast(answer, src=0)
        return bool(answer.item())

    def see(self, result: StepResult) -> None:
        """A step that was made, or not."""
        self.stands_out, self.last = result.refused, result
        if result.updates:
            self.recent.append(Level(result.loss, result.grad_norm))

    def failure(self) -> tuple[str, str, str]:
        """Of the last step, which made no update: loss or gradient norm, its value, and what is wrong with it. Rank
        0's: the last bits of a sum may differ between ranks, and a limit lie between."""
        assert self.last is not None, "there was a step"
        loss, grad_norm = self.last.loss, self.last.grad_norm
        if self.stands_out and self.limits is not None:
            name, (value, limit) = next(iter(broken(loss, grad_norm, self.limits).items()))
            return f"train.{name}", f"{value:.4g}", f"is a spike, above {limit:.4g},"
        name, value = ("grad_norm", grad_norm) if isfinite(loss) else ("loss", loss)
        return f"train.{name}", f"{value:.4g}", "is not finite"

    def begin(self, recent: Iterable[tuple[float, float]] = ()) -> None:
        """Anew, or with those of a checkpoint."""
        self.recent.clear()
        self.recent.extend(Level(*pair) for pair in recent)
        self.stands_out = False

    def accept(self) -> bool:
        """At too many steps in a row without an update: whether the last is taken for a new level, and no fault."""
        if self.config is None or self.config.lasting == "roll_back" or not self.stands_out:
            return False
        self.begin()
        return True
