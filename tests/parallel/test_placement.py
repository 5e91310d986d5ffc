"""Who holds which entries: coordinates, stages and owned pieces, over random layouts and sizes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from megabus.model.params import shard_rows
from megabus.parallel import placement as placing
from megabus.parallel.placement import Piece
from megabus.parallel.topology import coordinate, layers_at, pp_rank_of, rank_of
from tests.support.plans import SEEDS, layouts, random_pair

torch.set_num_threads(1)


def copies_owned(placement):
    """Name -> how many ranks own each entry."""
    counts = {name: np.zeros(placement.numel(name), int) for name in placement.specs}
    for rank in range(placement.layout.world):
        for piece in placement.owned(rank):
            counts[piece.name][piece.start : piece.stop] += 1
    return counts


def ownership_holds(placement):
    """Sharded entries have one owner, replicated ones one on each tensor-parallel rank."""
    return all(
        (count == (1 if placement.specs[name].sharded else placement.layout.tp)).all()
        for name, count in copies_owned(placement).items()
    )


# ---- topology


@pytest.mark.parametrize("layout", layouts(12), ids=str)
def test_coordinates_number_the_world(layout):
    seen = [coordinate(layout, rank) for rank in range(12)]
    assert [rank_of(layout, at.pp, at.dp, at.tp) for at in seen] == list(range(12))
    assert len(set(seen)) == 12
    for rank, at in enumerate(seen[:-1]):
        if at.tp + 1 < layout.tp:
            assert seen[rank + 1] == type(at)(at.pp, at.dp, at.tp + 1)


@pytest.mark.parametrize("n_layers", range(1, 14))
@pytest.mark.parametrize("pp", range(1, 5))
def test_stages_share_layers_evenly_and_the_last_has_fewest(n_layers, pp):
    spans = [layers_at(n_layers, pp, pp_rank) for pp_rank in range(pp)]
    assert [layer for span in spans for layer in range(*span)] == list(range(n_layers))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[-1] == min(lengths)
    for pp_rank, span in enumerate(spans):
        assert all(pp_rank_of(n_layers, pp, layer) == pp_rank for layer in range(*span))


# ---- placement


@pytest.mark.parametrize("seed", SEEDS)
def test_owned_pieces_partition_every_parameter(seed):
    for placement in (random_pair(seed).old, random_pair(seed).new):
        assert ownership_holds(placement)


def test_the_partition_check_notices_a_lost_entry(monkeypatch):
    share = placing._share

    def short(slot, dp):
        piece = share(slot, dp)
        return Piece(piece.name, piece.start, max(piece.start, piece.stop - 1))

    monkeypatch.setattr(placing, "_share", short)
    assert not ownership_holds(random_pair(0).old)


@pytest.mark.parametrize("seed", SEEDS)
def test_owned_pieces_lie_in_the_ranks_shard_and_stage(seed):
    for placement in (random_pair(seed).old, random_pair(seed).new):
        order = list(placement.specs)
        for rank in range(placement.layout.world):
            at, pieces = coordinate(placement.layout, rank), placement.owned(rank)
            assert [piece.name for piece in pieces] == sorted({piece.name for piece in pieces}, key=order.index)
            for piece in pieces:
                spec, width = placement.specs[piece.name], placement.width(piece.name)
                start, stop = shard_rows(spec, placement.model, placement.layout.tp, at.tp)
                assert start * width <= piece.start < piece.stop <= stop * width
                first, last = layers_at(placement.model.n_layers, placement.layout.pp, at.pp)
                if spec.layer is None:
                    assert at.pp == (0 if piece.name == "embed.weight" else placement.layout.pp - 1)
                else:
                    assert first <= spec.layer < last


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_partitions_are_equal_and_aligned(seed):
    """A (stage, tp) rank's matrices, end to end, are cut every `partition` entries; so are its gains."""
    placement = random_pair(seed).new
    layout = placement.layout
    for pp, tp, matrices in itertools.product(range(layout.pp), range(layout.tp), (True, False)):
        ranks = [rank_of(layout, pp, dp, tp) for dp in range(layout.dp)]
        lengths = [
            sum(len(p) for p in placement.owned(r) if placement.specs[p.name].is_matrix == matrices) for r in ranks
        ]
        total = sum(lengths)
        unit = 2 * layout.dp
        partition = -(-total // unit) * unit // layout.dp
        assert partition * layout.dp - total < unit
        assert lengths == [max(0, min(partition, total - dp * partition)) for dp in range(layout.dp)]
        flat = [
            (name, i)
            for name, spec in placement.specs.items()
            if placement.pp_rank(name) == pp and spec.is_matrix == matrices
            for i in range(*(row * placement.width(name) for row in shard_rows(spec, placement.model, layout.tp, tp)))
        ]
        owned = [
            [
                (p.name, i)
                for p in placement.owned(r)
                if placement.specs[p.name].is_matrix == matrices
                for i in range(p.start, p.stop)
            ]
            for r in ranks
        ]
        assert owned == [flat[dp * partition : (dp + 1) * partition] for dp in range(layout.dp)]


@pytest.mark.parametrize("seed", SEEDS)
def test_owners_agrees_with_owned(seed):
    draw = random.Random(seed)
    placement = random_pair(seed).old
    layout = placement.layout
    owned = {(rank, piece.name): piece for rank in range(layout.world) for piece in placement.owned(rank)}
    for name, spec in placement.specs.items():
        n = placement.numel(name)
        for low, high in [(0, n), sorted((draw.randint(0, n), draw.randint(0, n))), (n // 2, n // 2 + 1)]:
            wanted = set()
            for rank in range(layout.world):
                piece = owned.get((rank, name), Piece(name, 0, 0))
                start, stop = max(low, piece.start), min(high, piece.stop)
                if start < stop:
                    wanted.add((rank, Piece(name, start, stop)))
            found = list(placement.owners(name, low, high))
            assert len(found) == len(wanted)
            assert set(found) == wanted
            for tp in range(layout.tp):
                one = set(placement.owners(name, low, high, tp))
                replica = {pair for pair in wanted if coordinate(layout, pair[0]).tp == tp}
                assert one == (wanted if spec.sharded else replica)
