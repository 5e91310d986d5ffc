"""The corpora of a run, opened and checked against its configuration."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megabus.config import RunConfig, Stage
from megabus.config.phases import said_weights
from megabus.config.stages import longest_sequence
from megabus.data.batches import MORE_ROWS, TokenSource, check_one_tokenizer
from megabus.data.corpus import open_corpus
from megabus.data.order import align_up, slots
from megabus.data.remote import is_url
from megabus.data.tokenizer import Tokenizer, TokenizerFiles, check_carried
from megabus.errors import UserError

VALID_SEED = 0  # of the order in which validation chunks are taken: no run's seed changes it


@dataclass(frozen=True)
class Sources:
    """The training blend, the validation corpus, how many tokens of it every validation takes, whether documents are
    kept apart in both, the tokenizer, and by name what else is measured."""

    train: TokenSource
    valid: TokenSource
    valid_tokens: int
    document_mask: bool = False
    tokenizer: Tokenizer | None = None
    extra: Mapping[str, TokenSource] = field(default_factory=dict)

    def named(self) -> list[tuple[str, TokenSource]]:
        """All of them, by their keys in the configuration."""
        extra = [(f"eval.extra.data.{name}", source) for name, source in self.extra.items()]
        return [("data.train", self.train), ("data.valid", self.valid), *extra]

    def extra_tokens(self, name: str) -> int:
        """How many are measured: as many as of validation, in whole longest sequences, or all where it has fewer."""
        source = self.extra[name]
        return min(self.valid_tokens, source.orders[0].n_chunks * source.chunk_len)

    def check_tokenizer(self, known: Set[str], whose: str, files: TokenizerFiles | None = None) -> None:
        """Raise `UserError` where the data and its tokenizer belong to another one than `whose`: than what is known by
        hashes alone, as the data of a run is, and those `files`."""
        made_with = self.valid.tokenizers | self.train.tokenizers
        mine = self.tokenizer.files if self.tokenizer is not None else None
        check_same_tokenizer(made_with, mine, known, files, whose, " or begin without weights")


def check_same_tokenizer(
    made_with: Mapping[str, str],
    own: TokenizerFiles | None,
    known: Set[str],
    files: TokenizerFiles | None,
    whose: str,
    other: str = "",
) -> None:
    """Raise `UserError` where data belongs to another tokenizer than weights: it by the hashes of what it was made with
    and its `own` tokenizer, they by hashes that are `known` and those `files`. other: than to give other data.

    What neither side knows is not compared: token files of Megatron's own tools do not say what made them.
    """
    (ours, as_ours), (theirs, as_theirs) = _hashes(made_with.keys(), own), _hashes(known, files)
    if ours and theirs and not (ours & as_theirs or theirs & as_ours):  # see `TokenizerFiles.is_same`
        name = next(iter(made_with.values()), None) or (own and own.name)
        problem = f"belongs to another tokenizer than {whose}, whose ids mean other pieces"
        raise UserError("data", name, problem, f"give data that was made with that one{other and ','}{other}")


def _hashes(known: Set[str], files: TokenizerFiles | None) -> tuple[Set[str], Set[str]]:
    """Of what is known by hashes alone, and of files: what they are, and that with all they are known as."""
    return (known, known) if files is None else (known | {files.sha256}, known | files.known_as)


def bits_per_byte(source: TokenSource, loss: float) -> float | None:
    """A loss in nats per token as bits per byte of text: loss / ln 2, times the corpus's tokens over the bytes of its
    text in UTF-8. So runs with other tokenizers can be compared. None where the token files do not say of how many
    bytes they were made."""
    return None if source.n_bytes is None else loss / math.log(2) * source.n_tokens / source.n_bytes


def fetch(config: RunConfig) -> None:
    """Copy what lies at URLs to this machine, where it is not there yet; `open_sources` then reads it there. Raises
    `UserError` as that does."""
    for key, paths in _corpora_of(config):
        with _named(key):
            open_corpus([path for path in paths if is_url(path)], _cache_of(config))


def has_urls(config: RunConfig) -> bool:
    return any(is_url(path) for _, paths in _corpora_of(config) for path in paths)


def _corpora_of(config: RunConfig) -> list[tuple[str, list[str]]]:
    train = [("data.train", paths) for paths, _ in config.data.train_corpora]
    extra = [(f"eval.extra.data.{name}", [prefix]) for name, prefix in config.eval.extra.data.items()]
    return [*train, ("data.valid", [config.data.valid]), *extra]


def open_sources(config: RunConfig, stages: list[Stage], heartbeat: Callable[[], object] = int) -> Sources:
    """Raises `UserError` for missing, truncated or too short files, for another vocabulary or tokenizer, for weights
    that no blend can have, for a pattern of training files that the validation's are of, and where documents are to be
    kept apart for files that know of none.

    heartbeat: called while files of URLs are fetched.
    """
    longest = longest_sequence(stages)
    with _named("data.train"):
        train = _source(config, config.data.train_corpora, longest, config.train.seed, heartbeat)
    for key, weights in said_weights(config):
        with _named(key):
            slots(weights)
    with _named("data.valid"):
        valid = _source(config, [(config.data.valid, 1.0)], longest, VALID_SEED, heartbeat)
    _check_held_out(config, train, valid)
    extra = {}
    for name, prefix in config.eval.extra.data.items():
        with _named(f"eval.extra.data.{name}"):
            extra[name] = _source(config, [(prefix, 1.0)], longest, VALID_SEED, heartbeat)
    tokenizer = _tokenizer(config)
    made_with = train.tokenizers | valid.tokenizers
    for source in extra.values():
        made_with |= source.tokenizers
    if tokenizer is not None and not tokenizer.files.known_as & made_with.keys():
        made_with[tokenizer.sha256] = tokenizer.name
    check_one_tokenizer(made_with)
    # All stages, under every layout, are measured on the very same tokens: whole sequences of each stage, read once.
    valid_tokens, readable = align_up(config.eval.tokens, longest), valid.orders[0].n_chunks * longest
    if valid_tokens > readable:
        problem = f"in sequences of {longest} that is {valid_tokens}, and {config.data.valid} has {readable} in such"
        raise UserError("eval.tokens", config.eval.tokens, problem, f"set it to {readable} or less, or add text")
    return Sources(train, valid, valid_tokens, config.data.document_mask, tokenizer, extra)


def _check_held_out(config: RunConfig, train: TokenSource, valid: TokenSource) -> None:
    """Raise `UserError` where a pattern stands for the validation's files too. Who names one in full may mean it."""
    held_out = {os.path.realpath(prefix) for prefix in valid.corpora[0].prefixes}
    for (paths, _), corpus in zip(config.data.train_corpora, train.corpora, strict=True):
        both = [prefix for prefix in corpus.prefixes if os.path.realpath(prefix) in held_out]
        if both and any(map(glob.has_magic, {*paths} - {*both})):
            problem = f"matches {both[0]}, which data.valid measures on"
            raise UserError("data.train", ", ".join(paths), problem, "narrow the pattern, or name the file to mean it")


def _source(
    config: RunConfig,
    corpora: Sequence[tuple[str | Sequence[str], float]],
    longest: int,
    seed: int,
    heartbeat: Callable[[], object],
) -> TokenSource:
    rows = MORE_ROWS
    if config.init_from is not None and not config.extend_vocabulary:
        rows = f"make it with the tokenizer of {config.init_from}; or, if its tokenizer has all pieces of that one and "
        rows += "more, set model.vocab_size to the data's, data.tokenizer to it, and extend_vocabulary to true"
    source = TokenSource(corpora, longest, seed, config.model.vocab_size, _cache_of(config), heartbeat, rows)
    if config.data.document_mask:
        source.check_documents()
    return source


def _cache_of(config: RunConfig) -> Path | None:
    return None if config.data.cache is None else Path(config.data.cache)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors of a corpus name the key that it stands under."""
    try:
        yield
    except UserError as error:
        raise UserError(key, error.value, error.problem, error.remedy) from error


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """The tokenizer that goes with the checkpoint."""
    path = config.data.tokenizer
    if path is None:
        return None
    with _named("data.tokenizer"):
        tokenizer = Tokenizer(path)
    check_carried(tokenizer, config.model.vocab_size, "data.tokenizer", path)
    return tokenizer
