"""How a model's gains are distributed: exact percentiles over all layers, whatever rank holds which of them.

A gain is whatever is declared as one (`ParamSpec.role`); namesakes of all layers are taken together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megabus.model.params import ParamSpec
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Placement
from megabus.parallel.topology import coordinate
from megabus.upload import upload

PERCENTS = (0, 5, 25, 50, 75, 95, 100)


def gain_percentiles(
    placement: Placement, fragments: Fragments, rank: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """For every kind of gain (`ParamSpec.namesake`), percentiles of its effective values (raw * multiplier) in the
    whole model: `p0` (the least) to `p100` (the largest). The same on every rank, and under every layout the same
    bits of the same masters. Collective.

    fragments: what this rank owns (`Engine.read`).
    """
    kinds: dict[str, list[ParamSpec]] = {}
    for spec in placement.specs.values():
        if spec.role == "gain":
            kinds.setdefault(spec.namesake, []).append(spec)
    # What tensor parallelism replicates has an owner for each of its ranks, and counts once.
    first = coordinate(placement.layout, rank).tp == 0
    mine: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for piece, tensors in fragments.items():
        spec = placement.specs[piece.name]
        if spec.role == "gain" and (spec.sharded or first):
            mine[spec.namesake].append(tensors["weight"])
    nothing = torch.empty(0, device=device)
    values = [torch.cat([nothing, *parts]) for parts in mine.values()]
    sizes = [sum(placement.numel(spec.name) for spec in specs) for specs in kinds.values()]
    return {
        kind: {f"p{p}": specs[0].multiplier * raw for p, raw in zip(PERCENTS, found, strict=True)}
        for (kind, specs), found in zip(kinds.items(), order_statistics(values, sizes), strict=True)
    }


@torch.no_grad()
def order_statistics(values: Sequence[Tensor], sizes: Sequence[int]) -> list[list[float]]:
    """For each list of fp32 values, spread over the ranks in any way, those at `PERCENTS` of its sorted whole, which
    has `sizes` entries: the lower neighbour where a percentile falls between two. NaNs come last. Collective.

    A radix selection: floats are ordered as their bits are (negative ones the other way round), so four counts of
    256 digits find any of them exactly. What is sent depends neither on the model's size nor on the world's.
    """
    keys = [_ordered(x) for x in values]
    device = values[0].device
    left = upload([[p * (size - 1) // 100 for p in PERCENTS] for size in sizes], device)
    prefix = torch.zeros_like(left)
    for shift in (24, 16, 8, 0):
        counts = torch.zeros(*left.shape, 256, dtype=torch.int64, device=device)
        for i, key in enumerate(keys):
            digit, above = (key >> shift) & 255, key >> (shift + 8)
            # Not bincount of those that match: their number would have to be known first, and a GPU waited for.
            counts[i].scatter_add_(1, digit.expand(len(PERCENTS), -1), (above == prefix[i, :, None]).long())
        dist.all_reduce(counts)
        up_to = counts.cumsum(-1)
        digit = (up_to <= left[..., None]).sum(-1, keepdim=True)
        left -= (up_to - counts).gather(-1, digit)[..., 0]
        prefix = (prefix << 8) | digit[..., 0]
    return _floats(prefix).tolist()


_SIGN, _ALL = 1 << 31, (1 << 32) - 1


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 2^32 - 1 in the order of the floats: int64."""
    bits = x.detach().float().contiguous().view(torch.int32).long() & _ALL
    # Processors' own NaNs have their sign bit set.
    return torch.where(x.isnan(), _ALL, torch.where(bits >= _SIGN, bits ^ _ALL, bits | _SIGN))


def _floats(key: Tensor) -> Tensor:
    bits = torch.where(key >= _SIGN, key ^ _SIGN, key ^ _ALL)
    return torch.where(bits >= _SIGN, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
