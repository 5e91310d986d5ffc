"""Is κ fooled while a grown model heals? Curves with a known end, each with a bump, and what κ makes of them.

    python -m benchmarks.healing                 # the table of docs/growth.md
    python -m benchmarks.healing --siblings      # other bumps, exponents and caps

A stage's validations are L(i) = 2 + (20 + i)^-0.3 + h exp(-i / τ) and noise, i from 0 to its cap. For every height h:
the share of the law's own improvement over the stage that had been made when κ grew the model (median and least over
seeds), in how many seeds the prediction then was out by more than 3 of its own std, and how many ended at the cap.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megabus.command import Parser, run
from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan

HEIGHTS = (0.0, 0.07, 0.15, 0.3)
FLOPS, TOKENS = 6e6, 1000  # of an interval between validations


@dataclass(frozen=True)
class Healing:
    """A stage of `cap` intervals that began after `begin` of them. h in nats, tau in intervals."""

    h: float
    tau: float = 4.5
    b: float = 0.3
    cap: int = 60
    begin: int = 20
    noise: float = 0.005

    def curve(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(cap + 1,) losses of the law alone, and those that are validated."""
        i = np.arange(self.cap + 1)
        law = 2.0 + (self.begin + i) ** -self.b
        noise = self.noise * np.random.default_rng(seed).standard_normal(len(i))
        return law, law + self.h * np.exp(-i / self.tau) + noise


@dataclass(frozen=True)
class Grown:
    """share: of the law's improvement, 1 where the cap ended the stage; z: the prediction's error over its std."""

    share: float
    z: float
    by_kappa: bool


def grow(stage: Healing, seed: int, trigger: KappaConfig) -> Grown:
    """When κ grows out of a stage."""
    law, losses = stage.curve(seed)
    watch = KappaMonitor(trigger)
    caps = (stage.cap * TOKENS, None)
    watch.start_stage(StageSpan(1, 10, trigger.kappa, stage.begin * TOKENS, stage.begin * FLOPS, *caps))
    for i, loss in enumerate(losses[:-1]):
        decision = watch.observe((stage.begin + i) * TOKENS, (stage.begin + i) * FLOPS, float(loss))
        if decision.grow:
            view = decision.view
            assert view is not None
            assert view.mp is not None
            assert view.mp_std is not None
            return Grown((law[0] - law[i]) / (law[0] - law[-1]), abs(view.mp - law[-1]) / view.mp_std, True)
    return Grown(1.0, 0.0, False)


def row(name: str, stage: Healing, heights: Sequence[float], seeds: int, trigger: KappaConfig) -> str:
    cells = []
    for h in heights:
        found = [grow(replace(stage, h=h), seed, trigger) for seed in range(seeds)]
        shares = [one.share for one in found]
        outside, capped = sum(one.z > 3 for one in found), sum(not one.by_kappa for one in found)
        cells.append(f"{statistics.median(shares):.0%} ({min(shares):.0%}), {outside}, {capped}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    parser = Parser(prog="python -m benchmarks.healing", description=__doc__)
    parser.add_argument("--siblings", action="store_true", help="other bumps, exponents and caps")
    parser.add_argument("--seeds", type=int, default=40, help="(%(default)s)")
    args = parser.parse_args()
    stages = {"τ 4.5": Healing(0.0)}
    if args.siblings:
        stages = {f"τ {tau}": Healing(0.0, tau=tau) for tau in (2, 4, 5, 8, 12)}
        stages |= {f"exponent {b}": Healing(0.0, b=b) for b in (0.1, 0.5, 0.8)}
        stages |= {f"cap {cap}": Healing(0.0, cap=cap) for cap in (30, 120)}
        stages |= {f"after {begin}": Healing(0.0, begin=begin) for begin in (5, 60)}
    print(f"median (least) share, seeds out by more than 3 std, seeds ended by the cap; of {args.seeds} seeds")
    print(f"| stage | {' | '.join(f'h {h:g}' for h in HEIGHTS)} |\n|{'---|' * (len(HEIGHTS) + 1)}")
    for name, stage in stages.items():
        print(row(name, stage, HEIGHTS, args.seeds, KappaConfig()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
