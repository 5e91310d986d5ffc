"""Weights for a larger vocabulary: rows for pieces that the tokenizer has beside those that it had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megabus import counter
from megabus.checkpoint.state import without_run
from megabus.convert.source import FolderSource, blocks
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec, global_shape
from megabus.parallel.fragments import Kind


class LargerVocabulary:
    """A source whose model has rows for new ids; whatever was there is the inner source's, to the bit.

    spelled: id of a new piece -> ids of the old pieces that it was spelled with; its rows are made of theirs. n_ids: of
    the old tokenizer. A row of the larger vocabulary that no piece has is as one spelled with all old ids.

    A row that is looked up is the mean of its pieces' rows, made a unit vector where rows are. One that h is multiplied
    with gives, whatever h is, the mean of its pieces' logits: the mean of their rows or, where a row is a unit vector
    and has a gain, that direction and that length of the mean of gain times row. Then by Jensen's inequality new pieces
    are each at most as likely as the pieces they were spelled with are on average, and the loss on old text rises by
    log(1 + sum of exp(new logits) / sum of exp(old logits)), where old logits are those of the rows that are kept: a
    padded row that a piece takes over leaves the sum, and the loss falls by what it took there.

    (Hewitt 2021, "Initializing new word embeddings for pretrained language models", for means of all rows.) Sums are in
    fp64 and in an order of their own: the bits are the same whoever reads which interval.
    """

    def __init__(
        self, source: FolderSource, vocab_size: int, spelled: Mapping[int, Sequence[int]], n_ids: int, tokenizer: Path
    ) -> None:
        self.inner, self.folder = source, source.folder
        self.tokenizer: Path | None = tokenizer
        self.spelled, self.n_ids, self.n_old = spelled, n_ids, source.state.model.vocab_size
        larger = source.state.model.model_copy(update={"vocab_size": vocab_size})
        self.state = without_run(source.state, larger)
        self.specs = param_specs(larger)
        of_rows = [spec for spec in self.specs.values() if spec.rows == "vocab"]
        self.gain = next((spec for spec in of_rows if not spec.is_matrix), None)
        self.head = next((spec for spec in of_rows if spec.is_matrix and not spec.lookup), None)
        assert self.gain is None or (self.head is not None and self.head.unit), "a gain takes the length of a unit row"
        self._of_all: dict[str, Tensor] = {}

    @property
    def made(self) -> str:
        """What has become of the vocabulary, for people."""
        added = self.state.model.vocab_size - self.n_old
        return f"{added} rows more, and of the tokenizer {len(self.spelled)} pieces more than that of {self.folder} has"

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        spec = self.specs[name]
        if spec.rows != "vocab":
            return self.inner.read(kind, name, start, stop)
        width = prod(global_shape(spec, self.state.model)[1:])
        first, last = start // width, -(-stop // width)
        rows = torch.empty(last - first, width)
        row = first
        while row < last:
            kept = row
            while kept < min(last, self.n_old) and kept not in self.spelled:
                kept += 1
            if kept > row:
                rows[row - first : kept - first] = self._old(spec, row, kept)
            elif not spec.is_matrix:
                rows[row - first] = length(self._mean(spec, row))
            else:
                mean = self._mean(spec, row)
                rows[row - first] = mean / length(mean).clamp_min(1e-300) if spec.unit else mean
            row = max(kept, row + 1)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _mean(self, spec: ParamSpec, row: int) -> Tensor:
        """What a new row is made of, (d_model,) fp64; a gain is made of what its head's row is."""
        matrix = self.head if self.head is not None and not spec.is_matrix else spec
        ids = self.spelled.get(row)
        if ids is not None:
            return sum_of_rows(torch.cat([self._vectors(matrix, one, one + 1) for one in ids])) / len(ids)
        if matrix.name not in self._of_all:  # it takes the whole matrix
            width = self.state.model.d_model
            parts = ((start // width, stop // width) for start, stop in blocks(0, self.n_ids * width, width))
            sums = [sum_of_rows(self._vectors(matrix, *part)) for part in parts]
            self._of_all[matrix.name] = sum_of_rows(torch.stack(sums)) / self.n_ids
        return self._of_all[matrix.name]

    def _vectors(self, matrix: ParamSpec, start: int, stop: int) -> Tensor:
        """Rows of the inner source by which it computes: those of its head times their gains; (stop - start, d_model)
        fp64."""
        rows = self._old(matrix, start, stop).double()
        return rows if self.gain is None or matrix.lookup else rows * self._old(self.gain, start, stop).double()

    def _old(self, spec: ParamSpec, start: int, stop: int) -> Tensor:
        width = prod(global_shape(spec, self.state.model)[1:])
        return self.inner.read("weight", spec.name, start * width, stop * width).view(-1, width)


def sum_of_rows(rows: Tensor) -> Tensor:
    return counter.row_sum(rows.T)[:, 0]


def length(vector: Tensor) -> Tensor:
    return counter.row_sum(vector * vector)[0].sqrt()
