"""What is saved is what is loaded, bit for bit, whatever the layouts: masters, both moments and Adam's count."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import megabus
from megabus.checkpoint.restore import find_checkpoint, re_express, restore
from megabus.checkpoint.store import checkpoints_of, folder_of
from megabus.config import Layout, ModelConfig, resolve_stages
from megabus.errors import UserError
from megabus.parallel.placement import Placement
from megabus.testing.ranks import run_ranks
from tests.support import checkpoints as ck

LAYOUTS = [
    {"dp": 1},
    {"tp": 2},
    {"dp": 2},
    {"dp": 3},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2},
    {"pp": 2, "dp": 2},
    {"dp": 4},
]
CONFIGS = [ck.run_config(layout) for layout in LAYOUTS] + [ck.run_config(layout, "gpt") for layout in LAYOUTS[3:6]]
SAVERS, LOADERS = range(len(CONFIGS)), [0, 1, 2, 3, 4, 7, 8, 10]


def of_world(world, numbers):
    return [number for number in numbers if ck.world_of(CONFIGS[number]) == world]


def save_each(numbers, base):
    """On every rank: train and save a run for each of these configurations, every other one asynchronously."""
    told = []
    for number in numbers:
        engine = ck.trained(CONFIGS[number], seed=number, steps=1 + number % 2)
        saver = ck.make_saver(base / str(number) / "checkpoints", asynchronous=number % 2 == 1)
        assert ck.save(saver, engine, CONFIGS[number], step=7).error is None
        told.append(ck.held(engine))
        engine.close()
    return told


def load_each(numbers, base):
    """On every rank, into an engine of each of these configurations: all checkpoints of its kind of model."""
    told = {}
    for number in numbers:
        engine = ck.fresh(CONFIGS[number])
        for saved, config in enumerate(CONFIGS):
            if config.model == engine.stage.model:
                found = find_checkpoint(base / str(saved) / "checkpoints", strict=True)
                assert found.state.layout == resolve_stages(config, ck.world_of(config))[0].layout
                restore(found, engine)
                told[saved, number] = ck.held(engine), engine.optimizer_step
        engine.close()
    return told


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(base):
    """The whole state of each run as its ranks held it when they saved it."""
    states = {}
    for world in (1, 2, 3, 4):
        ranks = run_ranks(world, save_each, of_world(world, SAVERS), base)
        for place, number in enumerate(of_world(world, SAVERS)):
            states[number] = ck.assembled(CONFIGS[number], [told[place] for told in ranks])
    return states


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_layout_reads_any_others_bits(saved, base, world):
    loaders = of_world(world, LOADERS)
    ranks = run_ranks(world, load_each, loaders, base)
    assert len(ranks[0]) == sum(CONFIGS[loader].model == saver.model for loader in loaders for saver in CONFIGS)
    for number, loader in ranks[0]:
        state = ck.assembled(CONFIGS[number], [told[number, loader][0] for told in ranks])
        assert len(state) == 3 * len({name for _, name in state})
        assert ck.same(state, saved[number]), (CONFIGS[number].layout, CONFIGS[loader].layout)
        assert {told[number, loader][1] for told in ranks} == {1 + number % 2}


def test_those_states_differ(saved):
    """The control: no checkpoint would pass for another, nor for the initial state."""
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        parts = [state[kind, "layers.1.attn.q"].tobytes() for state in saved.values()]
        assert len(set(parts)) == len(CONFIGS)
        assert any(any(part) for part in parts)
    for number, state in saved.items():
        initial = ck.bits(megabus.build_model(CONFIGS[number].model, seed=number).state_dict())
        assert not any((state[key] == values).all() for key, values in initial.items())


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_plain_process_loads_any(saved, base, number):
    run, weights = base / str(number), {key: v for key, v in saved[number].items() if key[0] == "weight"}
    for path in (run, str(run), checkpoints_of(run), folder_of(checkpoints_of(run), 7)):
        model = megabus.load(path)
        assert ck.same(ck.bits(model.state_dict()), weights)
    assert model.config == CONFIGS[number].model
    assert not model.training
    logits = model(torch.arange(2 * ck.T).view(2, ck.T))
    assert logits.shape == (2, ck.T, ck.V)
    assert logits.isfinite().all()


def test_the_newest_of_a_run_is_loaded(tmp_path):
    config, root = ck.run_config({"dp": 2}), tmp_path / "checkpoints"
    first, second = (
        ck.assembled(config, part) for part in zip(*run_ranks(2, ck.saved_steps, root, config, 2), strict=True)
    )
    assert not ck.same(first, second)
    for path, state in ((tmp_path, second), (folder_of(root, 1), first), (folder_of(root, 2), second)):
        found = ck.bits(megabus.load(path).state_dict())
        assert ck.same(found, {key: state[key] for key in found})
    ((restored, step),) = run_ranks(1, ck.loaded, root, ck.run_config({}))
    assert step == 2
    assert ck.same(ck.assembled(config, [restored]), second)


@pytest.mark.parametrize("path", ["nowhere", "empty", "partial"])
def test_where_there_is_none(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "partial/checkpoints/step-00000001.partial").mkdir(parents=True)
    told = (
        "does not exist"
        if path == "nowhere"
        else "holds none, and no config.json of a model in another form; give a run, one of"
    )
    with pytest.raises(UserError, match=told):
        megabus.load(tmp_path / path)
    (tmp_path / "file").touch()
    for other, told in (("", "= '': names nothing"), (tmp_path / "file", "file: is no directory; give a run or one")):
        with pytest.raises(UserError, match=told):
            megabus.load(other)
    assert run_ranks(2, find_checkpoint, tmp_path / path / "checkpoints", True) == [None, None]


def test_one_under_another_name_is_told_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine: is one, and is not called so; give it back its name, step-"):
        megabus.load(tmp_path / "mine")
    with pytest.raises(UserError, match=r"step-00000003: does not exist"):
        megabus.load(tmp_path / "step-00000003")


# ---- what training was


def save_untrained(root, config):
    engine = ck.trained(config, steps=0)
    assert ck.save(ck.make_saver(root), engine, config, step=0).error is None
    return ck.held(engine)


def test_before_the_first_step_there_are_only_weights(tmp_path):
    config, root = ck.run_config({"tp": 2}), tmp_path / "checkpoints"
    state = ck.assembled(config, run_ranks(2, save_untrained, root, config))
    assert {kind for kind, _ in state} == {"weight"}
    assert len(list(folder_of(root, 0).glob("*.safetensors"))) == 2
    ranks = run_ranks(3, ck.loaded, root, ck.run_config({"dp": 3}))
    assert ck.same(ck.assembled(config, [told for told, _ in ranks]), state)
    assert {step for _, step in ranks} == {0}
    assert ck.same(ck.bits(megabus.load(tmp_path).state_dict()), state)
    assert ck.same(ck.bits(megabus.build_model(config.model, seed=3).state_dict()), state)


def test_bf16_runs_keep_their_fp32_masters(tmp_path):
    config, root = ck.run_config({"dp": 2}, precision="bf16"), tmp_path / "checkpoints"
    state = ck.assembled(config, [told[-1] for told in run_ranks(2, ck.saved_steps, root, config, 2)])
    loaded = megabus.load(tmp_path).state_dict()
    assert ck.same(ck.bits(loaded), {key: state[key] for key in ck.bits(loaded)})
    assert not ck.same(ck.bits({k: v.bfloat16().float() for k, v in loaded.items()}), ck.bits(loaded))  # not rounded
    for layout, precision in (({"tp": 2}, "bf16"), ({"pp": 2}, "fp32")):
        ranks = run_ranks(2, ck.loaded, root, ck.run_config(layout, precision=precision))
        assert ck.same(ck.assembled(config, [told for told, _ in ranks]), state)


def go_on(root, config):
    """Two steps, a save, a third step; then from the save the third step again, and with another count of Adam's."""
    engine = ck.trained(config, steps=2)
    assert ck.save(ck.make_saver(root), engine, config, step=2).error is None
    told = [ck.held(engine)]
    ck.train_on(engine, seed=8)
    told.append(ck.held(engine))
    engine.close()
    found = find_checkpoint(root, strict=True)
    for now in (found, replace(found, state=replace(found.state, optimizer_step=1))):
        engine = ck.fresh(config)
        restore(now, engine)
        ck.train_on(engine, seed=8)
        told.append(ck.held(engine))
        engine.close()
    return told


@pytest.mark.parametrize(
    ("kind", "layout", "precision"),
    [("ngpt", {"tp": 2}, "fp32"), ("ngpt", {"dp": 2}, "bf16"), ("ngpt", {"pp": 2}, "fp32"), ("gpt", {"dp": 2}, "fp32")],
)
def test_a_restored_engine_trains_on_as_the_saved_one_would_have(tmp_path, kind, layout, precision):
    config = ck.run_config(layout, kind, precision=precision)
    ranks = run_ranks(2, go_on, tmp_path, config)
    saved, uninterrupted, resumed, miscounted = (ck.assembled(config, part) for part in zip(*ranks, strict=True))
    assert ck.same(resumed, uninterrupted)
    assert not ck.same(resumed, saved)
    assert not ck.same(resumed, miscounted)


# ---- beside tensors


def test_the_tokenizer_goes_with_the_model(tmp_path):
    tokenizer = tmp_path / "a.model"
    tokenizer.write_bytes(b"pieces")
    config = ck.run_config({}, tokenizer=str(tokenizer))
    for run, given in (("with", str(tokenizer)), ("without", None)):
        run_ranks(1, save_tokenizer, tmp_path / run, config, given)
    assert (folder_of(tmp_path / "with", 0) / "tokenizer.model").read_bytes() == b"pieces"
    assert not (folder_of(tmp_path / "without", 0) / "tokenizer.model").exists()


def save_tokenizer(root, config, tokenizer):
    engine = ck.fresh(config)
    engine.write_initial(0)
    assert ck.save(ck.make_saver(root, tokenizer=tokenizer), engine, config, step=0).error is None


def test_loading_runs_no_pickle(saved, base, monkeypatch):
    """Pickles can run code, so checkpoints hold none and loading reads none."""
    run = base / "4"
    assert {path.suffix for path in folder_of(checkpoints_of(run), 7).iterdir()} == {".json", ".safetensors"}

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    with pytest.raises(AssertionError, match="unpickled"):
        torch.load(run)  # control
    megabus.load(run)


def test_weights_are_re_expressed_and_what_they_were_read_from_stays():
    """Which may be a file that is mapped."""
    model = ModelConfig(vocab_size=67, d_model=36, n_layers=1, n_heads=2, head_dim=6, d_ff=62, alpha_init=0.1)
    old, new = (Placement(one, Layout(1, 1, 1)) for one in (model, model.model_copy(update={"alpha_init": 0.2})))
    read = {piece: torch.ones(len(piece)) for piece in old.owned(0)}
    fragments = {piece: {"weight": values} for piece, values in read.items()}
    re_express(fragments, old, new)
    scales = {piece: old.specs[piece.name].multiplier / new.specs[piece.name].multiplier for piece in read}
    assert set(scales.values()) > {1.0}
    assert all((fragments[piece]["weight"] == scale).all() for piece, scale in scales.items())
    assert all((values == 1).all() for values in read.values())
