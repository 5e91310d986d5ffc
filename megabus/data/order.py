"""Data order as a pure function of (seed, consumed tokens): nothing is built, stored or shuffled in memory.

A corpus is a flat token stream cut in chunks of `chunk_len` tokens, the longest sequence of the run. An epoch
visits every chunk once, in the order of a keyed pseudo-random permutation; shorter sequences walk through a
chunk one after another. So the tokens seen depend neither on the number of ranks nor on the micro batch, and
a run whose sequences grow visits what a run with long sequences would have visited.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isinf
from typing import ClassVar

from pydantic import ConfigDict

from megabus.errors import UserError
from megabus.splitmix import MASK_64, mix64

FEISTEL_ROUNDS = 6
BLEND_PERIOD = 1024


def permute(index: int, n: int, seed: int, epoch: int) -> int:
    """Image of `index` under the permutation of [0, n) keyed by (seed, epoch), in O(1) time and memory.

    A balanced Feistel network permutes the smallest [0, 4^k) that holds n; walking its cycle until the value
    falls below n again restricts it to [0, n) (Black & Rogaway 2002), fewer than four walks on average.
    """
    if not 0 <= index < n:
        raise ValueError(f"index {index} outside [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    key = mix64(mix64(seed & MASK_64) ^ (epoch & MASK_64))
    while True:
        left, right = index >> half_bits, index & half_mask
        for step in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(key ^ mix64((step << 56) ^ right)) & half_mask)
        index = left << half_bits | right
        if index < n:
            return index


def nth_visited(number: int, n: int, seed: int) -> int:
    """What is visited as the `number`-th, from 0 on: epoch follows epoch, each visits [0, n) in an order of its own."""
    epoch, index = divmod(number, n)
    return permute(index, n, seed, epoch)


def align_up(position: int, seq_len: int) -> int:
    """The first multiple of `seq_len` at or after `position`: where a stage with that length may start."""
    return -(-position // seq_len) * seq_len


@dataclass(frozen=True)
class ChunkOrder:
    """The order in which one corpus of `n_tokens` tokens is read.

    Chunk i covers tokens [i * chunk_len, (i + 1) * chunk_len], one more than chunk_len, because the last
    target is the first token of the next chunk. Tokens after the last whole chunk are never inputs.
    """

    n_tokens: int
    chunk_len: int
    seed: int

    @property
    def n_chunks(self) -> int:
        """Chunks per epoch."""
        return (self.n_tokens - 1) // self.chunk_len

    def sample_span(self, position_tokens: int, seq_len: int) -> tuple[int, int]:
        """(start, stop) in the flat stream of the seq_len + 1 tokens read at `position_tokens`.

        Raises UserError unless seq_len divides chunk_len, ValueError unless it divides the position.
        """
        if seq_len < 1 or self.chunk_len % seq_len:
            problem = f"does not divide {self.chunk_len}, the longest sequence of the run"
            raise UserError("seq_len", seq_len, problem, f"choose a divisor of {self.chunk_len}")
        if position_tokens < 0 or position_tokens % seq_len:
            raise ValueError(f"position {position_tokens} is not a multiple of {seq_len}: use align_up")
        number, offset = divmod(position_tokens, self.chunk_len)
        start = nth_visited(number, self.n_chunks, self.seed) * self.chunk_len + offset
        return start, start + seq_len + 1


class Blend:
    """Deals chunk numbers out to corpora in a fixed schedule of `BLEND_PERIOD` slots.

    Each period gives corpus k exactly its largest-remainder share of the slots, in a seeded shuffle, so
    proportions are exact every period and locate() is O(1). A weight of 0 gives none. Raises UserError for a
    weight that is negative or too small for one slot, and where all are 0.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = slots(weights)
        dealt = [k for k, count in enumerate(self.counts) for _ in range(count)]
        if max(self.counts) == BLEND_PERIOD:  # no shuffle changes that, and it would take longer than a start's data
            self._corpus = dealt
        else:
            self._corpus = [dealt[permute(slot, BLEND_PERIOD, seed, 0)] for slot in range(BLEND_PERIOD)]
        seen = [0] * len(self.counts)
        self._rank = []  # how many earlier slots of the period went to the same corpus
        for k in self._corpus:
            self._rank.append(seen[k])
            seen[k] += 1

    def locate(self, number: int) -> tuple[int, int]:
        """Chunk `number` of the blend -> (corpus k, number of that chunk among corpus k's own)."""
        period, slot = divmod(number, BLEND_PERIOD)
        k = self._corpus[slot]
        return k, period * self.counts[k] + self._rank[slot]

    def dealt(self, number: int) -> list[int]:
        """How many of the first `number` chunks go to each corpus."""
        period, slot = divmod(number, BLEND_PERIOD)
        return [period * count + self._corpus[:slot].count(k) for k, count in enumerate(self.counts)]


@dataclass(frozen=True)
class Deal:
    """From chunk `start` of a run on, the slots that each corpus has of `BLEND_PERIOD`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    start: int
    counts: tuple[int, ...]


class Deals:
    """Blends that follow each other in a run. Each deals out a corpus from where the one before has left off: however
    weights change, an epoch of a corpus holds every chunk once.

    deals: the first from 0 on, the starts rising, all of as many corpora.
    """

    def __init__(self, deals: Sequence[Deal], seed: int) -> None:
        self.deals = tuple(deals)
        self._starts = [deal.start for deal in deals]
        self._blends = [Blend(deal.counts, seed) for deal in deals]
        lasted = [stop - start for start, stop in zip(self._starts, self._starts[1:], strict=False)]
        dealt = [blend.dealt(n) for blend, n in zip(self._blends, lasted, strict=False)]
        nothing = [0] * len(self.deals[0].counts)
        # Of each blend what the ones before it have dealt of every corpus.
        self._before = list(accumulate(dealt, lambda x, y: [a + b for a, b in zip(x, y, strict=True)], initial=nothing))

    def locate(self, number: int) -> tuple[int, int]:
        """Chunk `number` of the run -> (corpus k, number of that chunk among corpus k's own)."""
        at = bisect_right(self._starts, number) - 1
        k, own = self._blends[at].locate(number - self._starts[at])
        return k, self._before[at][k] + own


def slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Of `BLEND_PERIOD`, those of each corpus. Raises UserError as `Blend` does."""
    return tuple(_largest_remainder(weights, BLEND_PERIOD))


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Integers proportional to `weights` that sum to `total` (Hamilton's method)."""
    for k, weight in enumerate(weights):
        if not 0 <= weight < float("inf"):
            raise UserError(f"data weight {k}", weight, "not a number from 0 on", "weigh or drop the corpus")
    if not sum(weights):
        raise UserError("data weights", list(weights), "sum to nothing", "give one above 0")
    if isinf(sum(weights)):
        weights = [weight / max(weights) for weight in weights]
    shares = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    for k, count in enumerate(counts):
        if count == 0 and weights[k]:
            problem = f"less than one in {total} of the weights' sum, it would never be read"
            raise UserError(f"data weight {k}", weights[k], problem, "raise it or drop the corpus")
    return counts
