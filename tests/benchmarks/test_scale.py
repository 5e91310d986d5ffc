"""The rows of what a large world costs one rank, on the demo's growth."""

from __future__ import annotations

import numpy as np

from benchmarks import scale
from megabus.growth.plan import Plan
from megabus.testing import plan_bytes


def test_rows_of_scale(monkeypatch):
    rows = scale.scale(1, small=True)
    assert {row.ratio for row in rows if row.other == scale.FEWEST} == {1.0}
    assert {row.ratio for row in rows if row.unit == "groups"} == {1.0}
    assert all(row.met for row in rows if row.target)
    least = plan_bytes.least

    def fewer(plan: Plan, kinds: tuple[str, ...]) -> plan_bytes.Least:
        found = least(plan, kinds)
        return plan_bytes.Least(np.floor(found.taken / 1.1), found.given, found.kept, found.forwarding)

    monkeypatch.setattr(plan_bytes, "least", fewer)  # the control: schedules that move a tenth more than they must
    config = scale.load_config(scale.SMALL[0][0], [])
    missed = [row.one for row in scale.bytes_of_growths(config, scale.SMALL[0][1]) if row.met is False]
    assert set(missed) == {"the busiest rank, taken in"}
