"""A save is of the moment at which it began, and every rank writes what it owns, once."""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path

import pytest

import megabus
import megabus.checkpoint.save as saving
from megabus.checkpoint import shards
from megabus.checkpoint.host_memory import CHUNK
from megabus.checkpoint.manifest import read_manifest
from megabus.checkpoint.store import complete, folder_of, latest_of, step_of
from megabus.config import Layout, resolve_stages
from megabus.errors import UserError
from megabus.parallel.placement import Placement
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck


def hold_back(gate):
    """Let nothing of a checkpoint be written before the gate opens."""
    write_shards = shards.write_shards

    def waiting(*args):
        assert gate.wait(timeout=60)
        return write_shards(*args)

    shards.write_shards = waiting


def save_while_training(root, config):
    """The state when an asynchronous save begins, and the one two steps later, before any tensor was written."""
    gate = threading.Event()
    hold_back(gate)
    engine, saver = ck.trained(config, steps=2), ck.make_saver(root, asynchronous=True)
    assert saver.wait() is None
    told = [ck.held(engine)]
    state = ck.state_of(engine, config, step=2)
    saver.start(state, engine.placement, engine.read())
    ck.train_on(engine, seed=8, steps=2)
    told.append(ck.held(engine))
    assert not saver.ended
    assert complete(root) == []
    gate.set()
    saved = saver.wait()
    assert (saved.error, saved.folder, saved.step) == (None, folder_of(root, 2), 2)
    assert saved.write_s > 0
    assert saver.wait() is None
    return told


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2}, {"pp": 2}], ids=str)
def test_an_asynchronous_save_is_of_the_moment_it_began(tmp_path, layout):
    config, root = ck.run_config(layout), tmp_path / "checkpoints"
    ranks = run_ranks(2, save_while_training, root, config)
    begun, later = (ck.assembled(config, part) for part in zip(*ranks, strict=True))
    told = run_ranks(2, ck.loaded, root, config, True)
    assert ck.same(ck.assembled(config, [pieces for pieces, _ in told]), begun)
    assert {step for _, step in told} == {2}
    loaded = ck.bits(megabus.load(tmp_path).state_dict())
    assert ck.same(loaded, {key: begun[key] for key in loaded})
    assert not any((begun[key] == later[key]).all() for key in begun)  # control: it could have differed


def begin_and_look(root, config, asynchronous):
    """Whether a save has ended when `start` returns, and whether it has when `wait` does."""
    gate = threading.Event()
    hold_back(gate)
    engine, saver = ck.trained(config), ck.make_saver(root, asynchronous=asynchronous)
    if not asynchronous:
        threading.Timer(0.3, gate.set).start()
    saver.start(ck.state_of(engine, config, 1), engine.placement, engine.read())
    seen = [saver.ended]
    gate.set()
    saved = saver.wait()
    return [*seen, saved.folder.exists(), saved.stall_s, saved.write_s]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_a_synchronous_save_is_waited_for(tmp_path, asynchronous):
    ((ended, exists, stall, write),) = run_ranks(1, begin_and_look, tmp_path, ck.run_config({}), asynchronous)
    assert ended != asynchronous
    assert exists
    if not asynchronous:
        assert stall >= write >= 0.3


def save_often(root, config):
    with pytest.raises(UserError, match="the file does not exist"):  # on each rank, though rank 0 alone reads it
        ck.make_saver(root, tokenizer=root / "none.model")
    engine, saver = ck.trained(config, steps=0), ck.make_saver(root, keep_last=2, keep_every=3, asynchronous=True)
    for step in range(1, 7):
        saver.wait()
        saver.start(ck.state_of(engine, config, step), engine.placement, engine.read())
    return saver.wait().error


def test_a_saver_keeps_what_it_was_told_to(tmp_path):
    assert run_ranks(2, save_often, tmp_path, ck.run_config({"tp": 2})) == [None, None]
    assert [step_of(folder) for folder in complete(tmp_path)] == [6, 5, 3]


def save_with_a_bug(root, config):
    def buggy(*_):
        raise ZeroDivisionError("a bug")

    saving.write_state = buggy
    saver, engine = ck.make_saver(root, asynchronous=True), ck.trained(config, steps=0)
    saver.start(ck.state_of(engine, config, 1), engine.placement, engine.read())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saver.wait()


def test_what_no_user_can_mend_ends_the_run(tmp_path):
    run_ranks(1, save_with_a_bug, tmp_path, ck.run_config({}))
    assert complete(tmp_path) == []


def save_without_memory(root, config):
    """What both ranks are told when rank 1 gets no more memory, before and at a save."""
    engine, saver, told = ck.trained(config, steps=0), ck.make_saver(root, asynchronous=True), []
    begin = (ck.state_of(engine, config, 1), engine.placement, engine.read())
    before, _ = resource.getrlimit(resource.RLIMIT_AS)
    if engine.mesh.rank == 1:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + CHUNK // 2, before))
    for ask in (lambda: saver.prepare(engine.read), lambda: saver.start(*begin)):
        with pytest.raises(UserError) as caught:
            ask()
        told.append(str(caught.value))
    return told


def test_all_ranks_are_told_of_one_without_memory(tmp_path):
    first, second = run_ranks(2, save_without_memory, tmp_path, ck.run_config({"tp": 2}))
    assert first == second
    assert all("there is no main memory for a snapshot's next 67,108,864 bytes" in told for told in first)
    assert complete(tmp_path) == []


def save_sizes(root, config, steps):
    engine, saver = ck.trained(config, steps=steps), ck.make_saver(root)
    return ck.save(saver, engine, config, steps).bytes


def header_of(path):
    """(bytes before the first tensor's, tensor name -> entries) of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tree = json.loads(file.read(length))
    tree.pop("__metadata__")
    assert {tensor["dtype"] for tensor in tree.values()} == {"F32"}
    return 8 + length, {name: tensor["shape"][0] for name, tensor in tree.items()}


@pytest.mark.parametrize(
    ("layout", "steps"),
    [({"tp": 2, "dp": 2}, 1), ({"tp": 2, "pp": 2}, 1), ({"dp": 4}, 1), ({"tp": 2, "dp": 2}, 0), ({"pp": 2}, 0)],
    ids=str,
)
def test_ranks_write_what_they_own_and_nothing_twice(tmp_path, layout, steps):
    config, kinds = ck.run_config(layout), 3 if steps else 1
    world = ck.world_of(config)
    placement = Placement(config.model, resolve_stages(config, world)[0].layout)
    numbers = run_ranks(world, save_sizes, tmp_path, config, steps)
    folder, written = folder_of(tmp_path, steps), []
    for rank in range(world):
        owned = sum(len(piece) for piece in placement.owned(rank))
        mine = [e for e in read_manifest(folder) if e.rank == rank and e.name.endswith(".safetensors")]
        assert len(mine) == kinds
        tensors = [header_of(folder / entry.name) for entry in mine]
        entries = sum(sum(shapes.values()) for _, shapes in tensors)
        assert sum(entry.bytes for entry in mine) == 4 * entries + sum(header for header, _ in tensors)
        assert 0 < entries <= kinds * owned
        written += [(name, count) for _, shapes in tensors for name, count in shapes.items()]
    total = sum(placement.numel(name) for name in placement.specs)
    assert sum(count for _, count in written) == kinds * total
    assert all(count < total // 2 for _, count in written)
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert numbers[0] == sum(path.stat().st_size for path in files)
    assert sorted(entry.name for entry in read_manifest(folder)) == sorted(path.name for path in files)
    assert latest_of(tmp_path) == folder


def test_replicas_own_different_intervals():
    """The control: what tensor parallelism replicates would be written twice, and under dp in pieces that differ."""
    placement = Placement(ck.run_config({}).model, Layout(2, 1, 2))
    shared = [name for name, spec in placement.specs.items() if not spec.sharded]
    by_rank = [{piece for piece in placement.owned(rank) if piece.name in shared} for rank in range(4)]
    assert sum(len(piece) for pieces in by_rank for piece in pieces) == 2 * sum(map(placement.numel, shared))
    assert by_rank[0] != by_rank[1]
    matrices = [piece for rank in range(4) for piece in placement.owned(rank) if placement.specs[piece.name].is_matrix]
    assert any(piece.start % 37 or piece.stop % 37 for piece in matrices)  # and partitions cut rows
