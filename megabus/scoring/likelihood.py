"""The log-likelihood of token sequences' ends, and the loss of training on them, under any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megabus.engine.engine import Batch, Engine
from megabus.errors import UserError
from megabus.model.decoder import Decoder
from megabus.model.loss import IGNORED

WIDTH_STEP = 16  # sequences are padded to a multiple of this many tokens
ROUND = 8  # micro batches between two heartbeats


class Sequence(NamedTuple):
    """tokens: what is read and, last, the n_scored tokens that are to be said."""

    tokens: list[int]
    n_scored: int

    @property
    def n_inputs(self) -> int:
        return len(self.tokens) - 1


class SequenceLoss:
    """An engine's loss in nats a sequence: it does not depend on how a batch is cut or padded."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # of sequences that were evaluated, on ranks that have the head

    def __call__(self, decoder: Decoder, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        loss, losses_BT = decoder.loss(h_BTD, targets_BT, lambda losses_BT: losses_BT.sum(1).mean())
        if not decoder.training:
            self.sums.append(losses_BT.sum(1))
        return loss


def log_likelihoods(engine: Engine, sequences: list[Sequence], heartbeat: Callable[[], None]) -> Tensor:
    """Log-likelihood of what each sequence is to say, summed, in nats: (len(sequences),) fp64 on the CPU of every rank.

    Collective; the engine's loss is a `SequenceLoss`. Sequences of about one length share micro batches, whatever the
    layout; the last ones are filled up with padding.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, sequence in enumerate(sequences):
        buckets[width_of(sequence.n_inputs)].append(number)
    found, loss = torch.zeros(len(sequences), dtype=torch.float64), engine.loss
    assert isinstance(loss, SequenceLoss)
    size, dp = engine.stage.micro_batch_size, engine.stage.layout.dp
    for width, members in sorted(buckets.items()):
        steps = -(-len(members) // (size * dp))
        for first in range(0, steps, ROUND):
            count = min(ROUND, steps - first)
            rows = [row for step in range(first, first + count) for row in engine.micro_rows(step)]
            mine = [members[row] if row < len(members) else None for row in rows]
            read = [None if member is None else sequences[member] for member in mine]
            parts = range(0, len(read), size) if engine.needs_data else ()
            loss.sums.clear()
            engine.evaluate([padded(read[i : i + size], width) for i in parts], count, width)
            if loss.sums and engine.mesh.at.tp == 0:  # of the ranks that know a score, one tells it
                for member, nats in zip(mine, torch.cat(loss.sums).tolist(), strict=True):
                    if member is not None:
                        found[member] = -nats
            heartbeat()
    found = found.to(engine.device)
    dist.all_reduce(found)  # exact: all terms of a sum but one are zero
    return found.cpu()


def train_step(engine: Engine, sequences: list[Sequence], lr: float, step: int, heartbeat: Callable[[], None]) -> float:
    """One step on a global batch of sequences, of which every rank has all: they must pad it to the same length. The
    loss in nats a sequence. Collective. Raises `UserError` where it or the gradient is not finite."""
    width = width_of(max(sequence.n_inputs for sequence in sequences))
    micro_steps = range(engine.stage.grad_accum) if engine.needs_data else ()
    batches = [padded([sequences[row] for row in engine.micro_rows(micro)], width) for micro in micro_steps]
    result = engine.train_step(batches, lr, width)
    if not result.is_finite:  # known to all ranks
        problem = f"the loss of step {step} is {result.loss}, its gradient's norm {result.grad_norm}"
        raise UserError("lr", lr, problem, "lower it")
    heartbeat()
    return result.loss


def width_of(n_inputs: int) -> int:
    """The padded length of a sequence, which must not depend on the layout."""
    return -(-n_inputs // WIDTH_STEP) * WIDTH_STEP


def padded(sequences: list[Sequence | None], width: int) -> Batch:
    """Inputs and targets (len(sequences), width): targets are what is to be said, all else is IGNORED. What is padded
    on the right is seen by no token before it."""
    inputs = torch.zeros(len(sequences), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, sequence in enumerate(sequences):
        if sequence is not None:
            n, tokens = sequence.n_inputs, torch.tensor(sequence.tokens)
            inputs[row, :n] = tokens[:-1]
            targets[row, n - sequence.n_scored : n] = tokens[-sequence.n_scored :]
    return inputs, targets
