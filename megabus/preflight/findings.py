"""The findings of a preflight, a row a check, as rank 0 prints them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megabus.errors import UserError
from megabus.table import aligned

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """What a check found. A row with an error is a refusal; a warning stops nothing."""

    check: str
    text: str
    warning: bool = False
    error: UserError | None = None
    skipped: bool = False

    @property
    def state(self) -> str:
        if self.error is not None:
            return "refused"
        return "warning" if self.warning else "skipped" if self.skipped else "ok"


def refused(check: str, error: UserError) -> Finding:
    return Finding(check, f"{error.key} = {error.value}: {error.problem}", error=error)


def warned(check: str, text: str) -> Finding:
    return Finding(check, text, warning=True)


def render(rows: Sequence[Finding], seconds: float) -> str:
    """The table, and a line that sums it up."""
    found = [(row.check, row.state, " ".join(row.text.split())) for row in rows]
    count = Counter(row.state for row in rows)
    summary = f"{count['refused'] or 'nothing'} refused, {count['warning'] or 'no'} warning(s)"
    table = aligned(("check", "state", "found"), found, {0, 1, 2})
    return f"{table}\npreflight: {len(rows)} checks in {seconds:.1f} s, {summary}"


def odd_ones(values: Sequence[H]) -> tuple[H, list[int]]:
    """The commonest value (of several the one of the lowest rank), and the ranks that have another."""
    common = Counter(values).most_common(1)[0][0]
    return common, [rank for rank, value in enumerate(values) if value != common]


def size_text(n_bytes: float) -> str:
    """`12.3 MiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(n_bytes, 1), 1024)), len(units) - 1)
    return f"{n_bytes / 1024**power:.{min(power, 1)}f} {units[power]}"
