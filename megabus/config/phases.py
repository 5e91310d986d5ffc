"""The data schedule: from shares of the budget on, other weights of the corpora, lengths and batches.

What a growth says of them (`growth.stages`) holds from that growth on. Both end up in a stage's `Phase`s, the one thing
that is asked what samples a step takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from megabus.config.section import Batch, Length, NonNegative, Positive, Section
from megabus.errors import UserError

if TYPE_CHECKING:
    from megabus.config.schema import RunConfig

KEYS = ("weights", "seq_len", "micro_batch_size", "global_batch_size")  # of a phase, and of a growth


class PhaseConfig(Section):
    """Samples from a share of the budget on; what is left out stays. A key that growth.stages sets cannot stand here
    too."""

    share: Positive = Field(description="of the budget that is spent when it begins: above 0, below 1, and rising")
    weights: list[NonNegative] | None = Field(None, description="of the corpora of data.train, in their order; 0: none")
    seq_len: Length | None = Field(None, description="tokens of a sequence; a divisor of the run's longest")
    micro_batch_size: Batch | None = Field(None, description="sequences that a rank computes at once")
    global_batch_size: Batch | None = Field(None, description="sequences of a step over all ranks")


@dataclass(frozen=True)
class Phase:
    """Samples of a stage from a share of the budget on. weights: of the corpora, in the order of data.train."""

    share: float
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    weights: tuple[float, ...]


def phases_of(first: Phase, changes: Sequence[PhaseConfig]) -> tuple[Phase, ...]:
    """All phases of a stage that begins with `first`; none where nothing changes with the budget."""
    found = [first]
    for change in changes:
        said = {key: value for key in KEYS if (value := getattr(change, key)) is not None}
        if "weights" in said:
            said["weights"] = tuple(said["weights"])
        found.append(replace(found[-1], share=change.share, **said))
    return tuple(found) if changes else ()


def check_schedule(config: RunConfig) -> None:
    """Raise `UserError` for shares that are none of the run's or out of order, for a key that growths set too, for
    weights that are not of the corpora, and for a corpus that nobody reads."""
    phases, growths = config.train.phases, config.growth.stages
    for number, phase in enumerate(phases):
        key = f"train.phases.{number}"
        if phase.share >= 1:
            problem = "begins when the budget is spent"
            raise UserError(f"{key}.share", phase.share, problem, "give a share below 1, or leave the phase out")
        if all(getattr(phase, name) is None for name in KEYS):
            raise UserError(f"{key}.share", phase.share, "changes nothing", f"say one of {', '.join(KEYS)}")
        for name in KEYS:
            for other, growth in enumerate(growths):
                if getattr(phase, name) is not None and (value := getattr(growth, name)) is not None:
                    problem = f"is set by {key} too, and which comes last depends on when the model grows"
                    raise UserError(f"growth.stages.{other}.{name}", value, problem, "set it in one of the two")
    for number, (before, phase) in enumerate(pairwise(phases), 1):
        if phase.share <= before.share:
            problem = f"overlaps the phase before, which begins at {before.share}"
            raise UserError(f"train.phases.{number}.share", phase.share, problem, "give shares that rise")
    _check_weights(config)


def check_reached(config: RunConfig) -> None:
    """Raise `UserError` for a phase that no step begins in, where that is known: of a run that is counted in steps."""
    train = config.train
    if not train.max_steps or train.max_tokens or train.max_flops:
        return
    last = (train.max_steps - 1) / train.max_steps
    for number, phase in enumerate(train.phases):
        if phase.share > last:
            problem = f"begins in no step: the last of {train.max_steps} begins at {last:.6g}"
            raise UserError(f"train.phases.{number}.share", phase.share, problem, "lower it, or leave the phase out")


def _check_weights(config: RunConfig) -> None:
    corpora, own = config.data.train, [corpus.weight for corpus in config.data.train]
    said = list(said_weights(config))
    for key, weights in [("data.train", own), *said]:
        if len(weights) != len(corpora):
            problem = f"has {len(weights)} weights for the {len(corpora)} corpora of data.train"
            raise UserError(key, weights, problem, "give one for each, 0 for one that is not read")
        if not sum(weights):
            raise UserError(key, weights, "sums to nothing: no corpus is left to read", "give a weight above 0")
    for number, corpus in enumerate(corpora):
        if not any(weights[number] for weights in [own, *(weights for _, weights in said)]):
            problem = "is never read: its weight is 0 throughout the run"
            raise UserError(f"data.train.{number}.weight", corpus.weight, problem, "weigh or drop the corpus")


def said_weights(config: RunConfig) -> Iterator[tuple[str, Sequence[float]]]:
    """(key, weights) of all phases and growths that say them."""
    said = {f"train.phases.{number}": phase.weights for number, phase in enumerate(config.train.phases)}
    said |= {f"growth.stages.{number}": growth.weights for number, growth in enumerate(config.growth.stages)}
    for section, weights in said.items():
        if weights is not None:
            yield f"{section}.weights", weights
