"""One corpus of one or many token files, read as one flat stream."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from megabus.data.indexed import IndexedTokens
from megabus.data.remote import is_url, listed, local_prefix
from megabus.errors import UserError


class Corpus:
    """Token files one after the other, as if they were one. A sample may begin in one and end in the next.

    prefixes: of `.bin`/`.idx` pairs on this machine. Raises UserError as `IndexedTokens` does.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.prefixes = list(prefixes)
        self.files = [IndexedTokens(prefix) for prefix in self.prefixes]
        self._starts = list(accumulate((file.n_tokens for file in self.files), initial=0))
        self.n_tokens = self._starts[-1]
        self.n_documents = sum(file.n_documents for file in self.files)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat stream, shape (stop - start,): a view where one file holds them all."""
        parts = [file.tokens(*span) for file, span in self._files_of(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([part.astype(np.int64) for part in parts])

    def document_lengths(self, start: int, stop: int) -> list[int]:
        """How tokens [start, stop) are divided among documents: lengths above 0, in order. A file begins one."""
        return [n for file, span in self._files_of(start, stop) for n in file.document_lengths(*span)]

    def place_of(self, token: int) -> tuple[str, int]:
        """(prefix, number within it) of a token of the flat stream."""
        at = bisect_right(self._starts, token) - 1
        return self.prefixes[at], token - self._starts[at]

    def _files_of(self, start: int, stop: int) -> list[tuple[IndexedTokens, tuple[int, int]]]:
        """The files that tokens [start, stop) lie in, and where in each."""
        if not 0 <= start < stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens} in {self.prefixes[0]}")
        found, at = [], bisect_right(self._starts, start) - 1
        while start < stop:
            base, end = self._starts[at], min(stop, self._starts[at + 1])
            found.append((self.files[at], (start - base, end - base)))
            start, at = end, at + 1
        return found


def open_corpus(paths: Sequence[str], cache: Path | None = None, heartbeat: Callable[[], object] = int) -> Corpus:
    """The corpus of prefixes, patterns of prefixes and URLs of either, in that order; what a pattern matches comes in
    the order of its names.

    cache, heartbeat: see `megabus.data.remote.local_prefix`. Raises UserError for a pattern that matches nothing, and
    for a prefix that comes twice.
    """
    prefixes: list[str] = []
    for path in paths:
        for prefix in expanded_pattern(path):
            if prefix in prefixes:
                raise UserError("data", prefix, "comes twice in one corpus", "name each file once")
            prefixes.append(prefix)
    return Corpus([local_prefix(p, cache, heartbeat) if is_url(p) else p for p in prefixes])


def expanded_pattern(path: str) -> list[str]:
    """The prefixes that a pattern stands for; a path without a wildcard, and one that a file has, is itself."""
    if not glob.has_magic(path) or (not is_url(path) and Path(f"{path}.idx").exists()):
        return [path]
    names = listed(f"{path}.idx") if is_url(path) else sorted(glob.glob(f"{path}.idx", recursive=True))
    if not names:
        raise UserError("data", path, "matches no .idx file", "correct the pattern, or run megabus preprocess")
    return [name.removesuffix(".idx") for name in names]
