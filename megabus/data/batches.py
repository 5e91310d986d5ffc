"""Batches of training samples, addressed by how many tokens the run has consumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megabus.data.corpus import open_corpus
from megabus.data.indexed import REBUILD, IndexedTokens, read_meta
from megabus.data.order import ChunkOrder, Deal, Deals, slots
from megabus.errors import UserError
from megabus.plain_file import shown
from megabus.splitmix import mix64

MORE_ROWS = "set the model's vocab_size to the data's or more"


class TokenSource:
    """A weighted blend of corpora, read in the order of `megabus.data.order`.

    prefixes: (prefix, or prefixes, weight) of each corpus, see `open_corpus`; weights need not sum to one.
    chunk_len: the longest seq_len of the run, in tokens. remedy: of data with larger ids than the model's.
    Raises UserError for a corpus shorter than a sample or made with another vocabulary or tokenizer.
    """

    def __init__(
        self,
        prefixes: Sequence[tuple[str | Sequence[str], float]],
        chunk_len: int,
        seed: int,
        vocab_size: int,
        cache: Path | None = None,
        heartbeat: Callable[[], object] = int,
        remedy: str = MORE_ROWS,
    ) -> None:
        if not prefixes:
            raise UserError("data", "[]", "no corpus is given", "name at least one prefix")
        self.chunk_len, self.vocab_size, self.seed, self.remedy = chunk_len, vocab_size, seed, remedy
        paths = [[path] if isinstance(path, str) else path for path, _ in prefixes]
        self.corpora = [open_corpus(each, cache, heartbeat) for each in paths]
        self.counts = slots([weight for _, weight in prefixes])  # of BLEND_PERIOD chunks, those of each corpus
        self.deals = Deals([Deal(0, self.counts)], seed)
        # Each corpus has its own seed: the same corpus listed twice is not read twice in the same order.
        self.orders = [ChunkOrder(corpus.n_tokens, chunk_len, mix64(seed + k)) for k, corpus in enumerate(self.corpora)]
        self.tokenizers: dict[str, str] = {}  # sha256 -> a corpus that was made with it, as far as sidecars tell
        self.n_bytes: int | None = 0  # of the texts of all corpora in UTF-8; None where a sidecar does not tell
        self._check_corpora()

    def dealt(self, deals: Sequence[Deal]) -> TokenSource:
        """The same corpora, dealt out as a run has done it so far."""
        other = copy.copy(self)
        other.deals = Deals(deals, self.seed)
        return other

    @property
    def files(self) -> Iterator[tuple[str, IndexedTokens]]:
        """(prefix, file) of all corpora."""
        return (pair for each in self.corpora for pair in zip(each.prefixes, each.files, strict=True))

    @property
    def n_tokens(self) -> int:
        """Tokens of all corpora together."""
        return sum(corpus.n_tokens for corpus in self.corpora)

    def batch(self, consumed_tokens: int, seq_len: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), int64 of shape (len(rows), seq_len), targets shifted by one token.

        Row j is row j of the global batch that starts at `consumed_tokens`: the sample at
        consumed_tokens + j * seq_len, whichever rank or micro batch asks for it.
        Raises UserError if a token id is not in [0, vocab_size).
        """
        samples_BT = np.empty((len(rows), seq_len + 1), dtype=np.int64)
        for sample_T, (k, start, stop) in zip(samples_BT, self._spans(consumed_tokens, seq_len, rows), strict=True):
            sample_T[:] = self.corpora[k].tokens(start, stop)
            if sample_T.min() < 0 or sample_T.max() >= self.vocab_size:
                self._report_bad_id(k, start, sample_T)
        samples = torch.from_numpy(samples_BT)
        return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()

    def document_lengths(self, consumed_tokens: int, seq_len: int, rows: Sequence[int]) -> list[int]:
        """How the inputs of `batch`, row after row, are divided among documents: tokens of each, none of them 0. Every
        row begins one: what a document began with elsewhere is not there to be seen.
        """
        lengths: list[int] = []
        for k, start, stop in self._spans(consumed_tokens, seq_len, rows):
            lengths += self.corpora[k].document_lengths(start, stop - 1)
        return lengths

    def check_documents(self) -> None:
        """Raises UserError for a corpus whose index tells no documents apart, or others than its sidecar counts."""
        remedy = f"{REBUILD}, or leave out data.document_mask"
        for corpus in self.corpora:
            if (found := corpus.n_documents) < 2:
                problem = f"its .idx has {found} document of all {corpus.n_tokens} tokens: nothing is kept apart"
                raise UserError("data", ", ".join(corpus.prefixes), problem, remedy)
        for prefix, file in self.files:
            found = file.n_documents
            recorded = (read_meta(prefix) or {}).get("n_documents", found)
            if recorded != found:
                problem = f"its .meta.json speaks of {shown(recorded)} documents, its .idx of {found}"
                raise UserError("data", prefix, problem, remedy)

    def sample_span(self, position_tokens: int, seq_len: int) -> tuple[int, int, int]:
        """(corpus k, start, stop): where the sample at `position_tokens` lies in corpus k's flat stream."""
        number, offset = divmod(position_tokens, self.chunk_len)
        k, own_number = self.deals.locate(number)
        return k, *self.orders[k].sample_span(own_number * self.chunk_len + offset, seq_len)

    def _spans(self, consumed_tokens: int, seq_len: int, rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """`sample_span` of every row."""
        return (self.sample_span(consumed_tokens + row * seq_len, seq_len) for row in rows)

    def _check_corpora(self) -> None:
        for corpus in self.corpora:
            if corpus.n_tokens < self.chunk_len + 1:
                problem = f"has {corpus.n_tokens} tokens, one sample takes {self.chunk_len + 1}"
                raise UserError("data", ", ".join(corpus.prefixes), problem, "add text or shorten the longest seq_len")
        for prefix, file in self.files:
            meta = read_meta(prefix)
            n_bytes = (meta or {}).get("n_bytes")
            self.n_bytes = None if self.n_bytes is None or n_bytes is None else self.n_bytes + n_bytes
            if meta is None:
                continue
            if n_bytes is not None and n_bytes <= 0:
                raise UserError("data", prefix, f"its .meta.json speaks of {n_bytes} bytes of text", REBUILD)
            if meta["vocab_size"] > self.vocab_size:  # less is a vocabulary that was padded
                problem = f"was made with vocab_size {meta['vocab_size']}, the model has {self.vocab_size}"
                raise UserError("data", prefix, problem, self.remedy)
            if meta["n_tokens"] != file.n_tokens:
                problem = f"its .meta.json speaks of {meta['n_tokens']} tokens, its .idx of {file.n_tokens}"
                raise UserError("data", prefix, problem, REBUILD)
            if "tokenizer_sha256" in meta:
                made_with = f" (made with {meta['tokenizer']})" if "tokenizer" in meta else ""
                self.tokenizers[meta["tokenizer_sha256"]] = f"{prefix}{made_with}"
        check_one_tokenizer(self.tokenizers)

    def _report_bad_id(self, k: int, start: int, sample_T: np.ndarray) -> None:
        offset = int(np.flatnonzero((sample_T < 0) | (sample_T >= self.vocab_size))[0])
        prefix, place = self.corpora[k].place_of(start + offset)
        problem = f"token {place} has id {sample_T[offset]}, outside [0, {self.vocab_size})"
        raise UserError("data", prefix, problem, self.remedy)


def check_one_tokenizer(users: dict[str, str]) -> None:
    """users: tokenizer sha256 -> a file that was made with it (or is it). Raises UserError if there are several."""
    if len(users) > 1:
        names, problem = ", ".join(users.values()), "do not belong to the same tokenizer"
        raise UserError("data", names, problem, f"{REBUILD} with one --tokenizer")
