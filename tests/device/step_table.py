"""What cases ask of a device, as a table; and the file of what a step may ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.device.cases import Asked, Case, Seen

BOUNDS = Path(__file__).with_name("bounds.yaml")
HEAD = """# Kernels and bytes of the last watched step of each case, two micro batches and the optimizer, at most: what
# `python -m tests.device --write` found. Raise one only for what is worth it.
"""


def lines(seen: Mapping[Case, Seen]) -> Iterable[str]:
    yield "| case | what | waits | of them in megabus | kernels | MB read and written | messages |"
    yield "|---|---|---|---|---|---|---|"
    for case, found in seen.items():
        for what, asked in found.asked.items():
            row = (
                case,
                what,
                _waits(asked),
                _own_waits(asked),
                asked.kernels,
                f"{asked.bytes / 1e6:.1f}",
                len(asked.messages),
            )
            yield f"| {' | '.join(map(str, row))} |"


def summary(seen: Mapping[Case, Seen]) -> Iterable[str]:
    """A row for each layout: of all its ranks that were looked at, the most."""
    yield "| layout | step: waits, megabus's own | kernels | MB | after a growth: kernels | growth: waits | kernels | \
snapshot: waits |"
    yield "|---|---|---|---|---|---|---|---|"
    alike: defaultdict[str, list[dict[str, Asked]]] = defaultdict(list)
    for case, found in seen.items():
        tp, pp, dp = case.layout
        how = ["recompute"] * case.recompute + ["sequence parallel"] * case.sequence_parallel
        alike[", ".join([f"TP{tp}/PP{pp}/DP{dp} {case.precision}", f"ZeRO-{case.zero_stage}", *how])].append(
            found.asked
        )
    for name, ranks in alike.items():

        def most(what: str, of: Callable[[Asked], float], ranks: list[dict[str, Asked]] = ranks) -> str:
            found = [of(asked[what]) for asked in ranks if what in asked]
            return f"{max(found):.6g}" if found else "–"

        row = (
            name,
            f"{most('step', _waits)}, {most('step', _own_waits)}",
            most("step", lambda asked: asked.kernels),
            most("step", lambda asked: round(asked.bytes / 1e6, 1)),
            most("step after growth", lambda asked: asked.kernels),
            most("growth", _waits),
            most("growth", lambda asked: asked.kernels),
            most("snapshot", _waits),
        )
        yield f"| {' | '.join(row)} |"


def _waits(asked: Asked) -> int:
    return asked.waits.total()


def _own_waits(asked: Asked) -> int:
    return sum(count for (_, place), count in asked.waits.items() if place.startswith("megabus/"))


def write(seen: Mapping[Case, Seen]) -> None:
    bounds: dict[str, Any] = {}
    for case, found in seen.items():
        steps = {what: asked for what, asked in found.asked.items() if what.startswith("step")}
        bounds[str(case)] = {what: {"kernels": asked.kernels, "bytes": asked.bytes} for what, asked in steps.items()}
    BOUNDS.write_text(HEAD + yaml.safe_dump(bounds, sort_keys=False, width=120))
