"""Where a rank stands in the grid of pipeline x data x tensor parallelism, and which layers it therefore holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megabus.config.stages import Layout


@dataclass(frozen=True)
class Coordinate:
    pp: int
    dp: int
    tp: int


def coordinate(layout: Layout, rank: int) -> Coordinate:
    """Tensor-parallel neighbours are adjacent ranks, pipeline neighbours are furthest apart (DeepSpeed's order)."""
    return Coordinate(rank // (layout.dp * layout.tp), rank // layout.tp % layout.dp, rank % layout.tp)


def rank_of(layout: Layout, pp: int, dp: int, tp: int) -> int:
    return (pp * layout.dp + dp) * layout.tp + tp


def layers_at(n_layers: int, pp: int, pp_rank: int) -> tuple[int, int]:
    """Layers [first, last) of a pipeline rank, as even as can be; the last rank, which has the head, gets fewer."""
    return -(-pp_rank * n_layers // pp), -(-(pp_rank + 1) * n_layers // pp)


def pp_rank_of(n_layers: int, pp: int, layer: int) -> int:
    return layer * pp // n_layers


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2, 5-9`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(sorted(ranks)), lambda item: item[1] - item[0])]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
