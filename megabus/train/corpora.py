"""What the trainer reads: the training blend and the fixed validation tokens, the same under every layout."""

from __future__ import annotations

from math import lcm
from pathlib import Path

from megabus.config import RunConfig, Stage
from megabus.data.batches import TokenSource, check_one_tokenizer
from megabus.data.tokenizer import Tokenizer
from megabus.engine.engine import Batch, Engine
from megabus.errors import UserError
from megabus.parallel.agree import raise_together

VALID_SEED = 0  # of the order in which validation chunks are taken: no run's seed changes it


class Corpora:
    """Token sources of a run. Opening them checks the files against the configuration (`UserError`)."""

    def __init__(self, config: RunConfig, stages: list[Stage]) -> None:
        longest = max(stage.seq_len for stage in stages)
        vocab = config.model.vocab_size
        self.train = TokenSource(config.data.train_corpora, longest, config.train.seed, vocab)
        self.valid = TokenSource([(config.data.valid, 1.0)], longest, VALID_SEED, vocab)
        check_one_tokenizer(self.train.tokenizers | self.valid.tokenizers | _tokenizer(config))
        # All stages are measured on the very same tokens: their number must divide into every stage's sequences,
        # micro batches and ranks.
        unit = longest * lcm(*(stage.micro_batch_size * stage.layout.dp for stage in stages))
        self.valid_tokens = -(-config.eval.tokens // unit) * unit
        if self.valid_tokens > self.valid.n_tokens:
            problem = f"becomes {self.valid_tokens} in whole batches of all stages; {config.data.valid} has "
            problem += f"{self.valid.n_tokens} tokens"
            raise UserError("eval.tokens", config.eval.tokens, problem, "lower it, the batches, or add text")

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
        rows = [] if not engine.needs_data else [engine.micro_rows(micro_step) for micro_step in range(count)]
        batches, error = [], None
        try:
            batches = [source.batch(position, seq_len, part) for part in rows]
        except UserError as caught:
            error = caught
        raise_together(error, engine.device)  # other ranks read other rows, and would wait for this one
        return batches


def _tokenizer(config: RunConfig) -> dict[str, str]:
    """The tokenizer that goes with the checkpoint, by its sha256."""
    path = config.data.tokenizer
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError("data.tokenizer", path, "no such file", "give the SentencePiece model that made the data")
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, model.vocab_size is {config.model.vocab_size}"
        raise UserError("data.tokenizer", path, problem, "make the two equal")
    return {tokenizer.sha256: path}
