"""Memory that snapshots of a GPU are copied into: kept, bounded, and pageable where none can be pinned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megabus.checkpoint import host_memory
from megabus.checkpoint.host_memory import ALIGNMENT, CHUNK, HostMemory
from megabus.errors import UserError
from megabus.parallel.placement import Piece


@pytest.fixture
def pinned(monkeypatch):
    """Sizes that were pinned; the CPU has nothing to pin for."""
    sizes = []

    def pin(size):
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(host_memory, "_pinned", pin)
    monkeypatch.setattr(host_memory, "CHUNK", 4096)
    return sizes


def live(*lengths):
    return {
        Piece(f"p{number}", 0, length): {"weight": torch.rand(length), "exp_avg": torch.rand(length).to(torch.bfloat16)}
        for number, length in enumerate(lengths)
    }


def ask(memory, state):
    """As `reserve` does for tensors of a GPU."""
    return memory._places([x.nbytes for kinds in state.values() for x in kinds.values()])


def overlap(tensors):
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


def test_copies_are_right_and_lie_apart(pinned):
    memory = HostMemory()
    for lengths in ((37, 1, 611, 0), (1400, 37, 3, 1025, 90), (5,)):
        state = live(*lengths)
        copies = memory._copied(state)
        flat = [x for kinds in copies.values() for x in kinds.values() if len(x)]
        assert not overlap(flat)
        assert all(torch.equal(copies[piece][kind], x) for piece, kinds in state.items() for kind, x in kinds.items())
        starts = {chunk.data_ptr() for chunk in memory._chunks}
        for x in flat:
            assert (x.data_ptr() - max(start for start in starts if start <= x.data_ptr())) % ALIGNMENT == 0
    assert overlap([flat[0], flat[0]])  # control


def test_what_is_pinned_is_kept_and_bounded(pinned):
    memory = HostMemory()
    for lengths in ((300,) * 5, (300,) * 4, (300,) * 5):
        ask(memory, live(*lengths))
    first = len(pinned)
    assert sum(pinned) <= 2 * 5 * (1280 + 768)
    for width in (310, 400, 700, 1300):  # a run that grows
        state = live(*(width,) * 5)
        ask(memory, state)
        needed = sum(-(-x.nbytes // ALIGNMENT) * ALIGNMENT for kinds in state.values() for x in kinds.values())
        assert sum(map(len, memory._chunks)) <= 2 * needed + host_memory.CHUNK
    assert len(pinned) > first
    assert all(size & (size - 1) == 0 for size in (*pinned, CHUNK))


def test_copies_of_a_cpus_tensors_lie_where_the_last_ones_did_and_nothing_is_pinned(pinned):
    memory, first, second = HostMemory(), live(2000, 37), live(2000, 37)
    memory.reserve(first)
    copies = memory.copies(first)
    for state in (first, second):
        again = memory.copies(state)
        for piece, kinds in state.items():
            for kind, values in kinds.items():
                assert again[piece][kind].equal(values)
                assert again[piece][kind].data_ptr() == copies[piece][kind].data_ptr() != values.data_ptr()
    assert not pinned


def test_what_cannot_be_pinned_is_pageable_and_told_once(monkeypatch, capsys, pinned):
    def refuse(size):
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(host_memory, "_pinned", refuse)
    memory, state = HostMemory(), live(2000, 2000, 37)
    copies = memory._copied(state)
    assert all(torch.equal(copies[piece]["weight"], kinds["weight"]) for piece, kinds in state.items())
    told = "warning: no memory could be pinned for snapshots (CUDA error: out of memory): they take longer\n"
    assert capsys.readouterr().err == told
    monkeypatch.setattr(torch, "empty", lambda *_, **__: refuse(0))
    with pytest.raises(UserError, match=r"^checkpoint = snapshot: there is no main memory for .* next 65,536 bytes"):
        memory.reserve(live(10000))
