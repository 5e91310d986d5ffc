"""Running means of the weights in whole runs: what they are, and that nothing else changes for them."""

from __future__ import annotations

import math
from itertools import count
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import megabus
from megabus.config import resolve_stages
from megabus.config.schema import TrainConfig
from megabus.convert.convert import open_source
from megabus.convert.load import state_of
from megabus.convert.source import OpenFiles
from megabus.convert.verify import verify
from megabus.data.sources import open_sources
from megabus.engine.averages import share
from megabus.estimate.growth import growth_bytes
from megabus.estimate.memory import states_at
from megabus.growth.plan import plan_between
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape
from megabus.preflight.files import checkpoint_bytes
from megabus.train import loop
from tests.support.command import run_command
from tests.support.small_runs import read_state_of, rows_of, run_config, start, stop_after, untimed, write_corpus

STEP = 16 * 8  # tokens
DECAYS = [0.9, 0.5]
STEPS, GROWTH = 8, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, layout=None, after=None, ema=DECAYS, **changes):
    """Grows after step 4, in width and depth, into a layout of its own."""
    wider = {"d_model": 52, "n_heads": 4, "d_ff": 90, "n_layers": 4, "layout": after or layout or {}}
    changes = {"growth__stages": [wider], "growth__max_tokens": GROWTH * STEP, "train__ema": ema} | changes
    changes |= {"train__micro_batch_size": 4, "model__n_heads": 2}
    return run_config(corpus, run_dir, [layout or {}, {}, {}], train__max_tokens=STEPS * STEP, **changes)


def test_shares_are_those_of_a_bias_corrected_mean():
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for decay in (0.5, 0.99, 0.9999):
        mean = 0.0
        for number, weight in enumerate(weights, 1):
            mean += share(decay, number) * (weight - mean)
            terms = [(1 - decay) * decay ** (number - i) * w for i, w in enumerate(weights[:number], 1)]
            assert mean == pytest.approx(math.fsum(terms) / (1 - decay**number), rel=1e-9, abs=1e-12)
    assert share(0.999, 1) == 1


@pytest.mark.parametrize("ema", [1.0, 0.0, -0.5, [0.9, 0.9], "often", [0.9, None]])
def test_what_is_no_decay_is_refused(ema):
    with pytest.raises(ValueError, match="ema"):
        TrainConfig(seq_len=8, micro_batch_size=1, global_batch_size=1, ema=ema)


# ---- a run on one rank -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    config = configured(corpus, tmp_path_factory.mktemp("whole") / "run", checkpoint={"every": 6, "keep_last": 9})
    return config, start(config, 1)[0]


def test_nothing_else_changes(corpus, tmp_path, whole):
    """Masters, moments and weights of a run without means have the same bits, and it tells the same."""
    config, _ = whole
    without = configured(corpus, tmp_path / "without", ema=[])
    start(without, 1)
    assert not any("ema" in row for row in rows_of(without, "eval"))
    for event in ("step", "gains"):
        assert untimed(rows_of(without, event)) == untimed(rows_of(config, event))
    (theirs,), (ours,) = rows_of(without, "growth"), rows_of(config, "growth")
    assert (ours["loss_before"], ours["loss_after"]) == (theirs["loss_before"], theirs["loss_after"])
    assert ours["bytes_kept"] == 5 / 3 * theirs["bytes_kept"]  # two tensors more a parameter
    state, other = read_state_of(config, STEPS), read_state_of(without, STEPS)
    assert state["kinds"] == [*other["kinds"], "ema-0.9", "ema-0.5"]
    assert (state["averaged"], other["averaged"]) == ({"ema-0.9": STEPS, "ema-0.5": STEPS}, {})
    ours, theirs = megabus.load(config.run_dir).state_dict(), megabus.load(without.run_dir).state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_the_loss_of_means_is_told_and_stays_through_a_growth(whole):
    config, _ = whole
    told = [(row["step"], row["stage"], row.get("ema", {})) for row in rows_of(config, "eval")]
    assert [(step, stage, list(means)) for step, stage, means in told] == [
        (0, 0, []),
        *((step, stage, ["0.9", "0.5"]) for step, stage in ((4, 0), (4, 1), (8, 1))),
    ]
    (_, _, before), (_, _, after), (_, _, last) = told[1:]
    for decay in before:
        assert after[decay] == pytest.approx(before[decay], abs=2e-6)
        assert last[decay] != after[decay]


def test_a_resumed_run_has_the_same_means(corpus, tmp_path, whole):
    """To the bit: digests are of them too. The time that their losses take is in the validation's."""
    config, undisturbed = whole
    cut = configured(corpus, tmp_path / "cut")
    start(cut, 1, stop_after(6), counted_clock)
    (second,) = start(cut, 1)
    assert second.steps == undisturbed.steps[6:]
    assert untimed(rows_of(cut, "eval")) == untimed(rows_of(config, "eval"))
    assert [row["seconds"] for row in rows_of(cut, "eval")][:3] == [2, 6, 6]


def counted_clock():
    """Each look at the loop's clock comes a second after the one before: four of them are those of two means."""
    loop.time = SimpleNamespace(perf_counter=count().__next__)


def test_decays_may_come_and_go(corpus, tmp_path, whole):
    """One that comes begins with the weights that are there, and the others go on."""
    config, _ = whole
    run = tmp_path / "run"
    start(configured(corpus, run), 1, stop_after(6))
    other = configured(corpus, run, ema=[0.5, 0.75], resume="strict")
    start(other, 1)
    (resume,) = rows_of(other, "resume")
    assert resume["changes"] == ["train.ema: [0.9, 0.5] -> [0.5, 0.75]; a new mean begins with the weights as they are"]
    state = read_state_of(other, STEPS)
    assert state["averaged"] == {"ema-0.5": STEPS, "ema-0.75": 2}
    last, there = rows_of(other, "eval")[-1]["ema"], rows_of(config, "eval")[-1]["ema"]
    assert (last["0.5"], "0.75" in last) == (there["0.5"], True)


def converted(tmp_path, source, *options):
    done = run_command("convert", str(source), str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


@pytest.mark.parametrize("form", ["checkpoint", "hf"])
def test_what_is_converted_is_what_was_evaluated(tmp_path, whole, form):
    config, _ = whole
    model = megabus.load(converted(tmp_path, config.run_dir, "--to", form, "--ema", "0.9", "--verify"))
    lengths = torch.cat(
        [model.state_dict()[name].norm(dim=1) for name, spec in param_specs(model.config).items() if spec.unit]
    )
    assert float((lengths - 1).abs().max()) < 1e-6
    told, loss = rows_of(config, "eval")[-1], validation_loss(model, config)
    assert loss == pytest.approx(told["ema"]["0.9"], abs=2e-5)
    assert abs(loss - told["loss"]) > 1e-3  # control: it is not the weights'


@torch.no_grad()
def validation_loss(model, config):
    sources = open_sources(config, resolve_stages(config, 1))
    inputs, targets = sources.valid.batch(0, 16, range(sources.valid_tokens // 16))
    return float(model.loss(model.hidden(inputs), targets)[0])


def test_means_go_into_other_layouts_and_back(tmp_path, whole):
    config, _ = whole
    wanted = state_of(config.run_dir)[1]
    for form, options in (("checkpoint", ("--pp", "2", "--dp", "3")), ("shards", ("--tp", "2"))):
        out = converted(tmp_path / form, config.run_dir, "--to", form, *options, "--verify")
        assert (state_of(out)[1].kinds, state_of(out)[1].averaged) == (wanted.kinds, wanted.averaged)
        back = converted(tmp_path / form / "back", out, "--to", "checkpoint", "--verify")
        with OpenFiles() as files:
            verify(open_source(Path(config.run_dir), files), open_source(back, files))


def test_a_mean_that_is_not_there_is_named(tmp_path, whole):
    config, _ = whole
    done = run_command("convert", config.run_dir, tmp_path / "out", "--to", "hf", "--ema", "0.99")
    assert (done.returncode, "--ema = 0.99: is no decay of a mean in" in done.stderr) == (2, True)
    assert "(0.9, 0.5)" in done.stderr
    alone = converted(tmp_path, config.run_dir, "--to", "checkpoint", "--weights-only")
    assert state_of(alone)[1].averaged == {}


def test_what_is_estimated_counts_means(corpus, tmp_path):
    """Of each 4 bytes a parameter, wherever masters are counted."""
    with_two, without = (configured(corpus, tmp_path / "run", {"dp": 2}, ema=ema) for ema in (DECAYS, []))
    told = []
    for config in (with_two, without):
        old, new = resolve_stages(config, 2)
        plan = plan_between(config, old, new)
        states = states_at(config.train, old, plan.old, 0, 0)
        told.append((states.masters, states.moments, growth_bytes(config, plan, new), checkpoint_bytes(config, [old])))
    (masters, moments, growth, saved), (same, less, without_growth, less_saved) = told
    assert (masters, moments - less) == (same, 2 * masters)
    assert growth >= without_growth + 2 * (masters + states_at(with_two.train, new, plan.new, 0, 0).masters)
    assert saved / less_saved == 20 / 12


# ---- more ranks --------------------------------------------------------------------------------------------


def followed(folder, tolerance):
    """On every rank a mean in fp64 of the masters after each update, beside the engine's; and what a growth is given
    and makes."""

    def change():
        train_step, grow = loop.train_step, loop.grow
        means, number = {}, [0]

        def stepping(run):
            weights = digest_of_model(run.engine)
            with run.engine.computing_with("ema-0.9"):
                assert number[0] < 2 or digest_of_model(run.engine) != weights
            assert digest_of_model(run.engine) == weights
            train_step(run)
            number[0] += 1
            for piece, kinds in run.engine.read().items():
                mean, weight = means.setdefault(piece, torch.zeros(len(piece)).double()), kinds["weight"].double()
                mean += share(0.9, number[0]) * (weight - mean)
                assert float((mean - kinds["ema-0.9"].double()).abs().max()) < tolerance

        def growing(run, *args):
            dump(run.engine, folder / f"before-{dist.get_rank()}")
            grow(run, *args)
            dump(run.engine, folder / f"after-{dist.get_rank()}")
            means.clear()
            means.update({piece: kinds["ema-0.9"].double() for piece, kinds in run.engine.read().items()})

        loop.train_step, loop.grow = stepping, growing

    return change


def digest_of_model(engine):
    return [parameter.detach().clone().view(-1).tolist() for parameter in engine.module.parameters()]


def dump(engine, path):
    torch.save({(piece.name, piece.start): kinds["ema-0.9"].clone() for piece, kinds in engine.read().items()}, path)


def assembled(folder, when, model):
    """Whole tensors of all ranks' parts; of replicas the last."""
    state = {
        name: torch.full((prod(global_shape(spec, model)),), torch.nan) for name, spec in param_specs(model).items()
    }
    for path in folder.glob(f"{when}-*"):
        for (name, first), values in torch.load(path).items():
            state[name][first : first + len(values)] = values
    return {name: values.view(global_shape(param_specs(model)[name], model)) for name, values in state.items()}


@pytest.mark.parametrize(
    ("before", "after", "precision"), [({"pp": 2}, {"dp": 2}, "fp32"), ({"dp": 2}, {"tp": 2}, "bf16")], ids=str
)
def test_shards_of_means_follow_and_grow(corpus, tmp_path, before, after, precision):
    """As one process says: within rounding the mean of what the masters were, and of a growth the same bits."""
    config = configured(corpus, tmp_path / "run", before, after, train__precision=precision)
    start(config, 2, followed(tmp_path, 1e-6))
    old, new = (stage.model for stage in resolve_stages(config, 2))
    grown = megabus.grow_state(assembled(tmp_path, "before", old), old, new, 0, config.growth, "ema-0.9")
    there = assembled(tmp_path, "after", new)
    assert all(torch.equal(there[name], x) for name, x in grown.items())
