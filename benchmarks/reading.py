"""How long a step waits for its samples: token files in the page cache and not, read when asked for and read ahead.

    python -m benchmarks.reading --folder /tmp/reading

One rank asks for its micro batches of a step, then computes for a while, here: sleeps. Times are medians over steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from megabus.data.batches import TokenSource
from megabus.data.indexed import IndexedWriter, pair_paths
from megabus.data.sources import Sources
from megabus.table import aligned
from megabus.testing.ranks import run_ranks
from megabus.train.corpora import Corpora

SEQ_LEN, VOCAB = 2048, 32_000


def write(prefix: Path, n_tokens: int) -> None:
    """Tokens that nothing compresses, in documents of 2^20."""
    draw = np.random.default_rng(0)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for _ in range(n_tokens >> 20):
            writer.append(draw.integers(0, VOCAB, 1 << 20, dtype=np.uint16))


def forget(path: Path) -> None:
    """No page of the file is in memory afterwards, unless it is mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def waited(prefix: str, rows: int, steps: int, computes: float, cold: bool) -> tuple[float, float]:
    """Seconds that a step waits if samples are read when they are asked for, and if they are read ahead."""
    found = []
    for ahead in (False, True):
        if cold:
            forget(pair_paths(prefix)[0])
        source = TokenSource([(prefix, 1.0)], SEQ_LEN, 0, VOCAB)
        corpora = Corpora(Sources(source, source, 0))
        stage = SimpleNamespace(grad_accum=1, seq_len=SEQ_LEN, tokens_per_step=rows * SEQ_LEN)
        rank = {"needs_data": True, "device": torch.device("cpu"), "micro_rows": lambda _: range(rows)}
        engine: Any = SimpleNamespace(stage=stage, **rank)
        took = []
        for step in range(steps):
            begun = time.perf_counter()
            if ahead:
                corpora.train_batches(engine, step * stage.tokens_per_step)
            else:
                source.batch(step * stage.tokens_per_step, SEQ_LEN, range(rows))
            took.append(time.perf_counter() - begun)
            time.sleep(computes)
        corpora.close()
        del source, corpora  # with their maps
        found.append(statistics.median(took[1:]))
    return found[0], found[1]


def table(prefix: str, rows: int, steps: int, computes: float) -> str:
    assert dist.is_initialized()
    lines = []
    for name, cold in (("in memory", False), ("on disk", True)):
        if not cold:
            np.fromfile(pair_paths(prefix)[0], np.uint16)
        times = waited(prefix, rows, steps, computes, cold)
        lines.append([name, *(f"{1e3 * each:.1f} ms" for each in times)])
    return aligned(["token file", "read when asked for", "read ahead"], lines, {0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for a token file, on the disk to be measured")
    parser.add_argument("--tokens", type=int, default=2**28, help="of the file")
    parser.add_argument("--rows", type=int, default=64, help=f"samples of {SEQ_LEN} tokens that a rank reads a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--computes", type=float, default=1.0, help="seconds that a step takes else")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prefix = args.folder / "random"
    if not pair_paths(prefix)[1].is_file():
        write(prefix, args.tokens)
        os.sync()
    print(f"a step of {args.rows} samples of {SEQ_LEN} tokens, out of {args.tokens:.2e}, waits\n")
    print(cast(str, run_ranks(1, table, str(prefix), args.rows, args.steps, args.computes)[0]))


if __name__ == "__main__":
    main()
