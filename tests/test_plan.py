"""Placements and plans as pure objects, over random layouts and sizes; redistribution without processes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

import megabus
from megabus.config import GrowthConfig, ModelConfig
from megabus.config.stages import Layout
from megabus.growth import redistribute as carrier
from megabus.growth.plan import ELEMENT_BYTES, Move, Plan, Traffic, Unit, runs
from megabus.growth.rules import Growth
from megabus.model.params import shard_rows
from megabus.parallel import placement as placing
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate, rank_of, stage_layers, stage_of_layer

torch.set_num_threads(1)

SEEDS = range(8)


def layouts(world):
    degrees = itertools.product(range(1, 5), repeat=3)
    return [Layout(*each) for each in degrees if np.prod(each) == world]


def random_model(draw, layout, old=None):
    """Awkward sizes that the layout (and the old model) allow: multiples of tp only where needed."""

    def size(low, high, multiple=1, at_least=1):
        return (max(low, -(-at_least // multiple)) + draw.randint(0, high - low)) * multiple

    tp = layout.tp
    kv = size(1, 2, tp, old.kv_heads if old else 1)
    group = max(draw.randint(1, 2), old.n_heads // old.kv_heads if old else 1)
    return ModelConfig(
        kind=old.kind if old else draw.choice(["ngpt", "gpt"]),
        vocab_size=old.vocab_size if old else draw.choice([65, 66, 67]),
        d_model=size(5, 12, 1, old.d_model if old else 1),
        n_layers=size(layout.pp, layout.pp + 2, 1, old.n_layers if old else 1),
        n_heads=kv * group,
        n_kv_heads=kv,
        head_dim=2,
        d_ff=size(3, 9, tp, old.d_ff if old else 1),
    )


def random_pair(seed):
    """A plan from one random layout and size to another of the same world."""
    draw = random.Random(seed)
    world = draw.choice([2, 3, 4, 6, 8, 12])
    layout, new_layout = draw.choice(layouts(world)), draw.choice(layouts(world))
    model = random_model(draw, layout)
    new_model = random_model(draw, new_layout, model)
    how = GrowthConfig(depth=draw.choice(["identity", "stack"]), channels=draw.choice(["even", "uneven"]))
    old, new = Placement(model, layout), Placement(new_model, new_layout)
    return Plan(old, new, Growth(model, new_model, how, seed))


def units(plan):
    return [Unit(name, 0, plan.old.rows(name)) for name in plan.old.specs]


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
    spans = [stage_layers(n_layers, pp, stage) for stage in range(pp)]
    assert [layer for span in spans for layer in range(*span)] == list(range(n_layers))
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[-1] == min(lengths)
    for stage, span in enumerate(spans):
        assert all(stage_of_layer(n_layers, pp, layer) == stage for layer in range(*span))


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
                first, last = placement.stage_layers(rank)
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
            if placement.stage(name) == pp and spec.is_matrix == matrices
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


# ---- plans


def test_runs():
    assert runs(np.array([2, 3, 4, 7, 9, 10])) == [(2, 5), (7, 8), (9, 11)]
    assert runs(np.array([], int)) == []


def needed_entries(plan, rank):
    """Old entries that a rank's new rows copy, by brute force: whole rows, since whole rows are grown."""
    needed = set()
    for piece in plan.new.owned(rank):
        source = plan.growth.old_spec(plan.new.specs[piece.name]).name
        width, old_width = plan.new.width(piece.name), plan.old.width(source)
        for row in {i // width for i in range(piece.start, piece.stop)}:
            parent = int(plan.rows(piece.name).parent[row])
            needed |= {(source, parent * old_width + i) for i in range(old_width)}
    return needed


def owned_entries(placement, rank):
    return {(piece.name, i) for piece in placement.owned(rank) for i in range(piece.start, piece.stop)}


def faults(plan, moves):
    """What is wrong with a list of moves: a set of words, empty if they are a plan."""
    world = plan.old.layout.world
    owned = [owned_entries(plan.old, rank) for rank in range(world)]
    received = [Counter() for _ in range(world)]
    found = set()
    for move in moves:
        entries = {(move.piece.name, i) for i in range(move.piece.start, move.piece.stop)}
        if not entries <= owned[move.src]:
            found.add("not the owner's")
        if move.src != move.dst and entries & owned[move.dst]:
            found.add("sent to its owner")
        received[move.dst].update(entries)
    for rank in range(world):
        needed = needed_entries(plan, rank)
        if needed - received[rank].keys():
            found.add("missing")
        if received[rank].keys() - needed:
            found.add("needless")
        if any(count > 1 for count in received[rank].values()):
            found.add("twice")
    return found


def all_moves(plan):
    return [move for unit in units(plan) for move in plan.moves(unit)]


@pytest.mark.parametrize("seed", SEEDS)
def test_moves_bring_each_needed_entry_once_from_its_owner(seed):
    plan = random_pair(seed)
    assert faults(plan, all_moves(plan)) == set()


def changed(plan):
    moves = all_moves(plan)
    at, move = next((i, m) for i, m in enumerate(moves) if m.src != m.dst and len(m.piece) > 1)
    piece, rest = move.piece, moves[:at] + moves[at + 1 :]
    short = Piece(piece.name, piece.start, piece.stop - 1)
    liar = next(rank for rank in range(plan.old.layout.world) if rank not in (move.src, move.dst))
    return {
        "missing": [*rest, Move(move.src, move.dst, short)],
        "twice": [*moves, move],
        "not the owner's": [*rest, Move(liar, move.dst, piece)],
        "sent to its owner": [*moves, Move(move.dst, move.src, piece)],
        "needless": [*moves, *(Move(move.src, rank, piece) for rank in range(plan.old.layout.world))],
    }


@pytest.mark.parametrize("fault", ["missing", "twice", "not the owner's", "sent to its owner", "needless"])
def test_the_checks_of_moves_notice(fault):
    plan = grown_plan(Layout(1, 2, 2), Layout(2, 1, 2))
    assert faults(plan, all_moves(plan)) == set()
    assert fault in faults(plan, changed(plan)[fault])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rank_sees_its_part_of_the_same_moves(seed):
    """In the same order, so that messages need no labels; over units of a few rows too."""
    plan = random_pair(seed)
    for unit in itertools.chain(*plan.waves(500, 1)):
        whole = list(plan.moves(unit))
        for rank in range(plan.old.layout.world):
            assert list(plan.moves(unit, rank)) == [m for m in whole if rank in (m.src, m.dst)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_new_row_is_grown_from_one_unit(seed):
    """Children of all units are all rows of all pieces, once; and heirs are all new parameters, once."""
    plan = random_pair(seed)
    assert sorted(itertools.chain(*plan.heirs.values())) == sorted(plan.new.specs)
    split = list(itertools.chain(*plan.waves(300, 1)))
    for rank in range(plan.new.layout.world):
        for piece in plan.new.owned(rank):
            width = plan.new.width(piece.name)
            source = plan.growth.old_spec(plan.new.specs[piece.name]).name
            rows = [row for u in split if u.name == source for row in plan.children(u, piece).tolist()]
            assert rows == list(range(piece.start // width, -(-piece.stop // width)))


@pytest.mark.parametrize("tensors", [1, 3])
@pytest.mark.parametrize("budget", [1, 300, 4096, 2**28])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_waves_cover_all_rows_once_and_fit_the_buffer(seed, budget, tensors):
    plan = random_pair(seed)
    waves = list(plan.waves(budget, tensors))
    rows = [(u.name, row) for wave in waves for u in wave for row in range(u.start, u.stop)]
    assert rows == [(name, row) for name in plan.old.specs for row in range(plan.old.rows(name))]

    def cost(wave):
        return sum((u.stop - u.start) * plan.old.width(u.name) for u in wave) * ELEMENT_BYTES * tensors

    for wave in waves:
        alone = len(wave) == 1 and wave[0].stop - wave[0].start == 1  # a row that no buffer could hold
        assert cost(wave) <= budget or alone
    for one, two in itertools.pairwise(waves):  # as few as can be, going in order
        assert cost(one) + cost(two[:1]) > budget
    assert (len(waves) == 1) == (budget == 2**28)


@pytest.mark.parametrize("seed", SEEDS)
def test_splitting_into_waves_changes_no_traffic(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for unit in itertools.chain(*plan.waves(300, 1)):
        for move in plan.moves(unit):
            if move.src == move.dst:
                kept += len(move.piece)
            else:
                sent += len(move.piece)
    assert plan.traffic() == Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)


@pytest.mark.parametrize("seed", SEEDS)
def test_traffic_is_the_count_of_entries_that_change_owner(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for rank in range(plan.old.layout.world):
        needed, owned = needed_entries(plan, rank), owned_entries(plan.old, rank)
        sent, kept = sent + len(needed - owned), kept + len(needed & owned)
    assert plan.traffic() == Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)


def still(model, layout):
    placement = Placement(model, layout)
    return Plan(placement, placement, Growth(model, model, GrowthConfig(), 0))


MODEL = ModelConfig(vocab_size=66, d_model=9, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=14)
SIZES = {"d_model": 13, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "d_ff": 22}
LARGER = MODEL.model_copy(update=SIZES)


def grown_plan(layout, new_layout, **how):
    growth = Growth(MODEL, LARGER, GrowthConfig(**how), 5)
    return Plan(Placement(MODEL, layout), Placement(LARGER, new_layout), growth)


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 3, 1), Layout(2, 2, 1), Layout(1, 1, 1)], ids=str)
def test_nothing_is_sent_when_nothing_changes(layout):
    traffic = still(MODEL, layout).traffic()
    assert traffic.sent == 0
    assert traffic.kept == ELEMENT_BYTES * sum(
        len(p) for rank in range(layout.world) for p in Placement(MODEL, layout).owned(rank)
    )
    if layout.world > 1:
        other = Placement(MODEL, Layout(1, 1, layout.world))
        moved = Plan(Placement(MODEL, layout), other, Growth(MODEL, MODEL, GrowthConfig(), 0)).traffic()
        assert moved.sent > moved.kept / 10


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 3, 1)], ids=str)
def test_aligned_growth_needs_no_message(layout):
    """Where copies fall on their originals' rank (4 -> 8 heads, 3 -> 5 layers here), nobody sends."""
    assert grown_plan(layout, layout).traffic().sent == 0
    assert (grown_plan(layout, layout, depth="stack").traffic().sent > 0) == (layout.pp > 1)


@pytest.mark.parametrize("layout", [Layout(1, 1, 4), Layout(2, 1, 4), Layout(2, 3, 2)], ids=str)
def test_when_nothing_changes_only_rows_cut_by_zero_are_completed(layout):
    """A cut row goes whole to each rank that owns a part of it: at most two rows a data-parallel boundary."""
    plan = still(MODEL, layout)
    boundaries = (layout.dp - 1) * layout.pp * layout.tp
    assert 0 < plan.traffic().sent <= boundaries * MODEL.d_model * ELEMENT_BYTES
    for move in all_moves(plan):
        if move.src != move.dst:
            assert len(move.piece) < MODEL.d_model


# ---- redistribution without processes: the wire is replaced by reading from everyone's old fragments


def fragments_of(placement, state, rank):
    return {
        piece: {
            kind: tensors[piece.name].reshape(-1)[piece.start : piece.stop].clone() for kind, tensors in state.items()
        }
        for piece in placement.owned(rank)
    }


def telepathy(world):
    """`_exchange` that needs no network. world: every rank's fragments."""
    by_name = [{p.name: (p, tensors) for p, tensors in fragments.items()} for fragments in world]

    def exchange(moves, old, kinds, rank, device, mail):
        arrived = {}
        for move in moves:
            if move.dst == rank:
                whole, tensors = by_name[move.src][move.piece.name]
                part = slice(move.piece.start - whole.start, move.piece.stop - whole.start)
                arrived[move.piece] = {kind: tensors[kind][part] for kind in kinds}
        return arrived

    return exchange


def redistributed_equals_grown(plan, monkeypatch, buffer_bytes):
    """Every rank's fragments against pieces of the state that one process grows, bit by bit."""
    growth, generator = plan.growth, torch.Generator().manual_seed(1)
    weights = megabus.build_model(growth.old, 1).state_dict()
    state = {
        "weight": weights,
        "exp_avg": {name: torch.randn(x.shape, generator=generator) for name, x in weights.items()},
    }
    grown = {
        kind: megabus.grow_state(tensors, growth.old, growth.new, growth.seed, growth.how, kind)
        for kind, tensors in state.items()
    }
    world = range(plan.old.layout.world)
    fragments = [fragments_of(plan.old, state, rank) for rank in world]
    monkeypatch.setattr(carrier, "_exchange", telepathy(fragments))
    for rank in world:
        found, _ = carrier.redistribute(plan, fragments[rank], ("weight", "exp_avg"), rank, buffer_bytes)
        wanted = fragments_of(plan.new, grown, rank)
        assert found.keys() == wanted.keys()
        for piece, tensors in wanted.items():
            if not all(torch.equal(found[piece][kind], x) for kind, x in tensors.items()):
                return False
    return True


PAIRS = [
    (Layout(1, 1, 4), Layout(2, 2, 1)),
    (Layout(2, 2, 1), Layout(1, 1, 4)),
    (Layout(2, 1, 2), Layout(2, 1, 2)),
    (Layout(1, 3, 2), Layout(2, 1, 3)),
]


@pytest.mark.parametrize(("depth", "buffer_bytes"), [("identity", 2**28), ("stack", 700)])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_grown_shards_are_shards_of_the_grown_state(monkeypatch, before, after, depth, buffer_bytes):
    plan = grown_plan(before, after, depth=depth, moments="grow", channels="uneven")
    assert redistributed_equals_grown(plan, monkeypatch, buffer_bytes)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_redistributions(monkeypatch, seed):
    plan = random_pair(seed)
    assert redistributed_equals_grown(plan, monkeypatch, 2000)


def test_the_redistribution_check_notices_a_wrong_row(monkeypatch):
    children = Plan.children
    monkeypatch.setattr(Plan, "children", lambda plan, unit, piece: children(plan, unit, piece)[1:])
    monkeypatch.setattr(torch, "empty", torch.zeros)
    assert not redistributed_equals_grown(grown_plan(*PAIRS[0]), monkeypatch, 2**28)
