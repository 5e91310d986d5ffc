"""Plans of growth against closed forms and brute force, and laws against the coefficients that made the points."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from megabus.config import ModelConfig, load_config, resolve_stages
from megabus.config.fractions import fraction_of
from megabus.config.pair import check_pair
from megabus.config.schema import ScalingLaw
from megabus.errors import UserError
from megabus.kappa.laws import fit_law
from megabus.kappa.planner import LAST_SHARE, Size, plan_growth, plan_stages, spend
from megabus.model.cost import count_parameters, flops_per_token
from tests.support.command import run_command

ROOT = Path(__file__).resolve().parents[2]
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
    plan = plan_stages(chosen, chosen[-1].loss(tokens), reach_final=False)
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


@pytest.mark.parametrize("tokens", [3e7, 1e9])
def test_spending_as_planned_comes_to_the_plan(tokens):
    chosen = sizes(0.25, 0.5, 0.75, 1)
    plan = plan_stages(chosen, chosen[-1].loss(tokens))
    taken = [sum(stage.flops for stage in plan.stages if stage.model == size.model) for size in chosen]
    run = spend(chosen, taken)
    assert (run.loss, run.saving) == pytest.approx((plan.loss, plan.saving))
    assert [stage.way for stage in run.stages if stage.flops] == pytest.approx([stage.way for stage in plan.stages])
    assert spend(chosen, [*taken[:2], taken[2] + taken[3] / 2, taken[3] / 2]).loss > run.loss  # control
    assert spend(chosen[-1:], [plan.flops]).saving == pytest.approx(1)


def test_a_size_below_whose_floor_the_loss_lies_gains_nothing():
    small, large = sizes(0.25, 1)
    cost = large.flops(small.floor)  # the large one comes below the small one's floor with this
    run = spend([large, small, large], [2 * cost, cost, cost])
    assert run.loss == pytest.approx(large.loss(3 * cost / large.flops_per_token))
    assert run.saving == pytest.approx(3 / 4)
    assert [stage.way for stage in run.stages][:2] == [None, None]


@pytest.mark.parametrize("fractions", [(0.5, 1), (0.25, 0.4, 0.7, 1)])
@pytest.mark.parametrize("tokens", [1e5, 1e6, 3e6, 1e7, 1e9])
def test_the_final_size_gets_its_share_at_the_least_cost(fractions, tokens):
    """Of all losses at which the final size could begin, none with its share of the FLOPs is cheaper."""
    chosen = sizes(*fractions)
    last, loss = chosen[-1], chosen[-1].loss(tokens)
    free, plan = plan_stages(chosen, loss, reach_final=False), plan_stages(chosen, loss)
    assert plan.stages[-1].model == last.model
    share = plan.stages[-1].flops / plan.flops
    if free.stages[-1].model == last.model and free.stages[-1].flops >= LAST_SHARE * free.flops:
        assert plan == free
    else:
        assert share == pytest.approx(LAST_SHARE, rel=1e-6)
    assert free.flops <= plan.flops <= plan.scratch_flops
    assert [stage.start for stage in plan.stages] == [math.inf, *(stage.end for stage in plan.stages[:-1])]
    assert plan.stages[-1].end == plan.loss == loss
    others = []
    for begin in (last.loss(x * tokens) for x in np.linspace(0.001, 0.999, 400)):
        at_last = last.flops(loss) - last.flops(begin)
        # Down to `begin` by any order of the smaller sizes: at each loss the lowest price, as `cheapest` adds it up.
        before = min(way_through(chosen[:-1], cut, begin) for cut in cuts(chosen[:-1], begin))
        if at_last >= LAST_SHARE * (before + at_last):
            others.append(before + at_last)
    assert min(others) >= plan.flops * (1 - 1e-6)


def cuts(smaller, begin):
    """Losses for the smaller sizes to grow at: every order-keeping choice of a grid above `begin`."""
    grid = [math.inf, *(begin + x for x in (8.0, 4.0, 2.0, 1.0, 0.5, 0.2)), begin]
    return itertools.combinations_with_replacement(grid, len(smaller) - 1)


def way_through(smaller, ends, begin):
    total, start = 0.0, math.inf
    for size, end in zip(smaller, [*ends, begin], strict=True):
        if end < start:
            total += size.flops(end) - (size.flops(start) if math.isfinite(start) else 0.0)
            start = end
    return math.inf if math.isnan(total) else total


def test_sizes_that_never_pay_are_left_out():
    dear = Size(FINAL.grown(n_layers=7), 64, LAW)
    _, large = sizes(0.5, 1)
    plan = plan_stages([Size(FINAL, 64, LAW), dear], Size(FINAL, 64, LAW).loss(1e5), reach_final=False)
    assert [stage.model for stage in plan.stages] == [FINAL]
    with pytest.raises(ValueError, match="never gets below"):
        plan_stages([large], large.floor)
    vague = Size(FINAL, 64, ScalingLaw(E=1.5, A=120.0, B=300.0, alpha=0.3, beta=0.05))
    with pytest.raises(ValueError, match="never gets below"):  # more tokens than fp64 holds
        plan_stages([vague], vague.floor + 1e-14)


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
    counts = (1e5, 1e6, 1e7, 1e8, 1e9)
    free, savings = ([plan_growth(FINAL, 64, n, LAW, 3, reach_final=reach).saving for n in counts] for reach in (0, 1))
    for found in (free, savings):
        assert found == sorted(found, reverse=True)
        assert found[0] > 2 > 1.1 > found[-1] >= 1
    assert all(a >= b for a, b in zip(free, savings, strict=True))
    assert free[0] > savings[0] * 1.1


def test_the_way_is_to_the_floor():
    plan = plan_stages(sizes(0.25, 0.5, 1), Size(FINAL, 64, LAW).loss(3e7))
    first, second, _ = plan.stages
    assert first.way is None
    assert second.way == pytest.approx((second.start - second.end) / (second.start - second.floor))
    assert 0 < second.way < 1


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.7, 1.0])
def test_fractions_can_grow_into_the_whole(fraction, tp, pp):
    part = fraction_of(FINAL, fraction, tp, pp)
    check_pair(part, FINAL, "append", "")
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


@pytest.mark.parametrize(("alpha", "beta", "rel"), [(0.3, 0.325, 1e-6), (0.31, 0.337, 1e-6), (0.31416, 0.2718, 5e-3)])
def test_a_law_is_found_again(alpha, beta, rel):
    """With exponents on the coarse grid, on a finer one, and on none."""
    wanted = {"E": 1.2, "A": 80.0, "B": 200.0, "alpha": alpha, "beta": beta}
    fitted = fit_law(points_of(ScalingLaw(**wanted)))
    assert fitted.rms < (1e-9 if rel < 1e-3 else 1e-4)
    assert fitted.law.model_dump() == pytest.approx(wanted, rel=rel)


def test_the_residuals_are_of_as_many_degrees_of_freedom_as_are_left():
    """Over many draws their mean square is the noise's."""
    points = [point for i, point in enumerate(points_of(LAW)) if i % 4 < 3]
    rng, squares = np.random.default_rng(0), []
    for _ in range(6):
        noisy = [(n, d, loss + 1e-4 * rng.standard_normal()) for n, d, loss in points]
        squares.append(fit_law(noisy).rms ** 2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(1e-4, rel=0.4)


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda n, d: 3 + 1e-9 * d + 50 * n**-0.3, "B comes out 0"),
        (lambda n, d: 3 + 1e-8 * n + 300 * d**-0.3, "A comes out 0"),
        (lambda n, d: 3 + 1e9 * n**-2.0 + 300 * d**-0.3, "alpha comes out at the end of its range, 1.2"),
        (lambda n, d: 9 - 0.2 * math.log(n) - 0.1 * math.log(d), "at the end of its range, 0.05"),
    ],
)
def test_runs_that_tell_no_law_are_refused(loss, problem):
    with pytest.raises(UserError, match=rf"12 run\(s\).*tell no law: .*{problem}.*further apart"):
        fit_law([(n, d, loss(n, d)) for n, d, _ in points_of(LAW)])


@pytest.mark.parametrize("keep", [slice(0, 5), slice(0, 4), slice(0, 8), slice(0, 12, 4)])
def test_too_few_points_are_refused(keep):
    """Fewer than 6 runs, or than 3 sizes; the same runs again are no more."""
    points = points_of(LAW)[keep]
    for repeated in (points, points * 3):
        with pytest.raises(UserError, match=r"too few .* 6 or more .* 3 or more sizes and 3 or more token counts"):
            fit_law(repeated)
    with pytest.raises(UserError, match="2 token count"):
        fit_law([point for point in points_of(LAW) if point[1] < 1e8])


# ---- the tool


def tool(*args):
    return run_command("plan", "--config", *args)


STAGES = [
    {"d_model": 384, "n_heads": 6, "d_ff": 1392, "n_layers": 6, "lr": 3e-3, "max_tokens": 800_000_000},
    {"d_model": 512, "n_heads": 8, "d_ff": 1856, "n_layers": 8, "lr": 2e-3},
]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A run that grows in width and depth, to the sizes of configs/ngpt_64m.yaml."""
    tree = yaml.safe_load((ROOT / "configs/ngpt_64m.yaml").read_text())
    tree["model"] |= {"d_model": 256, "n_heads": 4, "d_ff": 928, "n_layers": 4}
    tree["growth"] = {"max_tokens": 600_000_000, "stages": STAGES}
    tree["train"] |= {"max_flops": None, "max_tokens": 2_600_000_000}
    path = tmp_path_factory.mktemp("staged") / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def write_run(folder, sizes_of_run, tokens, *losses, growth=None, share=None, kind=None):
    folder.mkdir()
    rows = [{"event": "start", "step": 0, "tokens": 0, "flops": 0, "sizes": sizes_of_run, "stage": 0, "layout": ""}]
    rows += [growth | {"reason": "cap", "from_stage": 0, "to_stage": 1, "stall_s": 0.1}] if growth else []
    rows += [{"event": "step", "step": 9, "tokens": tokens, "flops": 1, "share": share}] if share else []
    rows += [{"event": "eval", "step": 9, "tokens": tokens, "flops": 1, "loss": loss} for loss in losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind:
        model = FINAL.model_dump(mode="json") | {"kind": kind}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


def table_of(text):
    """The table's rows by d_model, from the parameters on."""
    rows = [line.split() for line in text.splitlines() if line.startswith("d") and line[1].isdigit()]
    return {int(row[0][1:]): row[4:] for row in rows}


def accepted(tmp_path, said):
    """The stages of a run of `configs/gpt_64m.yaml` with the sections that were proposed, and these."""
    proposal = yaml.safe_load("model:" + said.split("\n\nmodel:", 1)[1])
    tree = yaml.safe_load((ROOT / "configs/gpt_64m.yaml").read_text())
    tree |= {"model": proposal["model"], "growth": proposal["growth"], "train": tree["train"] | proposal["train"]}
    (tmp_path / "grown.yaml").write_text(yaml.safe_dump(tree))
    return resolve_stages(load_config(tmp_path / "grown.yaml"), 1), proposal


@pytest.mark.parametrize(
    ("words", "sizes", "shares"),
    [
        ([], [1, 2, 4, 8], [0.1, 0.15, 0.15, 0.6]),
        (["layout.pp=2"], [2, 4, 8], [0.25, 0.15, 0.6]),
        (["model.n_layers=3", "model.d_model=576", "model.n_heads=9"], [1, 2, 3], [0.25, 0.15, 0.6]),
    ],
)
def test_the_tool_proposes_what_measured_best(tmp_path, words, sizes, shares):
    """Depth in doublings at full width, as `growth: auto` has it, for the FLOPs of the final size from scratch."""
    done = tool("configs/gpt_64m.yaml", "train.max_tokens=1e9", *words)
    assert done.returncode == 0, done.stderr
    stages, proposal = accepted(tmp_path, done.stdout)
    assert [stage.model.n_layers for stage in stages] == sizes
    final = load_config(ROOT / "configs/gpt_64m.yaml", words).model
    assert stages[-1].model == final
    assert {stage.model.d_model for stage in stages} == {final.d_model}
    assert proposal["growth"]["depth"] == "stack"
    budget = proposal["train"]["max_flops"]
    assert budget == pytest.approx(1e9 * flops_per_token(final, stages[-1].seq_len), rel=1e-3)
    caps = [stage.max_flops for stage in stages[:-1]]
    assert [*caps, budget - sum(caps)] == pytest.approx([share * budget for share in shares])
    planned = re.search(r"^predicted: loss (\S+), .* S = (\S+)$", done.stdout, re.MULTILINE)
    run = spend([Size(s.model, s.seq_len, ScalingLaw()) for s in stages], [share * budget for share in shares])
    assert planned.groups() == (f"{run.loss:.4f}", f"{run.saving:.2f}")


@pytest.mark.parametrize("ratio", [1, 5, 48])
def test_the_law_proposes_what_a_run_accepts(tmp_path, ratio):
    """And in a run by steps the final size gets its share of max_flops."""
    whole = load_config(ROOT / "configs/gpt_64m.yaml").model
    tokens = f"train.max_tokens={ratio * count_parameters(whole)}"
    done = tool("configs/gpt_64m.yaml", tokens, "--by-law")
    assert done.returncode == 0, done.stderr
    stages, proposal = accepted(tmp_path, done.stdout)
    assert stages[-1].model == whole
    spent, budget = 0.0, proposal["train"]["max_flops"]
    for stage in stages[:-1]:
        steps = math.ceil(stage.max_tokens / stage.tokens_per_step)
        spent += steps * stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len)
    step = stages[-1].tokens_per_step * flops_per_token(whole, stages[-1].seq_len)
    assert budget - spent > LAST_SHARE * budget - (len(stages) - 1) * step
    again = tool(tmp_path / "grown.yaml", "train.max_flops=null", tokens)
    assert list(table_of(again.stdout)) == [stage.model.d_model for stage in stages]
    assert "way" in again.stdout
    assert "kappa" not in again.stdout
    # What the plan's own caps are predicted to give is the plan.
    planned = re.search(r"^predicted: loss (\S+), .* S = (\S+)$", done.stdout, re.MULTILINE)
    told = tool(tmp_path / "grown.yaml").stdout
    capped = re.search(r"^by the caps of the file: loss (\S+), \S+ FLOPs, S = (\S+)$", told, re.MULTILINE)
    assert [float(x) for x in capped.groups()] == pytest.approx([float(x) for x in planned.groups()], abs=0.011)
    open_ended = tool(tmp_path / "grown.yaml", "growth.max_tokens=null")
    assert "predicted: loss" in open_ended.stdout
    assert "by the caps" not in open_ended.stdout


@pytest.mark.parametrize("budget", ["max_tokens", "max_steps"])
def test_a_run_that_grows_ends_with_its_own_budget(staged, budget):
    """Tokens of small sizes are cheap: the run takes fewer FLOPs than the final size from scratch would."""
    config = load_config(staged)
    stages, law = resolve_stages(config, 1), config.growth.trigger.scaling_law
    tokens = [float(stage.max_tokens) for stage in stages[:-1]]
    per_step = stages[0].tokens_per_step
    steps = round(config.train.max_tokens / per_step)
    words = [f"train.{budget}={config.train.max_tokens if budget == 'max_tokens' else steps}"]
    words += ["train.max_tokens=null"] * (budget == "max_steps")
    told = tool(staged, *words).stdout
    tokens.append((config.train.max_tokens if budget == "max_tokens" else steps * per_step) - sum(tokens))
    chosen = [Size(stage.model, stage.seq_len, law) for stage in stages]
    spent = [n * size.flops_per_token for n, size in zip(tokens, chosen, strict=True)]
    run = spend(chosen, spent)
    assert f"by the caps of the file: loss {run.loss:.4f}, {sum(spent):.3g} FLOPs, S = {run.saving:.2f}\n" in told
    assert sum(spent) < 0.9 * sum(tokens) * chosen[-1].flops_per_token


@pytest.mark.parametrize("budget", [["train.max_tokens=1e8"], ["train.max_tokens=null", "train.max_flops=3e15"]])
def test_a_budget_that_ends_too_soon_is_told(staged, budget):
    told = tool(staged, *budget).stdout
    assert re.search(r"^by the caps of the file: .*; the budget ends before the final size trains$", told, re.MULTILINE)


def test_a_free_plan_says_that_a_smaller_model_is_better(staged):
    few = ("configs/gpt_64m.yaml", "train.max_tokens=6e7")
    free, bound = tool(*few, "--by-law", "--free").stdout, tool(*few, "--by-law").stdout
    assert "a smaller" not in bound
    assert 512 in table_of(bound)
    assert "too large for so few tokens: the smaller one above is the better choice" in free
    assert 512 not in table_of(free)
    proposal = yaml.safe_load("model:" + free.split("\n\nmodel:", 1)[1])
    assert proposal["growth"]["stages"][-1]["d_model"] == max(table_of(free))
    kept = (staged, "train.max_tokens=1e7")  # the file's own sizes
    assert 512 in table_of(tool(*kept).stdout)
    assert 512 not in table_of(tool(*kept, "--free").stdout)


def law_runs(folder, **options):
    law = ScalingLaw(E=1.2, A=80.0, B=200.0, alpha=0.31, beta=0.337)
    points = enumerate(points_of(law))
    return [write_run(folder / f"run{i}", {"n_params": int(n)}, d, loss, **options) for i, (n, d, loss) in points]


def test_the_tool_fits_and_compares(staged, tmp_path):
    runs = law_runs(tmp_path, kind="ngpt", share=1.0)
    models = [stage.model for stage in resolve_stages(load_config(staged), 1)]
    old, new = ({"n_params": count_parameters(model)} for model in (models[0], models[-1]))
    row = {"event": "growth", "step": 4, "tokens": 5e8, "flops": 1, "old": old, "new": new, "loss_before": 4.5}
    grown = write_run(tmp_path / "grown", old, 2.25e9, 3.75, 3.5, growth=row | {"from_stage": 0, "to_stage": 1})
    done = tool(staged, "--fit", *runs, "--compare", grown)
    assert done.returncode == 0, done.stderr
    assert "fitted to 12 runs, 0.0000 nats rms" in done.stdout
    assert "law: L(N, D) = 1.2 + 80 / N^0.31 + 200 / D^0.337" in done.stdout
    table = table_of(done.stdout)
    assert table[models[0].d_model][-2:] == ["5.00e+08", "4.5000"]
    assert table[models[-1].d_model][-2:] == ["1.75e+09", "3.5000"]
    assert all(len(row) == (6 if d == models[1].d_model else 8) for d, row in table.items())


def refusal(*args):
    done = tool(*args)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_tool_refuses(staged, tmp_path):
    config, n = staged, {"n_params": 5}
    runs = law_runs(tmp_path)
    growth = {"event": "growth", "step": 4, "tokens": 5, "flops": 1, "old": n, "new": n, "loss_before": 4.5}
    bad = {
        "has grown": write_run(tmp_path / "a", n, 9, 3.5, growth=growth),
        "ended with a validation loss that is not finite": write_run(tmp_path / "b", n, 9, 3.5, None),
        "has no validation loss": write_run(tmp_path / "c", n, 9),
        "has not ended: 40% of its budget": write_run(tmp_path / "d", n, 9, 3.5, share=0.4),
        "is of model.kind = gpt": write_run(tmp_path / "e", n, 9, 3.5, kind="gpt"),
    }
    for problem, folder in bad.items():
        text = refusal(config, "--fit", *runs, folder)
        assert f"--fit = {folder}: {problem}" in text
    broken = write_run(tmp_path / "f", n, 9, 3.5)
    for said in ("[", "[" * 100_000, "a: \xff"):
        (broken / "config.yaml").write_text(said, encoding="latin-1")
        assert "is no configuration of a run" in refusal(config, "--fit", *runs, broken)
    (broken / "config.yaml").unlink()
    os.mkfifo(broken / "config.yaml")
    assert "is no configuration of a run" in refusal(config, "--fit", *runs, broken)
    assert "too few" in refusal(config, "--fit", *runs[:5])
    assert "--compare" in (text := refusal(config, "--compare", bad["has no validation loss"]))
    assert "has sizes of 0.00M parameters, and none of the plan's" in text
    assert "is no number of sizes" in refusal(config, "--max-stages", "0", "--propose")
    assert "is no number of ranks" in refusal(config, "--world", "0")
    assert "--max-stages = 3: is of sizes that a law chooses" in refusal(config, "--max-stages", "3")
    assert "--max-stages = 3: is of sizes that a law chooses" in refusal(config, "--max-stages", "3", "--propose")
    assert "--by-law = given: proposes sizes, and" in refusal(config, "--by-law")
    assert "--free = given: is of a plan by the law" in refusal(config, "--propose", "--free")
    assert tool(config, "--max-stages", "2", "--propose", "--by-law").returncode == 0
    flat = ("configs/gpt_64m.yaml", "train.max_tokens=1e9", "model.n_layers=1")
    assert "model.n_layers = 1: leaves nothing to double, with layout.pp = 1" in refusal(*flat)
    assert tool(*flat, "--by-law").returncode == 0
