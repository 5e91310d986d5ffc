"""What docs/estimate.md shows: memory as megabus.estimate has it, against what ranks of a small model really hold.

python -m benchmarks.memory           # on a CPU, some 3 minutes on a quiet core

A row is a configuration, its rank whose estimate is furthest off: bytes beside weights, masters and moments (which must
be right to the byte) at the worst moment of a step, activations alone, and all together.
"""

from __future__ import annotations

import datetime
import sys
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.memory_of_ranks import Measured, measure, memory_training
from megabus.config import Layout
from megabus.engine import ds_config
from megabus.estimate.memory import RankMemory, rank_memory
from megabus.table import aligned
from megabus.testing.ranks import run_ranks

BUCKET = 300_000  # entries, less than the model has: buckets of the usual size would be nearly all there is
CASES: list[tuple[str, Layout, dict[str, Any]]] = [
    ("ngpt", Layout(1, 1, 1), {}),
    ("ngpt", Layout(1, 1, 1), {"micro_batch_size": 7}),
    ("ngpt", Layout(1, 1, 1), {"micro_batches": 1}),
    ("gpt", Layout(1, 1, 1), {"precision": "bf16"}),
    ("ngpt", Layout(1, 1, 1), {"precision": "bf16", "recompute": True}),
    ("ngpt", Layout(1, 1, 2), {"zero_stage": 2}),
    ("ngpt", Layout(1, 1, 2), {"zero_stage": 2, "precision": "bf16"}),
    ("gpt", Layout(1, 1, 2), {}),
    ("ngpt", Layout(2, 1, 1), {"precision": "bf16"}),
    ("ngpt", Layout(2, 1, 1), {"precision": "bf16", "sequence_parallel": True}),
    ("gpt", Layout(2, 1, 1), {"sequence_parallel": True, "recompute": True}),
    ("ngpt", Layout(1, 2, 1), {}),
    ("ngpt", Layout(1, 3, 1), {"precision": "bf16"}),
    ("gpt", Layout(1, 2, 1), {"precision": "bf16", "recompute": True}),
    ("ngpt", Layout(2, 2, 1), {"precision": "bf16", "sequence_parallel": True, "recompute": True}),
]


def parts(estimate: RankMemory) -> tuple[int, int, int]:
    """In the terms of `Measured`: computing, reducing, updating."""
    return estimate.gradients + estimate.buckets + estimate.activations, estimate.reduction, estimate.update


def _row(name: str, layout: Layout, estimate: RankMemory, found: Measured) -> list[str]:
    computing = found.computing - estimate.gradients - estimate.buckets
    exact = (estimate.weights, estimate.masters, estimate.moments) == (found.weights, found.masters, found.moments)
    row = [name, str(layout), "exact" if exact else "WRONG"]
    pairs = [
        (estimate.activations, computing),
        *zip(parts(estimate)[1:], (found.reducing, found.updating), strict=True),
    ]
    for one, other in [*pairs, (estimate.total, found.total)]:
        row += [f"{one / 1e6:.2f}", f"{other / 1e6:.2f}", f"{one / other - 1:+.1%}"]
    return row


def main() -> int:
    ds_config.BUCKET_ENTRIES = BUCKET
    print(f"{machine()}, {datetime.datetime.now():%Y-%m-%d}; MB, estimated and measured\n", flush=True)
    header = ["run", "layout", "states"]
    for what in ("activations", "reduction", "update", "total"):
        header += [what, "found", "off"]
    rows = []
    for kind, layout, options in CASES:
        config = memory_training(kind, layout, **options)
        name = ", ".join([kind, *(f"{key} {value}" for key, value in options.items())])
        found = run_ranks(layout.world, measure, config, BUCKET, timeout=900.0)
        ranks = [(rank_memory(config.train, config.stage, rank), one) for rank, one in enumerate(found)]
        worst = max(ranks, key=lambda pair: abs(parts(pair[0])[0] / pair[1].computing - 1))
        rows.append(_row(name, layout, *worst))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(aligned(header, rows, {0, 1, 2}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
