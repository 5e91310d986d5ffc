"""Where the documents of a packed micro batch lie, so that each attends to itself alone and counts positions from 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from megabus.kernels.packed import packed_attention
from megabus.model.layers import rope_at

Frequencies = tuple[float, ...]


class Documents:
    """Of a micro batch of sequences of `seq_len` tokens, taken one after the other: N tokens.

    lengths: tokens of each document, in order, none of them 0; every sequence begins one.
    positions: of each token in its document, (N,) int64. bounds: where documents begin, and N: int32.
    """

    def __init__(self, lengths: Sequence[int], seq_len: int) -> None:
        self.lengths, self.seq_len = tuple(lengths), seq_len
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        ends = counts.cumsum(0)
        self.positions = torch.arange(sum(self.lengths)) - (ends - counts).repeat_interleave(counts)
        self.bounds = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        self._tables: dict[tuple[Frequencies, torch.dtype], tuple[Tensor, Tensor]] = {}

    def moved(self, move: Callable[[Tensor], Tensor]) -> Documents:
        """The same with its tensors on another device."""
        there = copy(self)
        there.positions, there.bounds, there._tables = move(self.positions), move(self.bounds), {}
        return there

    def rope(self, frequencies: Frequencies, like: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin at every token's position, (N, 1, C/2): one table for all layers."""
        key = frequencies, like.dtype
        if key not in self._tables:
            cos, sin = rope_at(0, self.seq_len, frequencies, like)
            self._tables[key] = cos[self.positions], sin[self.positions]
        return self._tables[key]

    def attend(self, q_1NHC: Tensor, k_1NKC: Tensor, v_1NKC: Tensor, scale: float) -> Tensor:
        """Causal attention within each document, (N, H, C)."""
        return packed_attention(q_1NHC[0], k_1NKC[0], v_1NKC[0], self.lengths, self.bounds, scale)

    def padded(self, n_rows: int) -> Documents:
        """With so many sequences of padding behind them, each a document."""
        return Documents((*self.lengths, *[self.seq_len] * n_rows), self.seq_len)
