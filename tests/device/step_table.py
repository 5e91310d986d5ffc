"""What cases ask of a device, as a table; and the file of what a step may ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.device.cases import Case, Seen

BOUNDS = Path(__file__).with_name("bounds.yaml")
HEAD = """# Kernels and bytes of the last watched step of each case, two micro batches and the optimizer, at most: what
# `python -m tests.device --write` found. Raise one only for what is worth it.
"""


def lines(seen: Mapping[Case, Seen]) -> Iterable[str]:
    yield "| case | what | waits | of them in megabus | kernels | MB read and written | messages |"
    yield "|---|---|---|---|---|---|---|"
    for case, found in seen.items():
        for what, asked in found.asked.items():
            ours = sum(count for (_, place), count in asked.waits.items() if place.startswith("megabus/"))
            row = (
                case,
                what,
                asked.waits.total(),
                ours,
                asked.kernels,
                f"{asked.bytes / 1e6:.1f}",
                len(asked.messages),
            )
            yield f"| {' | '.join(map(str, row))} |"


def write(seen: Mapping[Case, Seen]) -> None:
    bounds: dict[str, Any] = {}
    for case, found in seen.items():
        steps = {what: asked for what, asked in found.asked.items() if what.startswith("step")}
        bounds[str(case)] = {what: {"kernels": asked.kernels, "bytes": asked.bytes} for what, asked in steps.items()}
    BOUNDS.write_text(HEAD + yaml.safe_dump(bounds, sort_keys=False, width=120))
