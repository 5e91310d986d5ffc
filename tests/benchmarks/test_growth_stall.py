"""The other way that a growth is held against: what was grown on the disk is a checkpoint that a run starts from."""

from __future__ import annotations

import megabus
from benchmarks.growth_stall import grow_on_disk
from megabus.checkpoint.load import load_weights
from megabus.checkpoint.store import checkpoints_of
from megabus.testing.ranks import run_ranks
from tests.support.checkpoints import make_saver, run_config, save, state_of, trained

LARGER = {"d_model": 43, "n_layers": 4}


def _saved(folder):
    config = run_config({})
    engine = trained(config)
    assert save(make_saver(checkpoints_of(folder)), engine, config, 1).error is None
    return state_of(engine, config, 1).model


def test_what_is_grown_on_the_disk_is_the_grown_model(tmp_path):
    (model,) = run_ranks(1, _saved, tmp_path / "small")
    grow_on_disk(tmp_path / "small", tmp_path / "grown", LARGER)
    found, state = load_weights(megabus.checkpoint.load.checkpoint_at(tmp_path / "grown"))
    assert found == model.grown(**LARGER)
    _, small = load_weights(megabus.checkpoint.load.checkpoint_at(tmp_path / "small"))
    wanted = megabus.grow_state(small, model, found, seed=0)
    assert state.keys() == wanted.keys()
    assert all((state[name] == wanted[name]).all() for name in wanted)
