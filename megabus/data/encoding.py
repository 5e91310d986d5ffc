"""Texts to token ids, in several processes: the ids do not depend on how many."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megabus.data.indexed import dtype_for_vocab
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError

BATCH_CHARACTERS = 1 << 20


class Encoded(NamedTuple):
    """A document: whether it is for validation, its ids, and the bytes of its text in UTF-8."""

    is_valid: bool
    ids: np.ndarray
    n_bytes: int


@dataclass(frozen=True)
class Encoder:
    """What a process needs to know; `encode` is a pure function of its batch."""

    tokenizer_path: Path
    fingerprint: str
    valid_fraction: float
    prefix: list[int]  # ids before each document
    suffix: list[int]  # and after it

    def encode(self, texts: list[str]) -> list[Encoded]:
        tokenizer = _loaded(self.tokenizer_path, self.fingerprint)
        dtype = dtype_for_vocab(tokenizer.vocab_size)
        found = []
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            array = np.array(self.prefix + ids + self.suffix, dtype=dtype)
            found.append(Encoded(is_validation(text, self.valid_fraction), array, len(text.encode())))
        return found


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer, loaded once per process, of which it takes no more than one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(path)
    if tokenizer.files.fingerprint != fingerprint:
        raise UserError("tokenizer", path, "has been changed while it was used", "start again")
    return tokenizer


def is_validation(text: str, fraction: float) -> bool:
    """Whether the hash of the text falls in `fraction`: equal texts stay on one side, in whatever order."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Batches of whole documents, about BATCH_CHARACTERS characters each."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(encoder: Encoder, texts: Iterable[str], workers: int) -> Generator[list[Encoded], None, None]:
    """encoder.encode of every batch, in order; at most four batches per worker are in flight.

    Raises UserError if processes cannot be started, or one of them is killed.
    """
    if workers == 1:
        yield from map(encoder.encode, in_batches(texts))
        return
    pool = _pool(workers)
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in in_batches(texts):
            pending.append(_submit(pool, workers, encoder, batch))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        problem = "one of these processes was killed, perhaps since the machine has too little memory for them"
        raise UserError("--workers", workers, problem, "start again, with fewer") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: what has read the inputs may have started threads, whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(workers, context, _live_with_parent)
    except (OSError, ImportError) as error:  # ImportError is how Python says that there are no semaphores at all
        raise _unstartable(workers, error) from error


def _submit(pool: ProcessPoolExecutor, workers: int, encoder: Encoder, batch: list[str]) -> Future[list[Encoded]]:
    try:
        return pool.submit(encoder.encode, batch)  # the first ones start the processes
    except OSError as error:
        raise _unstartable(workers, error) from error


def _unstartable(workers: int, error: Exception) -> UserError:
    problem = f"processes that share memory cannot be started here ({error}; is /dev/shm writable?)"
    return UserError("--workers", workers, problem, "mend that, or give --workers 1")


def _live_with_parent() -> None:
    """In a worker: end with the process that reads, even if that is killed, and leave the keyboard's signal to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
