"""Redistribution without processes: the wire is replaced by reading from everyone's old fragments."""

from __future__ import annotations

import pytest
import torch

import megabus
from megabus.config.stages import Layout
from megabus.growth import redistribute as carrier
from megabus.growth.plan import Plan
from tests.support.plans import SEEDS, grown_plan, random_pair

torch.set_num_threads(1)


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

    def exchange(transfers, old, arrivals, rank, traffic):
        for rows, kind, transfer in transfers:
            if transfer.dst == rank:
                whole, tensors = by_name[transfer.src][transfer.piece.name]
                part = slice(transfer.piece.start - whole.start, transfer.piece.stop - whole.start)
                arrivals[rows, kind].part(transfer.piece).copy_(tensors[kind][part])

    return exchange


def redistributed_equals_grown(plan, monkeypatch, buffer_bytes, mean=False):
    """Every rank's fragments against pieces of the state that one process grows, bit by bit."""
    growth, generator = plan.growth, torch.Generator().manual_seed(1)
    weights = megabus.build_model(growth.old, 1).state_dict()
    state = {
        "weight": weights,
        "exp_avg": {name: torch.randn(x.shape, generator=generator) for name, x in weights.items()},
    }
    if mean:  # of rows of which none is a unit vector
        state = {"weight": weights, "ema-0.9": state["exp_avg"]}
    grown = {
        kind: megabus.grow_state(tensors, growth.old, growth.new, growth.seed, growth.how, kind)
        for kind, tensors in state.items()
    }
    world = range(plan.old.layout.world)
    fragments = [fragments_of(plan.old, state, rank) for rank in world]
    monkeypatch.setattr(carrier, "_exchange", telepathy(fragments))
    for rank in world:
        found, _ = carrier.redistribute(plan, fragments[rank], tuple(state), rank, buffer_bytes)
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


@pytest.mark.parametrize(
    ("depth", "buffer_bytes"), [("append", 2**28), ("taper", 2**28), ("stack", 700), ("fresh", 700)]
)
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_grown_shards_are_shards_of_the_grown_state(monkeypatch, before, after, depth, buffer_bytes):
    plan = grown_plan(before, after, depth=depth, moments="grow", read="tilt", channels="uneven")
    assert redistributed_equals_grown(plan, monkeypatch, buffer_bytes)


@pytest.mark.parametrize("depth", ["append", "fresh"])
def test_grown_shards_of_running_means_too(monkeypatch, depth):
    plan = grown_plan(*PAIRS[1], depth=depth, moments="grow", read="tilt", channels="uneven")
    assert redistributed_equals_grown(plan, monkeypatch, 5000, mean=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_redistributions(monkeypatch, seed):
    plan = random_pair(seed)
    assert redistributed_equals_grown(plan, monkeypatch, 2000)


def test_the_redistribution_check_notices_a_wrong_row(monkeypatch):
    child_rows = Plan.child_rows
    monkeypatch.setattr(Plan, "child_rows", lambda plan, rows, piece: child_rows(plan, rows, piece)[1:])
    monkeypatch.setattr(torch, "empty", torch.zeros)
    assert not redistributed_equals_grown(grown_plan(*PAIRS[0]), monkeypatch, 2**28)
