"""What a report says of a run's data schedule: where each phase begins, and what its samples are."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any, get_args

from megabus.config.phases import KEYS
from megabus.errors import UserError
from megabus.report.history import MetricsRow, XAxis
from megabus.report.run_facts import RunFacts
from megabus.table import si

_IN_WORDS = {"seq_len": "length", "micro_batch_size": "micro batch", "global_batch_size": "batch"}


def check_phases(run: RunFacts) -> None:
    """Raise `UserError` for a row that no run writes."""
    for row in run.tracks.rows("phase"):
        for key in KEYS:
            value = row.get(key)
            numbers = value if key == "weights" and isinstance(value, list) else [value]
            if not numbers or not all(type(number) in (int, float) for number in numbers):
                problem = f"of the phase row of step {row['step']} is no number of samples"
                raise UserError(f"metrics: {key}", value, problem, f"mend {run.folder / 'metrics.jsonl'}")
    run.tracks.column("phase", "share")


def phase_table(run: RunFacts) -> list[dict[str, str]]:
    """A line per phase but the first, with its letter on the curves."""
    return [
        {
            "#": letters(number),
            "step": f"{row['step']:,}",
            "tokens": si(row["tokens"]),
            "of the budget": "–" if row.get("share") is None else f"{row['share']:.1%}",
        }
        | {key: _value(row, key) for key in KEYS}
        for number, row in enumerate(run.tracks.rows("phase"))
    ]


def phase_marks(run: RunFacts) -> list[dict[str, Any]]:
    """Where each phase but the first begins on every axis, its letter, and what it is called."""
    at = {x: run.tracks.at("phase", x) for x in get_args(XAxis)}
    rows = run.tracks.rows("phase")
    return [{x: float(at[x][i]) for x in at} | {"name": letters(i), "text": _text(row)} for i, row in enumerate(rows)]


def letters(number: int) -> str:
    """a to z for 0 to 25, then aa, ab, ..."""
    rest, last = divmod(number, len(ascii_lowercase))
    return (letters(rest - 1) if rest else "") + ascii_lowercase[last]


def _text(row: MetricsRow) -> str:
    """`weights 2:1, length 64`: what other samples have been taken from there on; all that is known of them where the
    row does not say what was before."""
    said = row.get("changed")
    changed: Sequence[str] = [key for key in KEYS if key in said] if isinstance(said, list) else KEYS
    return ", ".join(f"{_IN_WORDS.get(key, key)} {_value(row, key)}" for key in changed or KEYS)


def _value(row: MetricsRow, key: str) -> str:
    value = row[key]
    return ":".join(f"{weight:g}" for weight in value) if isinstance(value, list) else f"{value:,}"
