"""What the trainer reads: the training blend and the fixed validation tokens, the same under every layout."""

from __future__ import annotations

from math import lcm
from pathlib import Path

import torch

from megabus.config import RunConfig, Stage
from megabus.data.batches import TokenSource
from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Batch, Engine
from megabus.errors import UserError
from megabus.parallel.agree import agreement

VALID_SEED = 0  # validation tokens are the same ones in every run on the same corpus


class Corpora:
    """Token sources of a run. Opening them checks the files against the configuration (`UserError`)."""

    def __init__(self, config: RunConfig, stages: list[Stage]) -> None:
        longest = max(stage.seq_len for stage in stages)
        vocab = config.model.vocab_size
        self.train = TokenSource(config.data.train_corpora, longest, config.train.seed, vocab)
        self.valid = TokenSource([(config.data.valid, 1.0)], longest, VALID_SEED, vocab)
        # A number of validation tokens that every stage's sequences, micro batches and ranks divide, so that all
        # stages are measured on the very same tokens.
        if config.data.tokenizer is not None:
            _check_tokenizer(config.data.tokenizer, vocab)
        self.fault: UserError | None = None
        unit = longest * lcm(*(stage.micro_batch_size * stage.layout.dp for stage in stages))
        self.valid_tokens = -(-config.eval.tokens // unit) * unit

    def train_batches(self, engine: Engine, position: int) -> list[Batch]:
        """This rank's micro batches of the step that starts at token `position` of the data order."""
        return self._batches(engine, self.train, position, engine.stage.seq_len, engine.stage.grad_accum)

    def valid_batches(self, engine: Engine, seq_len: int) -> list[Batch]:
        """This rank's share of the validation tokens, cut in sequences of `seq_len`."""
        return self._batches(engine, self.valid, 0, seq_len, self.valid_steps(engine.stage, seq_len))

    def valid_steps(self, stage: Stage, seq_len: int) -> int:
        """Micro batches of a validation on every rank."""
        return self.valid_tokens // (seq_len * stage.micro_batch_size * stage.layout.dp)

    def _batches(self, engine: Engine, source: TokenSource, position: int, seq_len: int, count: int) -> list[Batch]:
        if not engine.needs_data:
            return []
        rows = (engine.micro_rows(micro_step) for micro_step in range(count))
        batches = []
        for part in rows:
            try:
                batches.append(source.batch(position, seq_len, part))
            except UserError as error:
                # Other ranks read other rows and are about to wait for this one: let the loss tell them (targets
                # outside the vocabulary make it NaN), and the reason be told when all ask for it.
                self.fault = error
                shape = (len(part), seq_len)
                batches.append((torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)))
        return batches

    def raise_fault(self) -> None:
        """After a NaN loss: raise on every rank what any rank found wrong with its data. Collective."""
        with agreement():
            if self.fault is not None:
                raise self.fault


def _check_tokenizer(path: str, vocab_size: int) -> None:
    if not Path(path).is_file():
        raise UserError("data.tokenizer", path, "no such file", "give the SentencePiece model that made the data")
    found = Tokenizer(path).vocab_size
    if found != vocab_size:
        problem = f"has {found} pieces, model.vocab_size is {vocab_size}"
        raise UserError("data.tokenizer", path, problem, "make the two equal")
