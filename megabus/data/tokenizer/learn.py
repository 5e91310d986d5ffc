"""New pieces for a byte-pair tokenizer, learnt from text by going on with its training: its own merges come first."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.words import Words
from megabus.errors import UserError

BATCH = 1 << 20  # characters that are encoded at once,
PART = 1 << 16  # and most of them in one text, since each is encoded by one thread
LEAST = 2  # how often two pieces must stand side by side to become one
ALONE = -1  # in place of a second piece: a character that is to become one

Pair = tuple[int, int]


class Piece(NamedTuple):
    """text: as the vocabulary writes it; merged: the two pieces that become it, or none: it is a character."""

    text: str
    merged: tuple[str, str] | None


class Lesson:
    """Up to n new pieces from documents, which are known as `name`. What came of it: the pieces, the text's bytes, its
    tokens before, and how many `fewer` they are now."""

    def __init__(self, n: int, documents: Iterable[str], name: str) -> None:
        self.n, self.documents, self.name = n, documents, name
        self.pieces: list[Piece] = []
        self.n_bytes = self.n_tokens = self.fewer = 0
        self.is_read = False

    def learn(self, codec: Fast) -> None:
        """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) that begins with the tokenizer's own pieces: the
        pair that stands side by side most often becomes a piece, again and again; of equals that of lower ids. The
        same texts give the same pieces. Raises `UserError` where they give none."""
        words = Words(codec)
        for batch in _batches(self.documents):
            words.add(batch)
            self.n_bytes, self.n_tokens = words.n_bytes, words.n_tokens
        if not words.n_bytes:
            raise UserError("--text", self.name, "holds no text to learn from", "give files that do")
        self.is_read = True
        pairs = _Pairs(words)
        texts, taken = pairs.texts, set(words.vocab)
        while len(self.pieces) < self.n and (pair := pairs.most_frequent()) is not None:
            left, right = pair
            text = texts[left] + (texts[right] if right != ALONE else "")
            if text in taken:  # by a piece that merges do not lead to, or a token that is added: old text would change
                continue
            taken.add(text)
            if right == ALONE:
                self.pieces.append(Piece(text, None))
                self.fewer += pairs.admit(left)
            else:
                self.pieces.append(Piece(text, (texts[left], texts[right])))
                self.fewer += pairs.merge(pair, text)
        if not self.pieces:
            problem = "has no two pieces that stand together twice and may become one"
            raise UserError("--text", self.name, problem, "give more text")


class _Pairs:
    """How often which two symbols stand side by side in words, and how two become one. A character that is no piece yet
    is in no pair, and counts ALONE.

    A part of a word whose ends no merge has crossed is in the same pieces wherever it stands. So a word that is a new
    piece becomes it by merges, and is the same piece where these are not asked (`ignore_merges`).
    """

    def __init__(self, words: Words) -> None:
        self.texts = [*words.texts]  # of symbols
        self.words, self.weights = [[*word] for word in words.counts], [*words.counts.values()]
        self.characters = {one: len(self.texts[one].encode()) for one in words.characters}  # and the bytes of each
        self.counts: defaultdict[Pair, int] = defaultdict(int)
        self.where: defaultdict[Pair, list[int]] = defaultdict(list)  # words, ascending; some may have lost the pair
        for place, word in enumerate(self.words):
            self._count(place, self._pairs(word))
        # Counts never rise once a pair is there. A lower one than the heap has is found out when it comes up.
        self.heap = [(-count, pair) for pair, count in self.counts.items() if count >= LEAST]
        heapq.heapify(self.heap)

    def most_frequent(self) -> Pair | None:
        """The pair, less those that were given before; None where none occurs twice."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if (now := self.counts[pair]) == -count:
                return pair
            if now >= LEAST:
                heapq.heappush(self.heap, (-now, pair))
        return None

    def merge(self, pair: Pair, text: str) -> int:
        """Make one symbol of a pair wherever it stands; by how many symbols all words are shorter."""
        symbol, fewer, made = len(self.texts), 0, set[Pair]()
        self.texts.append(text)
        for place in self.where.pop(pair):
            fewer += self._join(place, pair, symbol, made)
        self._push(made)
        return fewer

    def _join(self, place: int, pair: Pair, symbol: int, made: set[Pair]) -> int:
        """In one word, from its beginning on. made: takes up the pairs that the symbol is in."""
        word, weight, counts, (left, right) = self.words[place], self.weights[place], self.counts, pair
        n_before = len(word)
        at = _find(word, left, 0)
        while at is not None:
            if at + 1 < len(word) and word[at + 1] == right:
                counts[pair] -= weight
                now = []
                if at > 0 and word[at - 1] not in self.characters:
                    counts[word[at - 1], left] -= weight
                    now.append((word[at - 1], symbol))
                if at + 2 < len(word) and word[at + 2] not in self.characters:
                    counts[right, word[at + 2]] -= weight
                    now.append((symbol, word[at + 2]))
                self._count(place, now)
                made.update(now)
                word[at : at + 2] = [symbol]
            at = _find(word, left, at + 1)
        return (n_before - len(word)) * weight

    def admit(self, character: int) -> int:
        """Make it a piece; how many pieces for bytes it takes the place of, less itself."""
        n_bytes, n_found, made = self.characters.pop(character), 0, set[Pair]()
        del self.counts[character, ALONE]
        for place in self.where.pop((character, ALONE)):
            word = self.words[place]
            n_found += word.count(character) * self.weights[place]
            now = [pair for pair in self._pairs(word) if character in pair]
            self._count(place, now)
            made.update(now)
        self._push(made)
        return n_found * (n_bytes - 1)

    def _pairs(self, word: list[int]) -> list[Pair]:
        pairs, characters = [*pairwise(word)], self.characters
        if not characters:
            return pairs
        pieces = [(a, b) for a, b in pairs if a not in characters and b not in characters]
        return pieces + [(one, ALONE) for one in word if one in characters]

    def _count(self, place: int, pairs: Iterable[Pair]) -> None:
        weight = self.weights[place]
        for pair in pairs:
            self.counts[pair] += weight
            there = self.where[pair]
            if not there or there[-1] != place:
                there.append(place)

    def _push(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if self.counts[pair] >= LEAST:
                heapq.heappush(self.heap, (-self.counts[pair], pair))


def _find(word: list[int], symbol: int, start: int) -> int | None:
    try:
        return word.index(symbol, start)
    except ValueError:
        return None


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, n_read = list[str](), 0
    for text in documents:
        for part in _parts(text):
            batch.append(part)
            n_read += len(part)
            if n_read >= BATCH:
                yield batch
                batch, n_read = [], 0
    yield batch


def _parts(text: str) -> Iterator[str]:
    """A book in parts, which end with a line where they can."""
    start = 0
    while len(text) - start > PART:
        end = text.rfind("\n", start, start + PART) + 1 or start + PART
        yield text[start:end]
        start = end
    yield text[start:]
