"""How far a step moves each kind of parameter, at every size of a run, before and after its growths.

Learning rates transfer where a step does the same at every size: where a row turns by the same angle, and where |dW h|
is the same share of |W h|. Every stage is trained for some steps from scratch, and grown from the one before, in this
process alone and at the peak rate: without schedule, layout, boost, rewarm and settle. Nothing is written.

  megabus coord-check --config configs/demo.yaml
  megabus coord-check --config configs/demo.yaml 'optimizer.transfer={d_model: 64, n_layers: 1, steps: 1000}' --steps 40
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megabus.command import Parser
from megabus.config import RunConfig, load_config, resolve_stages
from megabus.config.after_growth import AFTER_GROWTH
from megabus.config.schema import LayoutConfig
from megabus.engine.startup import prepare_environment, start_distributed, stop_distributed
from megabus.errors import UserError
from megabus.pathname import path_of
from megabus.table import aligned

if TYPE_CHECKING:
    from megabus.testing.coord_check import StateRow


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus coord-check", description=__doc__)
    parser.add_argument("--config", type=path_of, required=True, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--steps", type=int, default=20, help="of each size, the last quarter measured (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 1:
        raise UserError("--steps", args.steps, "measures nothing", "give 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE", os.environ["WORLD_SIZE"], "is of many ranks", "start it without a launcher")
    config = _alone(load_config(args.config, args.overrides))
    stages = resolve_stages(config, 1)
    prepare_environment(config.train.deterministic)
    start_distributed()
    from megabus.data.sources import open_sources
    from megabus.testing.coord_check import coordinates
    from megabus.train.horizon import at_horizon

    rows = coordinates(config, at_horizon(config, stages), open_sources(config, stages), args.steps)
    print(tables(rows, args.steps))
    left_out = [f"growth.{name}" for name in AFTER_GROWTH if getattr(config.growth, name) is not None]
    if left_out:
        print(f"without what a run does after its growths by {', '.join(left_out)}")
    stop_distributed()
    return 0


def _alone(config: RunConfig) -> RunConfig:
    """The run on one rank."""
    stages = [stage.model_copy(update={"layout": None}) for stage in config.growth.stages]
    growth = config.growth.model_copy(update={"stages": stages})
    return config.model_copy(update={"layout": LayoutConfig(), "growth": growth})


def tables(rows: Sequence[StateRow], steps: int) -> str:
    """Peak rates, angles and changes, a line for each stage and state."""
    from megabus.testing.coord_check import ROLES, measured

    matrices = ROLES[:-1]
    parts: list[tuple[str, Sequence[str], Callable[[StateRow, str], float | None]]] = [
        ("peak learning rate", matrices, lambda row, role: row.lr.get(role)),
        ("angle that a row turns by in a step, radians", matrices, lambda row, role: row.moved[role].angle),
        ("|dW h| / |W h| of a step; of gains |dg| / |g|", ROLES, lambda row, role: row.moved[role].change),
    ]
    said = []
    for title, roles, value in parts:
        shown = [row for row in rows if row.state == "from scratch"] if title.startswith("peak") else rows
        lines = [[*_state(row), *(_number(value(row, role)) for role in roles)] for row in shown]
        said.append(f"{title}\n{aligned(['sizes', 'state', *roles], lines, left={0, 1})}")
    few = f"{measured(steps)} of {steps} steps"
    return "\n\n".join(said) + f"\n\njust grown: the first {few} after a growth; else the last {few}"


def _number(value: float | None) -> str:
    """A dash stands for what the stage has none of, or none that was not 0."""
    return "-" if value is None else f"{value:.4g}"


def _state(row: StateRow) -> tuple[str, str]:
    model = row.stage.model
    return f"d{model.d_model} L{model.n_layers}", row.state
