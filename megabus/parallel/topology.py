"""Where a rank stands in the grid of pipeline x data x tensor parallelism, and which layers it therefore holds."""

from __future__ import annotations

from dataclasses import dataclass

from megabus.config.stages import Layout


@dataclass(frozen=True)
class Coordinate:
    pp: int
    dp: int
    tp: int


def coordinate(layout: Layout, rank: int) -> Coordinate:
    """Tensor-parallel neighbours are adjacent ranks, pipeline stages are furthest apart (DeepSpeed's order)."""
    return Coordinate(rank // (layout.dp * layout.tp), rank // layout.tp % layout.dp, rank % layout.tp)


def rank_of(layout: Layout, pp: int, dp: int, tp: int) -> int:
    return (pp * layout.dp + dp) * layout.tp + tp


def stage_layers(n_layers: int, pp: int, stage: int) -> tuple[int, int]:
    """Layers [first, last) of a pipeline stage, as even as can be; the last stage, which has the head, gets fewer."""
    return -(-stage * n_layers // pp), -(-(stage + 1) * n_layers // pp)


def stage_of_layer(n_layers: int, pp: int, layer: int) -> int:
    return layer * pp // n_layers
