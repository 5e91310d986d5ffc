"""Text as the words of a byte-pair tokenizer, each in the pieces that it is cut into: what new pieces are learnt from.

The tokenizer cuts the text itself: what it takes out before all else (added tokens), changes or keeps apart is so here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from megabus.data.tokenizer.fast import Fast
from megabus.data.tokenizer.spelling import SPACE

NO_PIECE = -1  # a symbol that no new piece may hold
# What a symbol begins or ends with. Nothing goes before the last two in a word.
ANY, LETTER, NUMBER, OTHER, ALONE, BLANK = range(6)


class Words:
    """counts: words of the texts given, each a tuple of symbols. Those are ids of the tokenizer and, from `n_ids` on,
    characters that it has as bytes alone (byte fallback). texts: of each symbol, as the vocabulary writes it.

    Where a tokenizer writes ▁ for a space, its pre-tokenizer often cuts nothing. There words are what SentencePiece
    lets become a piece: letters, numbers or other characters, each with a ▁ at most before them; numbers one by one
    where all pieces have them so.
    """

    def __init__(self, codec: Fast) -> None:
        self._backend = codec.backend
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.n_bytes = self.n_tokens = 0
        self.vocab: dict[str, int] = codec.backend.get_vocab(with_added_tokens=True)
        self.n_ids = codec.n_ids
        self._byte_of = codec.byte_of
        apart = {*codec.byte_of, *codec.added, codec.unknown}
        self.texts = [""] * self.n_ids  # none of those that no new piece may hold
        for token, number in self.vocab.items():
            if number not in apart:
                self.texts[number] = token
        # By id. The same objects again and again: of large numbers the library makes a new one each time.
        self._symbols_of_ids = [number if text else NO_PIECE for number, text in enumerate(self.texts)]
        self._is_cut = any(text.startswith(SPACE) for text in self.texts)
        self._number = NUMBER if any(len(text) > 1 and text.isnumeric() for text in self.texts) else ALONE
        self._first = [self._kind(text[:1]) for text in self.texts]
        self._last = [self._kind(text[-1:]) for text in self.texts]
        self._symbol_of: dict[str, int] = {}

    @property
    def characters(self) -> range:
        """The symbols that are no pieces yet."""
        return range(self.n_ids, len(self.texts))

    def add(self, texts: Sequence[str]) -> None:
        for text, found in zip(texts, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            self.n_bytes += len(text.encode())
            self.n_tokens += len(found.ids)
            self._count(self._symbols(found.ids, found.word_ids))

    def _count(self, symbols: Iterable[tuple[int, int]]) -> None:
        """symbols: each with the place of what the pre-tokenizer has cut."""
        counts, first, last, word, before = self.counts, self._first, self._last, list[int](), -1
        for symbol, place in symbols:
            if word:
                end, begin = last[word[-1]], first[symbol]
                if symbol == NO_PIECE or place != before or begin >= ALONE or (begin != end and end != BLANK):
                    counts[tuple(word)] += 1
                    word = []
            if symbol != NO_PIECE:
                word.append(symbol)
            before = place
        if word:
            counts[tuple(word)] += 1

    def _symbols(self, ids: Sequence[int], places: Sequence[int]) -> Iterable[tuple[int, int]]:
        if self._byte_of:
            return self._with_characters(ids, places)
        return zip(map(self._symbols_of_ids.__getitem__, ids), places, strict=True)

    def _with_characters(self, ids: Sequence[int], places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Of bytes that stand for characters, the characters."""
        symbols, byte_of = self._symbols_of_ids, self._byte_of
        for (is_byte, place), run in groupby(zip(ids, places, strict=True), lambda one: (one[0] in byte_of, one[1])):
            if is_byte:
                yield from ((symbol, place) for symbol in self._of_bytes(bytes(byte_of[number] for number, _ in run)))
            else:
                yield from ((symbols[number], place) for number, _ in run)

    def _of_bytes(self, raw: bytes) -> list[int]:
        """A character of one byte has a piece already: its byte's."""
        try:
            return [self._symbol(character) if ord(character) > 127 else NO_PIECE for character in raw.decode()]
        except UnicodeDecodeError:  # text that spells a byte's piece
            return [NO_PIECE]

    def _symbol(self, character: str) -> int:
        if character not in self._symbol_of:
            self._symbol_of[character] = len(self.texts)
            self.texts.append(character)
            self._first.append(self._kind(character))
            self._last.append(self._kind(character))
        return self._symbol_of[character]

    def _kind(self, character: str) -> int:
        if not self._is_cut or not character:
            return ANY
        if character == SPACE:
            return BLANK
        category = unicodedata.category(character)[0]
        return {"L": LETTER, "M": LETTER, "N": self._number}.get(category, OTHER)
