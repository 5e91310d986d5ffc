"""Plan a growth before it is trained: sizes, when to grow, and what that is predicted to save.

megabus plan run.yaml            # when the file's stages should grow; of a single size: stages for it, to paste
megabus plan run.yaml --propose  # stages for the final size, whatever stages the file has
megabus plan run.yaml --free     # even if a smaller model is the better choice
megabus plan run.yaml --fit runs/a runs/b ...           # with a law fitted to finished runs
megabus plan runs/demo/config.yaml --compare runs/demo  # beside what happened
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megabus.command import Parser
from megabus.config import RunConfig, Stage, load_config, resolve_stages
from megabus.config.pair import sizes_of
from megabus.config.schema import ModelConfig, ScalingLaw, TrainConfig
from megabus.errors import UserError
from megabus.kappa.laws import fit_law
from megabus.report.history import read_metrics

if TYPE_CHECKING:  # the planner counts parameters, which imports torch: only where it is needed
    from megabus.kappa.planner import GrowthPlan

MAX_STAGES = 3


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus plan", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML of a run; its last size is the final one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--world", type=int, help="ranks of the run; the least that the layouts allow when left out")
    parser.add_argument("--propose", action="store_true", help="propose sizes, whatever stages the file has")
    parser.add_argument("--max-stages", type=int, help=f"sizes that a proposal has at most ({MAX_STAGES})")
    parser.add_argument("--free", action="store_true", help="let a plan end before the final size, if that is cheaper")
    parser.add_argument("--fit", nargs="+", metavar="RUN_DIR", help="fit the law to finished runs of fixed sizes")
    parser.add_argument("--compare", metavar="RUN_DIR", help="a run of these stages: what happened")
    args = parser.parse_intermixed_args(argv)
    if args.world is not None and args.world < 1:
        raise UserError("--world", args.world, "is no number of ranks", "give 1 or more")
    if args.max_stages is not None and args.max_stages < 1:
        raise UserError("--max-stages", args.max_stages, "is no number of sizes", "give 1 or more")
    config = load_config(args.config, args.overrides)
    layouts = [config.layout, *(stage.layout for stage in config.growth.stages if stage.layout is not None)]
    world = args.world or math.lcm(*(each.tp * each.pp * (each.dp or 1) for each in layouts))
    stages = resolve_stages(config, world)
    last = stages[-1]
    proposing = len(stages) == 1 or args.propose
    if args.max_stages is not None and not proposing:
        problem = f"is of a proposal, and {args.config} has {len(stages)} sizes of its own"
        raise UserError("--max-stages", args.max_stages, problem, "leave it out, or add --propose")
    from megabus.kappa.planner import Size, spend
    from megabus.model.cost import count_parameters

    happened = _happened(args.compare) if args.compare else []
    law = _fitted(args.fit, last.model.kind) if args.fit else config.growth.trigger.scaling_law
    tokens = _tokens(config, last)
    print(f"law: L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3g} + {law.B:.4g} / D^{law.beta:.3g}")
    try:
        plan = _planned(stages, tokens, law, args.max_stages or MAX_STAGES, proposing, reach_final=not args.free)
    except ValueError as error:
        remedy = "give the run fewer tokens, or a law of other runs"
        raise UserError("tokens", f"{tokens:.3g}", f"change nothing by this law: {error}", remedy) from error
    ratio = tokens / count_parameters(last.model)
    print(f"to the loss of the final size from scratch with {tokens:.3g} tokens ({ratio:.2g} a parameter)\n")
    print(_table(plan, _matching(plan, happened, args.compare) if args.compare else {}))
    print(
        f"\npredicted: loss {plan.loss:.4f}, {plan.scratch_flops:.3g} FLOPs from scratch, {plan.flops:.3g} growing, "
        f"with {sum(stage.tokens for stage in plan.stages):.3g} tokens: S = {plan.saving:.2f}"
    )
    remedy = "fit it to more runs" if args.fit else "give runs of your own to --fit"
    if (guess := math.log(last.model.vocab_size)) < plan.stages[0].end:
        print(f"a guess reaches {guess:.2f}: this law is not of such sizes and budgets; {remedy}")
    spent = None if proposing else _by_caps(config.train, stages)
    if spent is not None:
        loss, saving = spend([Size(stage.model, stage.seq_len, law) for stage in stages], spent)
        ends = "" if spent[-1] > 0 else "; the budget ends before the final size trains"
        print(f"by the caps of the file: loss {loss:.4f}, {sum(spent):.3g} FLOPs, S = {saving:.2f}{ends}")
    if plan.stages[-1].model != last.model:
        print("by this law the final size is too large for so few tokens: the smaller one above is the better choice")
    if proposing:
        print(f"\n{_yaml(plan)}")
    return 0


def _planned(
    stages: Sequence[Stage], tokens: float, law: ScalingLaw, max_stages: int, proposing: bool, *, reach_final: bool
) -> GrowthPlan:
    """A proposal for the last stage's size, or the plan of all of the stages' sizes."""
    from megabus.kappa.planner import Size, plan_growth, plan_stages

    last = stages[-1]
    if proposing:
        tp, pp = last.layout.tp, last.layout.pp
        return plan_growth(last.model, last.seq_len, tokens, law, max_stages, tp, pp, reach_final=reach_final)
    sizes = [Size(stage.model, stage.seq_len, law) for stage in stages]
    return plan_stages(sizes, sizes[-1].loss(tokens), reach_final=reach_final)


def _by_caps(train: TrainConfig, stages: Sequence[Stage]) -> list[float] | None:
    """FLOPs of every stage of the run that the file asks for, if caps alone end its stages; None where one has none."""
    from megabus.model.cost import flops_per_token

    left = {
        "tokens": train.max_tokens or math.inf,
        "steps": train.max_steps or math.inf,
        "flops": train.max_flops or math.inf,
    }
    spent: list[float] = []
    for stage in stages:
        cost = flops_per_token(stage.model, stage.seq_len)
        tokens = min(left["tokens"], left["steps"] * stage.tokens_per_step, left["flops"] / cost)
        if stage is not stages[-1]:
            cap = min(stage.max_tokens or math.inf, (stage.max_flops or math.inf) / cost)
            if math.isinf(cap):
                return None
            tokens = min(tokens, cap)
        tokens = max(0.0, tokens) if tokens * cost > 1e-9 * sum(spent) else 0.0  # no crumbs of rounding
        spent.append(tokens * cost)
        left["tokens"] -= tokens
        left["steps"] -= tokens / stage.tokens_per_step
        left["flops"] -= tokens * cost
    return spent


def _tokens(config: RunConfig, last: Stage) -> float:
    """Tokens that the final size from scratch would get of the run's budget."""
    from megabus.model.cost import flops_per_token

    train, cost = config.train, flops_per_token(last.model, last.seq_len)
    budgets = [
        float(train.max_tokens) if train.max_tokens else math.inf,
        train.max_flops / cost if train.max_flops else math.inf,
        float(train.max_steps * last.tokens_per_step) if train.max_steps else math.inf,
    ]
    return min(budgets)


def _fitted(run_dirs: Sequence[str], kind: str) -> ScalingLaw:
    """A law of finished runs of fixed sizes, all of one kind of model."""
    points = []
    for run_dir in run_dirs:
        rows = read_metrics(run_dir)
        evals = [row["loss"] for row in rows if row["event"] == "eval"]
        steps = [row for row in rows if row["event"] == "step"]
        if any(row["event"] == "growth" for row in rows):
            raise UserError("--fit", run_dir, "has grown: a law is of fixed sizes", "leave it out")
        if not evals or rows[0]["event"] != "start":
            raise UserError("--fit", run_dir, "has no validation loss", "give finished runs")
        if steps and steps[-1].get("share", 1.0) < 1:
            problem = f"has not ended: {steps[-1]['share']:.0%} of its budget is spent"
            raise UserError("--fit", run_dir, problem, "wait for its end, or leave it out")
        if evals[-1] is None:  # an earlier loss is not what the run ended with
            raise UserError("--fit", run_dir, "ended with a validation loss that is not finite", "leave it out")
        other = _kind(run_dir)
        if other not in (None, kind):
            problem = f"is of model.kind = {other}, and the plan is for {kind}: a law is of one kind"
            raise UserError("--fit", run_dir, problem, f"give runs of {kind}")
        points.append((rows[0]["sizes"]["n_params"], rows[-1]["tokens"], evals[-1]))
    fitted = fit_law(points)
    print(f"fitted to {fitted.n_points} runs, {fitted.rms:.4f} nats rms")
    return fitted.law


def _kind(run_dir: str) -> str | None:
    """model.kind of a run that has kept its configuration."""
    path = Path(run_dir) / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ModelConfig(**tree["model"]).kind
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        problem = f"is no configuration of a run ({type(error).__name__})"
        raise UserError("--fit", path, problem, "restore it, or leave the run out") from error


def _happened(run_dir: str) -> list[tuple[int, float, float | None]]:
    """(parameters, tokens, last loss) of every size that a run has had."""
    rows, found, begun = read_metrics(run_dir), [], 0
    if rows[0]["event"] != "start":
        raise UserError("--compare", run_dir, "does not tell its first sizes", "give a run with its whole metrics")
    for row in rows:
        if row["event"] == "growth":
            found.append((row["old"]["n_params"], row["tokens"] - begun, row["loss_before"]))
            begun = row["tokens"]
    losses = [row["loss"] for row in rows if row["event"] == "eval"]
    growths = [row for row in rows if row["event"] == "growth"]
    sizes = growths[-1]["new"] if growths else rows[0]["sizes"]
    found.append((sizes["n_params"], rows[-1]["tokens"] - begun, losses[-1] if losses else None))
    return found


def _matching(
    plan: GrowthPlan, happened: Sequence[tuple[int, float, float | None]], run_dir: str
) -> dict[int, tuple[float, float | None]]:
    """What happened, by the parameters of the size."""
    from megabus.model.cost import count_parameters

    found = {size: (tokens, loss) for size, tokens, loss in happened}
    planned = [count_parameters(stage.model) for stage in plan.stages]
    if not found.keys() & set(planned):
        ours, theirs = (", ".join(f"{n / 1e6:.2f}M" for n in sizes) for sizes in (planned, found))
        problem = f"has sizes of {theirs} parameters, and none of the plan's {ours}"
        raise UserError("--compare", run_dir, problem, "name the config.yaml of that run, and no --propose")
    return found


def _table(plan: GrowthPlan, happened: dict[int, tuple[float, float | None]]) -> str:
    from megabus.model.cost import count_parameters

    header = f"{'sizes':<28} {'params':>8} {'tokens':>9} {'FLOPs':>9} {'share':>6} {'loss at end':>11} {'way':>6}"
    lines = [header + (f"   {'tokens':>9} {'loss at end':>11}  (what happened)" if happened else "")]
    for stage in plan.stages:
        model = stage.model
        sizes = f"d{model.d_model} L{model.n_layers} H{model.n_heads} ff{model.d_ff}"
        n, way = count_parameters(model), "–" if stage.way is None else f"{stage.way:.2f}"
        line = f"{sizes:<28} {n / 1e6:>7.2f}M {stage.tokens:>9.2e} {stage.flops:>9.2e} {stage.flops / plan.flops:>6.0%}"
        line += f" {stage.end:>11.4f} {way:>6}"
        if n in happened:
            tokens, loss = happened[n]
            line += f"   {tokens:>9.2e} {'–' if loss is None else f'{loss:.4f}':>11}"
        lines.append(line)
    return "\n".join([*lines, "way: share of the way from a size's first loss to its floor, with endless tokens"])


def _yaml(plan: GrowthPlan) -> str:
    """The sections of a configuration that follow the plan; every stage's tokens as its cap."""
    models = [stage.model for stage in plan.stages]
    caps = [max(1, int(stage.tokens)) for stage in plan.stages]
    final = models[-1]
    first, *grown = [sizes_of(model) for model in models]
    for sizes, cap in zip(grown[:-1], caps[1:], strict=False):  # the last stage ends with the run
        sizes["max_tokens"] = cap
    tree: dict[str, object] = {"model": final.model_dump(exclude_unset=True) | first}
    tree["train"] = {"max_flops": float(f"{plan.flops:.4g}"), "max_tokens": None, "max_steps": None}
    if grown:
        tree["growth"] = {"moments": "grow", "max_tokens": caps[0], "stages": grown}
    return yaml.safe_dump(tree, sort_keys=False)
