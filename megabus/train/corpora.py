"""What the trainer reads: the training blend and the fixed validation tokens, the same under every layout."""

from __future__ import annotations

from megabus.config import Stage
from megabus.data.batches import TokenSource
from megabus.data.sources import Sources
from megabus.engine.engine import Batch, Engine
from megabus.errors import UserError
from megabus.parallel.agree import raise_together


class Corpora:
    """Batches of the open corpora, cut for an engine's ranks."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def train_batches(self, engine: Engine, position: int) -> list[Batch]:
        """This rank's micro batches of the step that starts at token `position` of the data order."""
        return self._batches(engine, self.sources.train, position, engine.stage.seq_len, engine.stage.grad_accum)

    def valid_batches(self, engine: Engine, seq_len: int) -> list[Batch]:
        """This rank's share of the validation tokens, cut in sequences of `seq_len`."""
        return self._batches(engine, self.sources.valid, 0, seq_len, self.valid_steps(engine.stage, seq_len))

    def valid_steps(self, stage: Stage, seq_len: int) -> int:
        """Micro batches of a validation on every rank."""
        return self.sources.valid_tokens // (seq_len * stage.micro_batch_size * stage.layout.dp)

    def _batches(self, engine: Engine, source: TokenSource, position: int, seq_len: int, count: int) -> list[Batch]:
        rows = [] if not engine.needs_data else [engine.micro_rows(micro_step) for micro_step in range(count)]
        batches, error = [], None
        try:
            batches = [source.batch(position, seq_len, part) for part in rows]
        except UserError as caught:
            error = caught
        raise_together(error, engine.device)  # other ranks read other rows, and would wait for this one
        return batches
