"""Weights for a larger vocabulary: rows for pieces that the tokenizer has beside those that it had."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor

from megabus import counter
from megabus.checkpoint.manifest import Heartbeat, idle
from megabus.checkpoint.state import without_run
from megabus.convert.source import BLOCK, FolderSource, blocks
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec, global_shape
from megabus.parallel.fragments import Kind

JOINED = 1 << 15  # entries between two rows that are read at once with them: sooner than by another read


class LargerVocabulary:
    """A source whose model has rows for new ids; whatever was there is the inner source's, to the bit.

    spelled: id of a new piece -> ids of the old pieces that it was spelled with; its rows are made of theirs. n_ids: of
    the old tokenizer, which may have pieces that the model has no rows for: nothing is made of those. A row of the
    larger vocabulary that no such pieces spell is as one spelled with all old ids that have rows.

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
        self,
        source: FolderSource,
        vocab_size: int,
        spelled: Mapping[int, Sequence[int]],
        n_ids: int,
        tokenizer: Path,
        heartbeat: Heartbeat = idle,
    ) -> None:
        self.inner, self.folder, self.heartbeat = source, source.folder, heartbeat
        self.tokenizer: Path | None = tokenizer
        self.n_old = source.state.model.vocab_size
        self.n_ids, self.n_rowless, self.n_new = min(n_ids, self.n_old), max(0, n_ids - self.n_old), len(spelled)
        known = {piece: [one for one in ids if one < self.n_old] for piece, ids in spelled.items()}
        self.spelled: Mapping[int, Sequence[int]] = {piece: ids for piece, ids in known.items() if ids}
        larger = source.state.model.model_copy(update={"vocab_size": vocab_size})
        self.state = without_run(source.state, larger)
        self.specs = param_specs(larger)
        of_rows = [spec for spec in self.specs.values() if spec.rows == "vocab"]
        self.gain = next((spec for spec in of_rows if not spec.is_matrix), None)
        self.head = next((spec for spec in of_rows if spec.is_matrix and not spec.lookup), None)
        assert self.gain is None or (self.head is not None and self.head.unit), "a gain takes the length of a unit row"
        self._is_new = torch.arange(vocab_size) >= self.n_old
        self._is_new[[*self.spelled]] = True
        self._of_all: dict[str, Tensor] = {}
        # Of the means that the head's new rows are made of, once they are: its gain is made of the same.
        self._lengths = torch.full((vocab_size,), torch.nan, dtype=torch.float64)

    @property
    def made(self) -> str:
        """What has become of the vocabulary, for people."""
        now, inside = self.state.model.vocab_size, sum(piece < self.n_old for piece in self.spelled)
        parts = [_counted(self.n_new, "new piece")] if self.n_new or not self.n_rowless else []
        if inside:
            parts.append(f"{'' if inside == self.n_new else f'{inside} of them '}in rows that were padding")
        if self.n_rowless:
            parts.append(f"{_counted(self.n_rowless, 'piece')} of its own tokenizer that had no row")
        return ", ".join(parts) + ("" if now == self.n_old else f"; {now} rows instead of {self.n_old}")

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        spec = self.specs[name]
        if spec.rows != "vocab":
            return self.inner.read(kind, name, start, stop)
        width = prod(global_shape(spec, self.state.model)[1:])
        first, last = start // width, -(-stop // width)
        rows = torch.empty(last - first, width)
        new = self._is_new[first:last]
        for kept in _runs((~new).nonzero()[:, 0].tolist()):
            rows[kept.start : kept.stop] = self._old(spec, first + kept.start, first + kept.stop)
        for places in self._chunks(new.nonzero()[:, 0].tolist(), first):
            rows[places] = self._new(spec, [first + place for place in places]).float()
            self.heartbeat()
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _chunks(self, places: Sequence[int], first: int) -> Iterator[list[int]]:
        """New rows, by their places behind the row `first`, so many that about BLOCK entries make them."""
        limit, chunk, taken = BLOCK // self.state.model.d_model, list[int](), 0
        for place in places:
            chunk.append(place)
            taken += len(self.spelled.get(first + place, (0,)))
            if taken >= limit:
                yield chunk
                chunk, taken = [], 0
        if chunk:
            yield chunk

    def _new(self, spec: ParamSpec, rows: Sequence[int]) -> Tensor:
        """Those rows, all new, of a parameter: (len(rows), its width) fp64."""
        if spec.is_matrix:
            means = self._means(spec, rows)
            if not spec.unit:
                return means
            lengths = length(means)
            if spec is self.head:
                self._lengths[rows] = lengths[:, 0]
            return means / lengths.clamp_min(1e-300)
        if lacking := [row for row in rows if self._lengths[row].isnan()]:
            assert self.head is not None
            self._lengths[lacking] = length(self._means(self.head, lacking))[:, 0]
        return self._lengths[rows][:, None]

    def _means(self, matrix: ParamSpec, rows: Sequence[int]) -> Tensor:
        """What new rows are made of, (len(rows), d_model) fp64. Those that as many pieces spell are added up together,
        in the order in which one would be by itself."""
        alike: dict[int, list[int]] = {}  # number of pieces -> places in `rows`; 0: spelled by none
        for place, row in enumerate(rows):
            alike.setdefault(len(self.spelled.get(row, ())), []).append(place)
        ids = sorted({one for row in rows for one in self.spelled.get(row, ())})
        place_of = {one: place for place, one in enumerate(ids)}
        vectors = self._vectors(matrix, ids)
        means = torch.empty(len(rows), self.state.model.d_model, dtype=torch.float64)
        for n, places in alike.items():
            if n:
                spelled = torch.tensor([[place_of[one] for one in self.spelled[rows[place]]] for place in places])
                means[places] = counter.row_sum(vectors[spelled].transpose(1, 2))[..., 0] / n
            else:
                means[places] = self._mean_of_all(matrix)
        return means

    def _mean_of_all(self, matrix: ParamSpec) -> Tensor:
        """Of the rows of all old ids, (d_model,) fp64."""
        if matrix.name not in self._of_all:  # it takes the whole matrix
            width, sums = self.state.model.d_model, []
            for start, stop in blocks(0, self.n_ids * width, width):
                sums.append(sum_of_rows(self._vectors(matrix, range(start // width, stop // width))))
                self.heartbeat()
            self._of_all[matrix.name] = sum_of_rows(torch.stack(sums)) / self.n_ids
        return self._of_all[matrix.name]

    def _vectors(self, matrix: ParamSpec, ids: Sequence[int]) -> Tensor:
        """Rows of the inner source, ascending, by which it computes: those of its head times their gains; (len(ids),
        d_model) fp64."""
        rows = self._gathered(matrix, ids).double()
        return rows if self.gain is None or matrix.lookup else rows * self._gathered(self.gain, ids).double()

    def _gathered(self, spec: ParamSpec, ids: Sequence[int]) -> Tensor:
        """Rows of the inner source, ascending, (len(ids), its width) fp32. What lies between two of them is read too
        where that is little."""
        width, parts, place = self.state.model.d_model, [torch.empty(0)], 0
        for run in _runs(ids, JOINED // width, BLOCK // width):
            there = ids[place : bisect_left(ids, run.stop)]
            parts.append(self._old(spec, run.start, run.stop)[[one - run.start for one in there]].reshape(-1))
            place += len(there)
        return torch.cat(parts).view(len(ids), prod(global_shape(spec, self.state.model)[1:]))

    def _old(self, spec: ParamSpec, start: int, stop: int) -> Tensor:
        width = prod(global_shape(spec, self.state.model)[1:])
        return self.inner.read("weight", spec.name, start * width, stop * width).view(-1, width)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def sum_of_rows(rows: Tensor) -> Tensor:
    """(n, d) -> (d,)."""
    return counter.row_sum(rows.T)[:, 0]


def length(vectors: Tensor) -> Tensor:
    """(n, d) -> (n, 1)."""
    return counter.row_sum(vectors * vectors).sqrt()


def _runs(numbers: Sequence[int], gap: int = 1, longest: float = inf) -> Iterator[range]:
    """Ascending numbers as ranges that begin and end with one of them; more than `gap` apart they are not joined, nor
    to ranges of more than `longest`."""
    begun = 0
    for place, number in enumerate(numbers):
        following = numbers[place + 1] if place + 1 < len(numbers) else None
        if following is None or following - number > gap or following - numbers[begun] >= longest:
            yield range(numbers[begun], number + 1)
            begun = place + 1
