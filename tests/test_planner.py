"""Plans of growth against closed forms and brute force, and laws against the coefficients that made the points."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megabus.config import ModelConfig, load_config, resolve_stages
from megabus.config.fractions import fraction_of
from megabus.config.pair import check_pair
from megabus.config.schema import ScalingLaw
from megabus.errors import UserError
from megabus.growth.planner import Size, plan_growth, plan_stages
from megabus.kappa.law_fit import fit_law

ROOT = Path(__file__).resolve().parents[1]
FINAL = ModelConfig(vocab_size=1000, d_model=120, n_layers=6, n_heads=6, n_kv_heads=3, head_dim=20, d_ff=330)
LAW = ScalingLaw(E=1.5, A=120.0, B=300.0, alpha=0.3, beta=0.32)


def sizes(*fractions, law=LAW):
    return [Size(fraction_of(FINAL, fraction), 64, law) for fraction in fractions]


def test_a_size_follows_its_law():
    (size,) = sizes(1)
    tokens = 3e7
    loss = size.loss(tokens)
    assert size.tokens(loss) == pytest.approx(tokens)
    step = 1e-5
    slope = (size.flops(loss - step) - size.flops(loss + step)) / (2 * step)
    assert size.price(loss) == pytest.approx(slope, rel=1e-4)
    assert math.isinf(size.tokens(size.floor))


def cheapest(chosen, loss):
    """FLOPs to `loss` from far above, by brute force: at each of many losses the lowest price of any size."""
    grid = loss + np.geomspace(1e-9, 1e4, 400_001)
    prices = np.array([[size.price(x) for x in grid[::20]] for size in chosen]).min(0)
    return float(np.trapezoid(prices, grid[::20]))


@pytest.mark.parametrize("fractions", [(0.5, 1), (0.25, 0.5, 1), (0.25, 0.4, 0.6, 0.8, 1)])
@pytest.mark.parametrize("tokens", [3e6, 1e8])
def test_no_way_through_the_sizes_is_cheaper(fractions, tokens):
    """The plan costs what the lowest price at every loss adds up to."""
    chosen = sizes(*fractions)
    plan = plan_stages(chosen, chosen[-1].loss(tokens))
    assert plan.flops == pytest.approx(cheapest(chosen, plan.loss), rel=2e-3)
    assert plan.stages[-1].end == plan.loss
    assert sum(stage.flops for stage in plan.stages) == pytest.approx(plan.flops)
    starts = [stage.start for stage in plan.stages]
    assert starts == [math.inf, *(stage.end for stage in plan.stages[:-1])]


def test_growing_at_other_losses_costs_more():
    small, large = sizes(0.5, 1)
    plan = plan_stages([small, large], large.loss(3e7))
    (at, _) = (stage.end for stage in plan.stages)

    def cost(loss):
        return small.flops(loss) + large.flops(plan.loss) - large.flops(loss)

    assert cost(at) == pytest.approx(plan.flops)
    for shift in (-0.5, 0.5):
        assert cost(at + shift) > plan.flops * 1.0001


def test_sizes_that_never_pay_are_left_out():
    dear = Size(FINAL.grown(n_layers=7), 64, LAW)
    _, large = sizes(0.5, 1)
    plan = plan_stages([Size(FINAL, 64, LAW), dear], Size(FINAL, 64, LAW).loss(1e5))
    assert [stage.model for stage in plan.stages] == [FINAL]
    with pytest.raises(ValueError, match="never gets below"):
        plan_stages([large], large.floor)


def test_a_proposal_is_the_best_of_all():
    plan = plan_growth(FINAL, 64, 2e6, LAW, 3)
    smaller = {fraction_of(FINAL, i / 12): None for i in range(2, 12)}
    last = Size(FINAL, 64, LAW)
    for count in (0, 1, 2):
        for chosen in itertools.combinations(smaller, count):
            other = plan_stages([*(Size(model, 64, LAW) for model in chosen), last], plan.loss)
            assert other.flops >= plan.flops
    assert plan.saving > 1.05
    assert plan_growth(FINAL, 64, 2e6, LAW, 1).saving == 1.0


def test_more_tokens_leave_less_to_save():
    savings = [plan_growth(FINAL, 64, tokens, LAW).saving for tokens in (1e5, 1e6, 1e7, 1e8, 1e9)]
    assert savings == sorted(savings, reverse=True)
    assert savings[0] > 2 > 1.1 > savings[-1] >= 1


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.7, 1.0])
def test_fractions_can_grow_into_the_whole(fraction, tp, pp):
    part = fraction_of(FINAL, fraction, tp, pp)
    check_pair(part, FINAL, "")
    assert part.n_heads // part.kv_heads == 2
    assert part.kv_heads % tp == part.d_ff % tp == 0
    assert pp <= part.n_layers <= FINAL.n_layers
    if fraction == 1:
        assert part == FINAL


# ---- laws


def points_of(law, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for n, d in itertools.product((1e6, 3e6, 1e7), (1e7, 4e7, 2e8, 1e9)):
        found.append((n, d, law.E + law.A * n**-law.alpha + law.B * d**-law.beta + noise * rng.standard_normal()))
    return found


def test_a_law_is_found_again():
    fitted = fit_law(points_of(ScalingLaw(E=1.2, A=80.0, B=200.0, alpha=0.3, beta=0.325)))
    assert fitted.rms < 1e-9
    wanted = {"E": 1.2, "A": 80.0, "B": 200.0, "alpha": 0.3, "beta": 0.325}
    assert fitted.coefficients == pytest.approx(wanted, rel=1e-6)
    assert fit_law(points_of(LAW, noise=0.01)).rms < 0.02


def test_coefficients_are_never_negative():
    rising = [(n, d, 3 + 1e-9 * d) for n, d, _ in points_of(LAW)]
    fitted = fit_law(rising)
    assert min(fitted.coefficients.values()) >= 0


@pytest.mark.parametrize("keep", [slice(0, 5), slice(0, 4), slice(0, 12, 4)])
def test_too_few_points_are_refused(keep):
    with pytest.raises(UserError, match="too few"):
        fit_law(points_of(LAW)[keep])


# ---- the tool


def tool(*args):
    command = [sys.executable, "tools/plan_growth.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def write_run(folder, sizes_of_run, tokens, loss, growth=None):
    folder.mkdir()
    rows = [{"event": "start", "step": 0, "tokens": 0, "flops": 0, "sizes": sizes_of_run, "stage": 0, "layout": ""}]
    rows += [growth] if growth else []
    rows += [{"event": "eval", "step": 9, "tokens": tokens, "flops": 1, "loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_tool_proposes_what_a_run_accepts(tmp_path):
    done = tool("configs/gpt_64m.yaml", "train.max_tokens=3e9")
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("\n\nmodel:", 1)[1]
    proposal = yaml.safe_load("model:" + text)
    tree = yaml.safe_load((ROOT / "configs/gpt_64m.yaml").read_text())
    tree |= {"model": proposal["model"], "growth": proposal["growth"], "train": tree["train"] | proposal["train"]}
    (tmp_path / "grown.yaml").write_text(yaml.safe_dump(tree))
    stages = resolve_stages(load_config(tmp_path / "grown.yaml"), 1)
    assert len(stages) == 3
    assert stages[-1].model == load_config(ROOT / "configs/gpt_64m.yaml").model
    again = tool(tmp_path / "grown.yaml", "train.max_flops=null", "train.max_tokens=3e9")
    assert [line.split()[0] for line in again.stdout.splitlines() if line.startswith("d")] == ["d216", "d344", "d512"]


def test_the_tool_fits_and_compares(tmp_path):
    law = ScalingLaw(E=1.2, A=80.0, B=200.0, alpha=0.3, beta=0.325)
    runs = [write_run(tmp_path / f"run{i}", {"n_params": n}, d, loss) for i, (n, d, loss) in enumerate(points_of(law))]
    old, new = ({"n_params": n} for n in (20_326_432, 64_044_320))
    row = {"event": "growth", "step": 4, "tokens": 5e8, "flops": 1, "old": old, "new": new, "loss_before": 4.5}
    grown = write_run(tmp_path / "grown", old, 2e9, 3.5, row | {"from_stage": 0, "to_stage": 1})
    done = tool("configs/ngpt_64m.yaml", "--fit", *runs, "--compare", grown)
    assert done.returncode == 0, done.stderr
    assert "law: L(N, D) = 1.2 + 80 / N^0.3 + 200 / D^0.325" in done.stdout
    refused = tool("configs/ngpt_64m.yaml", "--fit", grown)
    assert refused.returncode == 2
    assert "has grown" in refused.stderr
    assert tool("configs/ngpt_64m.yaml", "--max-stages", "0").returncode == 2
