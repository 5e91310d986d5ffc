"""The log-likelihood of each label after each prompt, under any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabus.engine.engine import Batch, Engine
from megabus.model.decoder import Decoder
from megabus.model.loss import IGNORED
from megabus.nli.pairs import LABELS, PairSet
from megabus.nli.prompt import Encoder, Scored

WIDTH_STEP = 16  # sequences are padded to a multiple of this many tokens
ROUND = 8  # micro batches between two signs of life
CONTENT_FREE = "N/A"  # stands for both sentences in a prompt that says nothing (Zhao et al. 2021)


@dataclass(frozen=True)
class Scores:
    """What a model says of N pairs. log_likelihood: of each label's tokens, summed, in nats, (N, 3) fp64.

    content_free: the same after a prompt without content, (3,). label_chars: characters of each label, (3,).
    n_cut: pairs whose premise lost tokens for room; n_beyond: those that lost more than the premise.
    """

    log_likelihood: np.ndarray
    content_free: np.ndarray
    label_chars: np.ndarray
    n_cut: int
    n_beyond: int

    def variants(self) -> dict[str, np.ndarray]:
        """Scores (N, 3) by the name of the rule: the sum; per character of the label, as lm-evaluation-harness's
        acc_norm; and domain-conditional PMI, log p(label | pair) - log p(label | no content) (Holtzman et al. 2021)."""
        return {
            "sum": self.log_likelihood,
            "per character": self.log_likelihood / self.label_chars,
            "PMI": self.log_likelihood - self.content_free,
        }


class LabelLoss:
    """An engine's loss in nats a label: it does not depend on how a batch is cut or padded."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def __call__(self, decoder: Decoder, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        loss, losses_BT = decoder.loss(h_BTD, targets_BT, lambda losses_BT: losses_BT.sum(1).mean())
        if not decoder.training:
            self._sums.append(losses_BT.sum(1))
        return loss

    def of_sequences(self, engine: Engine, batches: Sequence[Batch], steps: int, width: int) -> Tensor | None:
        """Each sequence's summed loss in nats, in the order of this data-parallel rank's batches; None on ranks before
        the last of the pipeline. The engine is one that has this loss."""
        assert engine.loss is self
        self._sums.clear()
        engine.evaluate(batches, steps, width)
        return torch.cat(self._sums) if self._sums else None


def score_pairs(engine: Engine, encoder: Encoder, pairs: PairSet, heartbeat: Callable[[], None]) -> Scores:
    """Score every label of every pair; the same on every rank. Collective."""
    sequences = encoder.encode_all([*pairs.pairs, (0, CONTENT_FREE, CONTENT_FREE)])
    table = log_likelihoods(engine, sequences, heartbeat).reshape(-1, len(LABELS))
    by_pair = [sequences[i : i + len(LABELS)] for i in range(0, len(LABELS) * len(pairs), len(LABELS))]
    return Scores(
        log_likelihood=table[:-1],
        content_free=table[-1],
        label_chars=np.array([len(text) for text in encoder.template.labels], dtype=np.float64),
        n_cut=sum(any(scored.n_cut for scored in group) for group in by_pair),
        n_beyond=sum(any(scored.beyond for scored in group) for group in by_pair),
    )


def log_likelihoods(engine: Engine, sequences: Sequence[Scored], heartbeat: Callable[[], None]) -> np.ndarray:
    """Summed log-likelihood of each sequence's label tokens in nats, (len(sequences),) fp64, on every rank. Collective.

    Sequences of about one length share micro batches, whatever the layout; the last ones are filled up with padding.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for number, scored in enumerate(sequences):
        buckets[width_of(scored.n_inputs)].append(number)
    found, label_loss = torch.zeros(len(sequences), dtype=torch.float64), engine.loss
    assert isinstance(label_loss, LabelLoss)
    size, dp = engine.stage.micro_batch_size, engine.stage.layout.dp
    for width, members in sorted(buckets.items()):
        steps = -(-len(members) // (size * dp))
        for first in range(0, steps, ROUND):
            count = min(ROUND, steps - first)
            rows = [row for step in range(first, first + count) for row in engine.micro_rows(step)]
            mine = [members[row] if row < len(members) else None for row in rows]
            batches: list[Batch] = []
            if engine.needs_data:
                parts = [mine[i : i + size] for i in range(0, len(mine), size)]
                batches = [padded([None if n is None else sequences[n] for n in part], width) for part in parts]
            losses = label_loss.of_sequences(engine, batches, count, width)
            if losses is not None and engine.mesh.at.tp == 0:  # of the ranks that know a score, one tells it
                for member, loss in zip(mine, losses.tolist(), strict=True):
                    if member is not None:
                        found[member] = -loss
            heartbeat()
    found = found.to(engine.device)
    dist.all_reduce(found)  # exact: all terms of a sum but one are zero
    return found.cpu().numpy()


def width_of(n_inputs: int) -> int:
    """The padded length of a sequence, which must not depend on the layout."""
    return -(-n_inputs // WIDTH_STEP) * WIDTH_STEP


def padded(sequences: Sequence[Scored | None], width: int) -> Batch:
    """Inputs and targets (len(sequences), width): targets are the label's tokens, all else is IGNORED. What is padded
    on the right is seen by no token before it."""
    inputs = torch.zeros(len(sequences), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, scored in enumerate(sequences):
        if scored is None:
            continue
        n, tokens = scored.n_inputs, torch.tensor(scored.tokens)
        inputs[row, :n] = tokens[:-1]
        targets[row, n - scored.n_label : n] = tokens[n + 1 - scored.n_label :]
    return inputs, targets
