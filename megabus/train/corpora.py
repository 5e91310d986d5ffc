"""What the trainer reads: the training blend and the fixed validation tokens, the same under every layout."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch.nn.functional as F

from megabus.data.batches import TokenSource
from megabus.data.order import Deal
from megabus.data.sources import Sources
from megabus.engine.engine import Batch, Engine
from megabus.errors import UserError
from megabus.model.documents import Documents
from megabus.model.loss import IGNORED
from megabus.parallel.agree import raise_together

# A source, as it deals samples out; where a global batch starts; tokens of a sample; rows of each micro batch.
_Asked = tuple[TokenSource, int, int, Sequence[range]]


class Corpora:
    """Batches of the open corpora, cut for an engine's ranks.

    While a step is computed a thread reads the batches of the next. What it has read is taken if it is what is asked
    for, and read anew if not, as after a growth: a batch is a function of its place and of nothing else.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources, self.train = sources, sources.train
        self._ahead: tuple[_Asked, Future[list[Batch]]] | None = None
        self._reader = ThreadPoolExecutor(1, "batches")

    def deal(self, deals: Sequence[Deal]) -> None:
        """Read training samples as a run has dealt them out so far."""
        self.train = self.sources.train.dealt(deals)

    def train_batches(self, engine: Engine, position: int) -> list[Batch]:
        """This rank's micro batches of the step that starts at token `position` of the data order."""
        stage = engine.stage
        rows = tuple(engine.micro_rows(micro_step) for micro_step in range(stage.grad_accum))
        batches = self._batches(engine, (self.train, position, stage.seq_len, rows))
        if self._needed(engine):
            following = (self.train, position + stage.tokens_per_step, stage.seq_len, rows)
            self._ahead = following, self._reader.submit(self._read, *following)
        return batches

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)

    def validation_loss(self, engine: Engine, seq_len: int) -> float:
        """Mean loss in nats of the validation tokens cut in sequences of `seq_len`, the same on every rank.
        Collective."""
        return self._loss(engine, self.sources.valid, self.sources.valid_tokens, seq_len)

    def extra_loss(self, engine: Engine, name: str, seq_len: int) -> float:
        """The same of one of `eval.extra.data`."""
        return self._loss(engine, self.sources.extra[name], self.sources.extra_tokens(name), seq_len)

    def _loss(self, engine: Engine, source: TokenSource, n_tokens: int, seq_len: int) -> float:
        """Tokens fill whole micro batches of all ranks in no layout in particular: what is missing is padded with
        targets that count nothing, in a mean over as many tokens as there are with them."""
        stage, n_rows = engine.stage, n_tokens // seq_len
        at_once = stage.micro_batch_size * stage.layout.dp
        steps = -(-n_rows // at_once)
        rows = [engine.micro_rows(micro_step) for micro_step in range(steps)]
        there = [range(part.start, max(part.start, min(part.stop, n_rows))) for part in rows]
        batches = self._batches(engine, (source, 0, seq_len, there))
        padded = [_padded(batch, stage.micro_batch_size) for batch in batches]
        return engine.evaluate(padded, steps, seq_len) * (steps * at_once / n_rows)

    def _needed(self, engine: Engine) -> bool:
        return engine.needs_data or self.sources.document_mask

    def _batches(self, engine: Engine, asked: _Asked) -> list[Batch]:
        batches: list[Batch] = []
        error, ahead = None, self._ahead
        try:
            if ahead is not None and ahead[0] == asked:
                batches = ahead[1].result()
            elif self._needed(engine):
                batches = self._read(*asked)
        except UserError as caught:
            error = caught
        raise_together(error, engine.device)  # other ranks read other rows, and would wait for this one
        return batches

    def _read(self, source: TokenSource, position: int, seq_len: int, rows: Sequence[range]) -> list[Batch]:
        return [self._batch(source, position, seq_len, part) for part in rows]

    def _batch(self, source: TokenSource, position: int, seq_len: int, rows: range) -> Batch:
        inputs_BT, targets_BT = source.batch(position, seq_len, rows)
        if not self.sources.document_mask:
            return inputs_BT, targets_BT
        return inputs_BT, targets_BT, Documents(source.document_lengths(position, seq_len, rows), seq_len)


def _padded(batch: Batch, n_rows: int) -> Batch:
    """A micro batch of `n_rows` rows."""
    missing = n_rows - len(batch[0])
    rows = (0, 0, 0, missing)
    inputs_BT, targets_BT = F.pad(batch[0], rows), F.pad(batch[1], rows, value=IGNORED)
    return (inputs_BT, targets_BT) if len(batch) == 2 else (inputs_BT, targets_BT, batch[2].padded(missing))
