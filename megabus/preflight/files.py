"""Token files and checkpoints: whether every rank reads the same bytes, and whether the disk has room for the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig, Stage
from megabus.data.indexed import REBUILD, IndexedTokens, read_meta
from megabus.data.sources import Sources, fetch, has_urls
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.parallel.agree import agreement
from megabus.parallel.topology import ranks_text
from megabus.preflight.findings import Finding, odd_ones, refused, size_text

WHOLE = 16 * 2**20  # bytes up to which a file is read whole; of a larger one BLOCKS blocks are, evenly spread
BLOCKS, BLOCK = 64, 64 * 2**10
# Bytes up to which a file's SHA-256 is compared with the one that its maker wrote down; and those of all files.
SUMMED, SUMMED_IN_ALL = 256 * 2**20, 2**30
BYTES = 12  # of a parameter in a checkpoint: its fp32 master and two moments; 4 more for each running mean

Print = tuple[str, str]  # (path, digest of its size and of what was read of it)


def spans(size: int) -> list[tuple[int, int]]:
    """Intervals of a file of `size` bytes that are read: all of a small one; blocks of a large one, both ends among
    them, that start at multiples of 8 bytes."""
    if size <= WHOLE:
        return [(0, size)]
    last = size - BLOCK
    starts = [last * number // (BLOCKS - 1) // 8 * 8 for number in range(BLOCKS - 1)]
    return [(start, start + BLOCK) for start in starts] + [(last // 8 * 8, size)]


def read_spans(path: Path) -> tuple[str, list[bytes]]:
    """(digest, what was read)."""
    size = path.stat().st_size
    digest, blocks = hashlib.sha256(str(size).encode()), []
    with path.open("rb") as file:
        for start, stop in spans(size):
            file.seek(start)
            blocks.append(file.read(stop - start))
            digest.update(blocks[-1])
    return digest.hexdigest()[:16], blocks


def fingerprints(sources: Sources) -> list[Print]:
    """Of both files of every corpus, in the configuration's order.

    Raises `UserError` for a token outside the vocabulary in what was read of it.
    """
    prints: list[Print] = []
    for key, source in sources.named():
        for _, file in source.files:
            for path in (file.idx_path, file.bin_path):
                digest, blocks = read_spans(path)
                if path == file.bin_path:
                    _check_tokens(key, file, blocks, source.vocab_size)
                prints.append((str(path), digest))
    return prints


def check_sums(sources: Sources, heartbeat: Callable[[], None]) -> None:
    """Raises `UserError` for a small file whose SHA-256 is not the one that megabus preprocess wrote beside it."""
    left = SUMMED_IN_ALL
    for key, source in sources.named():
        for prefix, file in source.files:
            path, expected = file.bin_path, (read_meta(prefix) or {}).get("bin_sha256")
            if expected is None or path.stat().st_size > min(SUMMED, left):
                continue
            left -= path.stat().st_size
            heartbeat()
            with path.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != expected:
                problem = f"has SHA-256 {found[:12]}..., its .meta.json says {expected[:12]}..."
                raise UserError(key, path, problem, f"copy it again, or {REBUILD}")


@contextmanager
def readable() -> Iterator[None]:
    """What the system refuses while token files are read is a `UserError`."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("data", error.filename, problem, "mend the file or its permissions") from error


def fetch_together(config: RunConfig, group: dist.ProcessGroup, heartbeat: Callable[[], None]) -> None:
    """Token files of URLs come to every machine. It takes as long as it takes: who has them waits for the others and
    stays alive. Raises `UserError` on all ranks where one of them cannot have them. Collective."""
    if not has_urls(config):
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, config)
        everyone = torch.zeros(1)
        while not everyone:
            wait([coming], timeout=1.0)
            everyone.fill_(coming.done())
            dist.all_reduce(everyone, dist.ReduceOp.MIN, group)
            heartbeat()
    with agreement(group):
        coming.result()


def _check_tokens(key: str, corpus: IndexedTokens, blocks: Sequence[bytes], vocab_size: int) -> None:
    for block in blocks:
        tokens = np.frombuffer(block, corpus.dtype.newbyteorder("<"))
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            problem = f"has a token {low if low < 0 else high}, outside [0, {vocab_size})"
            remedy = "set the model's vocab_size to the tokenizer's"
            raise UserError(key, corpus.bin_path, problem, remedy)


def data_row(ranks: Sequence[Sequence[Print]], n_tokens: int) -> Finding:
    """ranks: of each rank what it has read; nothing of those that leave it to another of their machine."""
    readers = [rank for rank, prints in enumerate(ranks) if prints]
    for prints in zip(*(ranks[rank] for rank in readers), strict=True):
        (_, _), odd = odd_ones(prints)
        if odd:
            path = prints[odd[0]][0]
            problem = f"has other bytes on {ranks_text([readers[i] for i in odd])} than on the other ranks that read it"
            return refused("data", UserError("data", path, problem, "copy it again to that machine"))
    return Finding(
        "data", f"{len(ranks[0])} files, {n_tokens:,} tokens, the same for {len(readers)} rank(s) that read them"
    )


def checkpoint_bytes(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Of one checkpoint of the largest stage."""
    return (BYTES + 4 * len(config.train.ema)) * max(count_parameters(stage.model) for stage in stages)


def disk_row(config: RunConfig, stages: Sequence[Stage]) -> Finding:
    """keep_last checkpoints are kept while one more is written. What an earlier start left makes way for them."""
    keep, one = config.checkpoint.keep_last, checkpoint_bytes(config, stages)
    disk = os.statvfs(config.run_dir)
    free = disk.f_bavail * disk.f_frsize
    older = complete(checkpoints_of(config.run_dir))[:keep]
    there = sum(file.stat().st_size for folder in older for file in folder.iterdir())
    need = (keep + 1) * one
    text = f"{keep} + 1 checkpoints of {size_text(one)} take {size_text(need)}, {size_text(free)} are free" + (
        f" beside the {size_text(there)} of older ones" if there else ""
    )
    if need > free + there:
        remedy = "free some, lower checkpoint.keep_last, or choose another disk"
        return refused("disk", UserError("run_dir", config.run_dir, text, remedy))
    return Finding("disk", text)
