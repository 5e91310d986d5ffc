"""The corpora of a run, opened and checked against its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megabus.config import RunConfig, Stage
from megabus.data.batches import TokenSource, check_one_tokenizer
from megabus.data.order import align_up
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError

VALID_SEED = 0  # of the order in which validation chunks are taken: no run's seed changes it


@dataclass(frozen=True)
class Sources:
    """The training blend, the validation corpus, how many tokens of it every validation takes, and whether documents
    are kept apart in both."""

    train: TokenSource
    valid: TokenSource
    valid_tokens: int
    document_mask: bool = False


def open_sources(config: RunConfig, stages: list[Stage]) -> Sources:
    """Raises `UserError` for missing, truncated or too short files, for another vocabulary or tokenizer, and where
    documents are to be kept apart for files that know of none."""
    longest = max(stage.seq_len for stage in stages)
    with _named("data.train"):
        train = _source(config, config.data.train_corpora, longest, config.train.seed)
    with _named("data.valid"):
        valid = _source(config, [(config.data.valid, 1.0)], longest, VALID_SEED)
    check_one_tokenizer(train.tokenizers | valid.tokenizers | _tokenizer(config))
    # All stages, under every layout, are measured on the very same tokens: whole sequences of each stage, read once.
    valid_tokens, readable = align_up(config.eval.tokens, longest), valid.orders[0].n_chunks * longest
    if valid_tokens > readable:
        problem = f"in sequences of {longest} that is {valid_tokens}, and {config.data.valid} has {readable} in such"
        raise UserError("eval.tokens", config.eval.tokens, problem, f"set it to {readable} or less, or add text")
    return Sources(train, valid, valid_tokens, config.data.document_mask)


def _source(config: RunConfig, corpora: list[tuple[str, float]], longest: int, seed: int) -> TokenSource:
    source = TokenSource(corpora, longest, seed, config.model.vocab_size)
    if config.data.document_mask:
        source.check_documents()
    return source


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors of a corpus name the key that it stands under."""
    try:
        yield
    except UserError as error:
        raise UserError(key, error.value, error.problem, error.remedy) from error


def _tokenizer(config: RunConfig) -> dict[str, str]:
    """The tokenizer that goes with the checkpoint, by its sha256."""
    path = config.data.tokenizer
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError("data.tokenizer", path, "no such file", "give the SentencePiece model that made the data")
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:  # fewer: the vocabulary is padded
        problem = f"has {tokenizer.vocab_size} pieces, model.vocab_size is {config.model.vocab_size}"
        raise UserError("data.tokenizer", path, problem, "set model.vocab_size to that or more")
    return {tokenizer.sha256: path}
