"""Plan a growth before it is trained: sizes, when to grow, and what that is predicted to save.

  megabus plan --config run.yaml            # when its stages should grow; of a single size: stages for it, to paste
  megabus plan --config run.yaml --propose  # stages for the final size, whatever stages the file has
  megabus plan --config run.yaml --by-law   # stages in width and depth together, searched by a law of losses alone
  megabus plan --config run.yaml --free     # its stages, even if a smaller model is the better choice
  megabus plan --config run.yaml --fit runs/a runs/b ...           # with a law fitted to finished runs
  megabus plan --config runs/demo/config.yaml --compare runs/demo  # beside what happened

Nothing is trained, and nothing is written.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megabus.command import Parser
from megabus.config import RunConfig, Stage, load_config, resolve_stages
from megabus.config.read import yaml_value
from megabus.config.schema import ModelConfig, ScalingLaw
from megabus.errors import UserError
from megabus.kappa.laws import fit_law
from megabus.pathname import path_of, path_text
from megabus.plain_file import read_regular
from megabus.report.history import read_metrics

if TYPE_CHECKING:
    from megabus.kappa.planner import GrowthPlan

MAX_STAGES = 3


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus plan", description=__doc__)
    parser.add_argument("--config", type=path_of, required=True, help="YAML of a run; its last size is the final one")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--world", type=int, help="ranks of the run; the least that the layouts allow when left out")
    parser.add_argument("--propose", action="store_true", help="propose sizes, whatever stages the file has")
    parser.add_argument("--by-law", action="store_true", help="propose widths too, for which the law is cheapest")
    parser.add_argument("--max-stages", type=int, help=f"sizes that --by-law proposes at most ({MAX_STAGES})")
    parser.add_argument("--free", action="store_true", help="let a plan end before the final size, if that is cheaper")
    parser.add_argument(
        "--fit", type=path_text, nargs="+", metavar="RUN_DIR", help="fit the law to finished runs of fixed sizes"
    )
    parser.add_argument("--compare", type=path_text, metavar="RUN_DIR", help="a run of these stages: what happened")
    args = parser.parse_intermixed_args(argv)
    if args.world is not None and args.world < 1:
        raise UserError("--world", args.world, "is no number of ranks", "give 1 or more")
    if args.max_stages is not None and args.max_stages < 1:
        raise UserError("--max-stages", args.max_stages, "is no number of sizes", "give 1 or more")
    config = load_config(args.config, args.overrides)
    layouts = [config.layout, *(stage.layout for stage in config.growth.stages if stage.layout is not None)]
    world = args.world or math.lcm(*(each.tp * each.pp * (each.dp or 1) for each in layouts))
    stages = resolve_stages(config, world)
    proposing = len(stages) == 1 or args.propose
    if args.by_law and not proposing:
        problem = f"proposes sizes, and {args.config} has {len(stages)} of its own"
        raise UserError("--by-law", "given", problem, "leave it out, or add --propose")
    if args.max_stages is not None and not args.by_law:
        problem = "is of sizes that a law chooses"
        raise UserError("--max-stages", args.max_stages, problem, "leave it out, or add --by-law")
    doubling = proposing and not args.by_law  # `growth: auto`, about which no law is asked
    if args.free and doubling:
        problem = "is of a plan by the law, which this proposal is not"
        raise UserError("--free", "given", problem, "leave it out, or add --by-law")
    # They count parameters, for which torch is imported: not before the arguments are right.
    from megabus.kappa import proposal
    from megabus.model.cost import count_parameters

    happened = _happened(args.compare) if args.compare else []
    last = stages[-1]
    law = _fitted(args.fit, last.model.kind) if args.fit else config.growth.trigger.scaling_law
    tokens = proposal.tokens_of(config, last)
    print(f"law: L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3g} + {law.B:.4g} / D^{law.beta:.3g}")
    ratio = f"{tokens:.3g} tokens ({tokens / count_parameters(last.model):.2g} a parameter)"
    if doubling:
        asked, sections = proposal.doubled(config, last, tokens)
        plan = proposal.capped(asked.train, resolve_stages(asked, world), law)
        print(f"depth in doublings (`growth: auto`), at the FLOPs of the final size from scratch with {ratio}\n")
    else:
        plan = _planned(config, stages, tokens, law, args)
        sections = proposal.sections(plan) if proposing else {}
        print(f"to the loss of the final size from scratch with {ratio}\n")
    print(proposal.table(plan, proposal.matching(plan, happened, args.compare) if args.compare else {}))
    print(
        f"\npredicted: loss {plan.loss:.4f}, {plan.scratch_flops:.3g} FLOPs from scratch, {plan.flops:.3g} growing, "
        f"with {sum(stage.tokens for stage in plan.stages):.3g} tokens: S = {plan.saving:.2f}"
    )
    remedy = "fit it to more runs" if args.fit else "give runs of your own to --fit"
    if (guess := math.log(last.model.vocab_size)) < plan.stages[0].end:
        print(f"a guess reaches {guess:.2f}: this law is not of such sizes and budgets; {remedy}")
    if not proposing and proposal.ends_by_caps(stages):
        capped = proposal.capped(config.train, stages, law)
        ends = "" if capped.stages[-1].flops > 0 else "; the budget ends before the final size trains"
        print(
            f"by the caps of the file: loss {capped.loss:.4f}, {capped.flops:.3g} FLOPs, S = {capped.saving:.2f}{ends}"
        )
    if plan.stages[-1].model != last.model:
        print("by this law the final size is too large for so few tokens: the smaller one above is the better choice")
    if doubling:
        print(
            "the law knows nothing of the manner of growing: docs/growth_results.md says what was measured of this one"
        )
    if sections:
        print(f"\n{yaml.safe_dump(sections, sort_keys=False)}")
    return 0


def _planned(config: RunConfig, stages: Sequence[Stage], tokens: float, law: ScalingLaw, args: Namespace) -> GrowthPlan:
    """By the law: of sizes that it chooses, or of the file's."""
    from megabus.kappa import proposal
    from megabus.kappa.planner import plan_stages

    reach_final = not args.free
    try:
        if args.by_law:
            most = args.max_stages or MAX_STAGES
            return proposal.searched(config.train, stages[-1], tokens, law, most, reach_final=reach_final)
        sizes = proposal.sizes_under(law, config.train, stages)
        return plan_stages(sizes, sizes[-1].loss(tokens), reach_final=reach_final)
    except ValueError as error:
        remedy = "give the run fewer tokens, or a law of other runs"
        raise UserError("tokens", f"{tokens:.3g}", f"change nothing by this law: {error}", remedy) from error


def _fitted(run_dirs: Sequence[str], kind: str) -> ScalingLaw:
    """A law of finished runs of fixed sizes, all of one kind of model."""
    points = []
    for run_dir in run_dirs:
        rows = read_metrics(run_dir)
        evals = [row["loss"] for row in rows if row["event"] == "eval"]
        steps = [row for row in rows if row["event"] == "step"]
        if any(row["event"] == "growth" for row in rows):
            raise UserError("--fit", run_dir, "has grown: a law is of fixed sizes", "leave it out")
        if not evals or (rows[0]["event"], rows[0]["step"]) != ("start", 0):
            raise UserError("--fit", run_dir, "has no validation loss", "give finished runs")
        share = steps[-1].get("share") if steps else None
        if share is not None and share < 1:
            problem = f"has not ended: {share:.0%} of its budget is spent"
            raise UserError("--fit", run_dir, problem, "wait for its end, or leave it out")
        if evals[-1] is None:  # an earlier loss is not what the run ended with
            raise UserError("--fit", run_dir, "ended with a validation loss that is not finite", "leave it out")
        other = _kind(run_dir)
        if other not in (None, kind):
            problem = f"is of model.kind = {other}, and the plan is for {kind}: a law is of one kind"
            raise UserError("--fit", run_dir, problem, f"give runs of {kind}")
        points.append((_n_params("--fit", run_dir, rows[0].get("sizes")), rows[-1]["tokens"], evals[-1]))
    fitted = fit_law(points)
    print(f"fitted to {fitted.n_points} runs, {fitted.rms:.4f} nats rms")
    return fitted.law


def _kind(run_dir: str) -> str | None:
    """model.kind of a run that has kept its configuration."""
    path = Path(run_dir) / "config.yaml"
    try:
        tree = yaml_value(read_regular(path, links=True).decode())
        return ModelConfig(**tree["model"]).kind
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"is no configuration of a run ({type(error).__name__})"
        raise UserError("--fit", path, problem, "restore it, or leave the run out") from error


def _n_params(option: str, run_dir: str, sizes: dict[str, int] | None) -> int:
    n_params = (sizes or {}).get("n_params", 0)
    if n_params < 1:
        raise UserError(option, run_dir, "does not tell its number of parameters", "give a run with its whole metrics")
    return n_params


def _happened(run_dir: str) -> list[tuple[int, float, float | None]]:
    """(parameters, tokens, last loss) of every size that a run has had."""
    rows, found, begun = read_metrics(run_dir), [], 0
    if (rows[0]["event"], rows[0]["step"]) != ("start", 0):
        raise UserError("--compare", run_dir, "does not tell its first sizes", "give a run with its whole metrics")
    for row in rows:
        if row["event"] == "growth":
            n_params = _n_params("--compare", run_dir, row["old"])
            found.append((n_params, row["tokens"] - begun, row.get("loss_before")))
            begun = row["tokens"]
    losses = [row["loss"] for row in rows if row["event"] == "eval"]
    growths = [row for row in rows if row["event"] == "growth"]
    sizes = growths[-1]["new"] if growths else rows[0].get("sizes")
    found.append((_n_params("--compare", run_dir, sizes), rows[-1]["tokens"] - begun, losses[-1] if losses else None))
    return found
