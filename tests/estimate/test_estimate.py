"""The estimator against what ranks hold, what plans send, and formulas worked out by hand."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.memory_of_ranks import measure, memory_training
from megabus.config import GrowthConfig, Layout, ModelConfig, load_config, resolve_stages
from megabus.config.precision import FP32_BYTES
from megabus.config.stages import Stage
from megabus.engine import adam, ds_config, turns
from megabus.errors import UserError
from megabus.estimate import memory as rooms
from megabus.estimate.activations import Shape, footprint
from megabus.estimate.devices import DEVICES, Interconnect, device, like
from megabus.estimate.growth import estimate_growth, messages
from megabus.estimate.layouts import candidates, fullest, rank_layouts, settings, that_fit
from megabus.estimate.memory import held_copies, memory_at, rank_memory, states_at
from megabus.estimate.step_time import links, ring, step_time
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan
from megabus.model.cost import count_parameters, flops_per_token
from megabus.model.peak import chip_of
from megabus.parallel.fragments import KINDS
from megabus.parallel.placement import Placement
from megabus.testing.ranks import run_ranks
from tests.support.command import run_command
from tests.support.plans import needed_entries, owned_entries, traffic
from tests.support.trainings import run_of

torch.set_num_threads(1)
BUCKET = 300_000
RUNS = [
    ("gpt", Layout(1, 1, 1), {"micro_batches": 1}),
    ("ngpt", Layout(1, 1, 2), {"zero_stage": 2, "precision": "bf16"}),
    ("gpt", Layout(1, 1, 2), {"zero_stage": 2}),
    ("ngpt", Layout(2, 1, 1), {"sequence_parallel": True, "recompute": True, "micro_batch_size": 5}),
    ("ngpt", Layout(1, 3, 1), {"precision": "bf16"}),
]


def off(estimates, found):
    """How far the worst rank's estimates are from what it holds: beside the states while computing, and in all."""
    shares = []
    for one, other in zip(estimates, found, strict=True):
        shares += [(one.gradients + one.buckets + one.activations) / other.computing, one.total / other.total]
    return max(abs(share - 1) for share in shares)


def estimates(config):
    return [rank_memory(config.train, config.stage, rank) for rank in range(config.stage.layout.world)]


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(ds_config, "BUCKET_ENTRIES", BUCKET)


@pytest.mark.parametrize(("kind", "layout", "options"), RUNS, ids=str)
def test_memory_is_what_ranks_hold(kind, layout, options, small_buckets, monkeypatch):
    config = memory_training(kind, layout, **options)
    found = run_ranks(layout.world, measure, config, BUCKET, timeout=600.0)
    planned = estimates(config)
    for one, other in zip(planned, found, strict=True):
        assert (one.weights, one.masters, one.moments) == (other.weights, other.masters, other.moments)
        if config.train.precision == "bf16" and config.train.zero_stage == 1:
            assert 0.9 < one.reduction / other.reducing < 1.1
    assert off(planned, found) < 0.1
    # Negative controls: of other runs the same figures are not told.
    if layout.pp > 1:
        monkeypatch.setattr(rooms, "in_flight", lambda *_: 1)
        assert off(estimates(config), found) > 0.1
    for change in ({"micro_batch_size": 2 * config.train.micro_batch_size}, {"recompute": not config.train.recompute}):
        other_run = memory_training(kind, layout, **options | change)
        assert off(estimates(other_run), found) > 0.1


@pytest.mark.parametrize("optimizer", [{"gate": 0.5}, {"max_angle": 0.01}, {"max_angle": 0.01, "gate": 0.5}], ids=str)
def test_what_is_held_while_adam_steps_is_what_ranks_hold(optimizer, small_buckets, monkeypatch):
    """A cap's copy of the masters, and of the gated Adam's no temporaries but blocks, which are small in a large model
    and so are here."""
    for room in (adam, turns):
        monkeypatch.setattr(room, "BLOCK", 2**12)
    layout = Layout(1, 1, 1)
    training = memory_training("ngpt", layout, 1, optimizer=optimizer)
    (found,) = run_ranks(1, measure, training, BUCKET, timeout=600.0)
    stage, held = training.stage, held_copies(run_of(training), training.stage)
    placement = Placement(stage.model, layout)
    shares = [memory_at(training.train, stage, placement, 0, 0, held=n).update / found.updating for n in range(3)]
    assert [0.95 < share < 1.05 for share in shares] == [n == held for n in range(3)], shares


def test_copies_are_held_in_stages_that_have_grown():
    training = memory_training("ngpt", Layout(1, 1, 1))
    first, grown = training.stage, replace(training.stage, index=1)
    settle, boost = {"settle": {"max_angle": 1e-3, "tokens": 100}}, {"boost": {}}
    for growth, copies in ((settle, 1), (boost, 2), (settle | boost, 3), ({}, 0)):
        config = run_of(training, growth=growth)
        assert (held_copies(config, first), held_copies(config, grown)) == (0, copies)


# ---- large worlds


@pytest.fixture(scope="module")
def large():
    config = load_config("configs/ngpt_70b.yaml")
    return config, resolve_stages(config, 1024)


def test_the_large_run_s_states_are_all_of_its_parameters(large):
    config, stages = large
    for stage in stages:
        placement, layout = Placement(stage.model, stage.layout), stage.layout
        entries = sum(g.entries for pp in range(layout.pp) for tp in range(layout.tp) for g in placement.groups(pp, tp))
        whole = sum(placement.numel(name) for name, spec in placement.specs.items() if not spec.sharded)
        assert entries == count_parameters(stage.model) + (layout.tp - 1) * whole
        at = states_at(config.train, stage, placement, 0, 0)
        groups = placement.groups(0, 0)
        owned = sum(g.partition for g in groups)
        assert (at.masters, at.moments, at.weights) == (4 * owned, 8 * owned, 2 * owned * layout.dp)
        assert 0 <= owned * layout.dp - sum(g.entries for g in groups) < 2 * 2 * layout.dp  # padding of two groups


@pytest.mark.parametrize("kernels", ["eager", "compiled", "triton"])
def test_recomputed_blocks_save_what_they_were_given(large, kernels):
    _, stages = large
    shape = Shape(stages[0].model, 2, 0, 1, 4096, "bf16", True, True, kernels, False)
    h = 2 * 4096 * 4096 // 2
    assert footprint(shape, 9, False, False).saved == 9 * h == 9 * shape.boundary
    kept = footprint(replace(shape, recompute=False), 1, False, False)
    assert kept.saved > 10 * h
    if kernels != "eager":
        eager = footprint(replace(shape, recompute=False, kernels="eager"), 1, False, False)
        assert kept.saved < 0.75 * eager.saved


# ---- growth


def plan_of(before, after, **how):
    old = ModelConfig(vocab_size=67, d_model=36, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=62)
    new = old.grown(d_model=52, n_heads=6, d_ff=90, n_layers=5)
    return Plan(
        Placement(old, Layout(*before)), Placement(new, Layout(*after)), Growth(old, new, GrowthConfig(**how), 7)
    )


@pytest.mark.parametrize("depth", ["append", "identity", "stack", "fresh"])
@pytest.mark.parametrize("layouts", [((2, 2, 1), (1, 2, 2)), ((1, 3, 1), (1, 1, 3))], ids=str)
def test_traffic_of_each_rank_is_the_plan_s(layouts, depth):
    plan = plan_of(*layouts, depth=depth, moments="grow")
    world = plan.old.layout.world
    exchanged = [messages(plan.schedule(rank, 2**12, KINDS), rank) for rank in range(world)]
    received = [sum(got) for _, got in exchanged]
    for rank in range(world):
        owned = owned_entries(plan.old, rank)
        assert received[rank] == sum(len(needed_entries(plan, rank, k) - owned) for k in KINDS) * FP32_BYTES
    assert sum(sum(sent) for sent, _ in exchanged) == sum(received) == traffic(plan, KINDS)[0] > 0
    still = replace(plan, new=Placement(plan.new.model, plan.old.layout))
    assert received != [traffic(still, KINDS, [rank])[0] for rank in range(world)]


def test_growth_of_the_large_run(large):
    config, stages = large
    found = estimate_growth(config, stages[1], stages[2], device("h100"), rebuild=3.0)
    share = 12 * count_parameters(stages[1].model) / 1024
    assert 0.1 * share < found.received < 3 * share
    assert found.stall == pytest.approx(found.move + found.grow + 3.0)
    inter, plain = device("h100").inter, max(found.sent, found.received) / device("h100").inter.bandwidth
    assert found.move == pytest.approx(plain + found.messages * inter.latency)
    assert found.messages >= 3  # of the three kinds of tensor


# ---- time


def test_a_ring_sends_each_part_round():
    link = Interconnect(1e-3, 100.0)
    assert ring(link, 4, 400.0, 2) == pytest.approx(2 * (3e-3 + 3.0))
    assert ring(link, 1, 400.0, 2) == 0


def test_links_follow_from_where_ranks_lie():
    h100 = device("h100")
    tensor, pipe, data = links(Layout(8, 4, 2), h100)
    assert (tensor, pipe, data.bandwidth) == (h100.intra, h100.inter, h100.inter.bandwidth)
    tensor, pipe, data = links(Layout(2, 2, 2), h100)
    assert tensor == pipe == data == h100.intra
    assert links(Layout(2, 1, 8), h100)[2].bandwidth == 4 * h100.inter.bandwidth
    assert links(Layout(16, 1, 1), h100)[0] == h100.inter


def test_step_time_without_links_is_the_flops(large):
    """One rank computes FLOPs at its speed; pp ranks take 1/pp of it with (pp - 1) / (m + pp - 1) of waiting."""
    config, stages = large
    model = stages[0].model.model_copy(update={"vocab_size": 8})
    config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": False})})
    free = replace(device("h100"), intra=Interconnect(0, 1e30), inter=Interconnect(0, 1e30), memory_bandwidth=1e30)
    free = replace(free, efficiency=0.6, attention=0.6)
    alone = Stage(0, model, Layout(1, 1, 1), 4096, 1, 6, 1e-3, 0.8, None, None)
    one = step_time(config, alone, Placement(model, alone.layout), free)
    flops = 6 * 4096 * flops_per_token(model, 4096)
    assert one.total == pytest.approx(flops / (0.6 * 989e12))
    assert one.mfu(free, "bf16", 1) == pytest.approx(0.6)
    piped = replace(alone, layout=Layout(1, 4, 1))
    four = step_time(config, piped, Placement(model, piped.layout), free)
    assert four.bubble / four.total == pytest.approx(3 / (6 + 3))
    assert four.total == pytest.approx(one.total / 4 * 9 / 6, rel=1e-3)


# ---- layouts


def accepted(stage, nodes_of, sizes):
    """By hand: what divides what."""
    model, world, found = stage.model, stage.layout.world, set()
    for tp in range(1, nodes_of + 1):
        for pp in range(1, model.n_layers + 1):
            if world % (tp * pp):
                continue
            dp = world // (tp * pp)
            for micro in sizes:
                fits = model.n_heads % tp == model.kv_heads % tp == model.d_ff % tp == stage.seq_len % tp == 0
                if fits and stage.global_batch_size % (micro * dp) == 0:
                    found.add((tp, pp, dp, micro))
    return found


def test_candidates_are_all_that_a_run_accepts(large):
    config, stages = large
    for nodes_of in (8, 6):
        found = list(candidates(config, stages[2], replace(device("h100"), nodes_of=nodes_of)))
        assert {(s.layout.tp, s.layout.pp, s.layout.dp, s.micro_batch_size) for s in found} == accepted(
            stages[2], nodes_of, (1, 2, 4)
        )
    assert all(stage.index == 2 and stage.model == stages[2].model for stage in found)


def test_ranking_is_by_time_of_what_fits():
    config = run_of(memory_training("gpt", Layout(2, 1, 2), precision="bf16"))
    stage = resolve_stages(config, 4)[0]
    cpu = device("cpu")
    every = rank_layouts(config, stage, cpu, top=99)
    times = [choice.time.total for choice in every.best]
    assert times == sorted(times)
    assert len({choice.stage.layout for choice in every.best}) == len(times)
    mine = step_time(config, stage, Placement(stage.model, stage.layout), cpu).total
    others = [choice for choice in every.best if choice.stage.layout != stage.layout]
    assert every.own == 1 + sum(choice.time.total < mine for choice in others)
    own = stage.layout, stage.micro_batch_size
    assert [one.stage.micro_batch_size for one in every.best if one.stage.layout == stage.layout] == [own[1]]
    small = [one for one in candidates(config, stage, cpu) if one.micro_batch_size == 1]
    least = sorted(fullest(config, one, Placement(one.model, one.layout), 1e12, False).total for one in small)
    room = least[len(least) // 2]
    fewer = rank_layouts(config, stage, replace(cpu, memory=room + cpu.reserve), top=99)
    assert len(fewer.best) == sum(need <= room for need in least) < len(every.best) == len(least)
    assert all(choice.memory.total <= room for choice in fewer.best)
    assert rank_layouts(config, stage, replace(cpu, memory=cpu.reserve), top=3).own is None


def test_a_layout_of_one_s_own_that_fits_is_not_refused(monkeypatch, capsys):
    """Though no other is proposed: tensor parallelism over nodes is not."""
    words = ("--config", "configs/gpt_64m.yaml", "--world", "2", "--nodes-of", "1", "--reserve-gb", "0")
    words += ("layout.tp=2", "train.micro_batch_size=1", "train.precision=bf16")
    assert "is number 1" in told(*words, "--gpu-memory-gib", "0.9")
    small = ("--config", "configs/gpt_64m.yaml", "--world", "1", "--gpu-memory-gib", "3.7", "--reserve-gb", "0")
    found = told(*small)  # with smaller micro batches it would
    assert "configured, micro batches of 32 do not fit" in found
    assert "with micro batches of 32 does not fit" in found
    refused = run_command("estimate", *words, "--gpu-memory-gib", "0.25")
    assert refused.stderr.startswith("error: model = stage 0: fits no layout of 2 ranks of 0.268 GB, with micro")
    assert "it fits with" not in refused.stderr


def test_a_refusal_names_the_settings_that_fit():
    asked = ("--config", "configs/ngpt_0.5b.yaml", "--world", "1", "--gpu", "rtx4090")
    refused = run_command("estimate", *asked)
    assert refused.returncode == 2
    assert "with micro batches of 1, 2, 4 and train.recompute: false; it fits with TP1/PP1/DP1 with" in refused.stderr
    found = re.search(r"it fits with \S+ with micro_batch_size (\d+), recompute true;", refused.stderr)
    assert run_command("estimate", *asked, f"train.micro_batch_size={found[1]}", "train.recompute=true").returncode == 0


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "4090", "NVIDIA GeForce RTX 4090", "rtx4090"])
def test_a_card_is_known_however_it_is_written(name):
    assert device(name) is DEVICES["rtx4090"]
    for other in ("", "rtx", "GTX 4090", "40900"):
        with pytest.raises(UserError, match="is not in the table"):
            device(other)


@pytest.mark.parametrize("name", ["ngpt_0.5b", "ngpt_1b"])
def test_shipped_settings_are_the_estimator_s(name):
    """For the GPU that the file names. Of one that is smaller they are not: that is the control."""
    config = load_config(f"configs/{name}.yaml")
    (stage,) = resolve_stages(config, 1)
    chosen = settings(config, stage, stage.layout, device("h100"))
    assert (chosen.stage.micro_batch_size, chosen.recompute) == (stage.micro_batch_size, config.train.recompute)
    home = settings(config, stage, stage.layout, device("a6000"))
    assert (home.stage.micro_batch_size, home.recompute) != (stage.micro_batch_size, config.train.recompute)


def test_settings_are_the_fastest_of_all_that_fit():
    """By trying every one; in a pipeline small micro batches are faster, else large ones are no slower."""
    config = run_of(memory_training("ngpt", Layout(1, 2, 1), precision="bf16"))
    stage, cpu = replace(resolve_stages(config, 2)[0], global_batch_size=64), device("cpu")
    need = {}
    for layout, recompute, micro in itertools.product(
        (Layout(1, 2, 1), Layout(1, 1, 2)), (False, True), (1, 2, 4, 8, 16)
    ):
        train = config.train.model_copy(update={"recompute": recompute})
        other = config.model_copy(update={"train": train})
        tried = replace(stage, layout=layout, micro_batch_size=micro)
        placement = Placement(tried.model, layout)
        total = fullest(other, tried, placement, 1e12, False).total
        need[layout, recompute, micro] = total, step_time(other, tried, placement, cpu).total
    for room in (max(total for total, _ in need.values()), sorted(total for total, _ in need.values())[8], 1e6):
        for layout in (Layout(1, 2, 1), Layout(1, 1, 2)):
            fit = [
                (time, -micro, r) for (at, r, micro), (total, time) in need.items() if at == layout and total <= room
            ]
            found = settings(config, stage, layout, replace(cpu, memory=room + cpu.reserve))
            wanted = None if not fit else min(fit)
            got = None if found is None else (found.time.total, -found.stage.micro_batch_size, found.recompute)
            assert got == wanted


def test_layouts_that_fit_are_found_in_larger_worlds_too():
    config = run_of(memory_training("gpt", Layout(1, 1, 1), precision="bf16"))
    (stage,) = resolve_stages(config, 1)
    least = settings(config, replace(stage, micro_batch_size=1), stage.layout, device("cpu")).memory.total
    fit = that_fit(config, stage, replace(device("cpu"), memory=0.7 * least + device("cpu").reserve), 3)
    assert len(fit) == 3
    assert [choice.stage.layout.world for choice in fit] == [2, 2, 4]
    assert all(choice.memory.total <= 0.7 * least for choice in fit)
    assert str(fit[0]).startswith(f"{fit[0].stage.layout} with micro_batch_size ")


def test_cards_are_found_by_their_drivers_names():
    names = {"NVIDIA GeForce RTX 3090": "RTX 3090", "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA L40S": "L40S"}
    names |= {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA RTX A6000": "RTX A6000"}
    names |= dict.fromkeys(["NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"])
    assert {name: chip_of(name) for name in names} == names
    card = like("NVIDIA GeForce RTX 4090", 25e9, 2)
    assert (card.bf16, card.memory, card.nodes_of) == (165.2e12, 25e9, 2)
    assert like("Tesla T4", 15e9, 1).bf16 == device("h100").bf16


# ---- the command


def told(*words):
    done = run_command("estimate", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


DEMO = ("--config", "configs/demo.yaml", "--world", "4", "--gpu", "cpu", "--top", "2")


def test_tables_and_values_agree(tmp_path):
    text = told(*DEMO, "--json", str(tmp_path / "out.json"))
    values = json.loads((tmp_path / "out.json").read_text())
    assert text.count("predicted, not measured") == 7  # a run, its steps, four stages' layouts, growths
    assert values["times"] == "predicted, not measured"
    assert values["stages"][0]["layout"] == {"tp": 2, "pp": 1, "dp": 2}
    for stage in values["stages"]:
        step = stage["step"]
        parts = [step[name] for name in ("compute", "between", "tensor", "pipeline", "bubble", "data", "update")]
        assert step["total"] == pytest.approx(sum(parts))
        assert len(stage["memory"]) == stage["layout"]["pp"]
        assert (stage["growth"] is None) == (stage["stage"] == 0)
    slow = json.loads(told(*DEMO, "--json", "-", "--gpu-tflops", "0.001", "train.micro_batch_size=8"))
    first = values["stages"][0]["step"], slow["stages"][0]["step"]
    assert first[1]["compute"] == pytest.approx(40 * first[0]["compute"], rel=1e-6)
    assert slow["stages"][0]["micro_batch_size"] == 8


def test_a_card_of_one_s_own_is_told_by_its_figures():
    figures = ("--gpu-memory-gib", "16", "--gpu-tflops", "88", "--gpu-gbs", "672")
    values = json.loads(told(*DEMO, *figures, "--json", "-"))["device"]
    assert (values["name"], values["memory"], values["bf16"]) == ("this GPU", 16 * 2**30, 88e12)
    assert values["memory_bandwidth"] == 672e9


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--gpu", "tpu"), "--gpu"),
        (("--world", "5"), "layout"),
        (("--efficiency", "1.5"), "--efficiency"),
        (("--inter-us", "-1"), "--inter-us"),
        (("--nodes-of", "0"), "--nodes-of"),
        (("--gpu-tflops", "inf"), "--gpu-tflops"),
        (("layout.tp=8", "layout.pp=1"), "layout"),
        (("--gpu-gbs", "0"), "--gpu-gbs"),
        (("--gpu-memory-gib", "7", "--reserve-gb", "8"), "--reserve-gb"),
        (("--gpu-memory-gib", "0.1", "--reserve-gb", "0"), "model"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(words, key):
    done = run_command("estimate", *DEMO, *words)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {key} = .*\n", done.stderr)
