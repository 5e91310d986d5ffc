"""What a report says of a run's data schedule: where each phase begins, and what its samples are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, get_args

from megabus.config.phases import KEYS
from megabus.errors import UserError
from megabus.report.history import MetricsRow, XAxis, numbers
from megabus.table import si

if TYPE_CHECKING:
    from megabus.report.run_facts import RunFacts

_IN_WORDS = {"seq_len": "length", "micro_batch_size": "micro batch", "global_batch_size": "batch"}


def check_phases(rows: Sequence[MetricsRow], folder: Path) -> None:
    """Raise `UserError` for a `phase` row that no run writes. folder: the run's, named in errors."""
    for row in rows:
        for key in KEYS:
            value = row.get(key)
            counts = value if key == "weights" and isinstance(value, list) else [value]
            if not counts or not all(type(count) in (int, float) for count in counts):
                problem = f"of the phase row of step {row['step']} is no number of samples"
                raise UserError(f"metrics: {key}", value, problem, f"mend {folder / 'metrics.jsonl'}")
    numbers(rows, "share", folder / "metrics.jsonl")


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
    return [
        {x: float(at[x][i]) for x in at} | {"name": letters(i), "text": phase_text(row)} for i, row in enumerate(rows)
    ]


def letters(number: int) -> str:
    """a to z for 0 to 25, then aa, ab, ..."""
    rest, last = divmod(number, len(ascii_lowercase))
    return (letters(rest - 1) if rest else "") + ascii_lowercase[last]


def phase_text(row: MetricsRow) -> str:
    """`weights 2:1, length 64`: what other samples have been taken from there on; all that is known of them where the
    row does not say what was before."""
    said = row.get("changed")
    changed: Sequence[str] = [key for key in KEYS if key in said] if isinstance(said, list) else KEYS
    return ", ".join(f"{_IN_WORDS.get(key, key)} {_value(row, key)}" for key in changed or KEYS)


def _value(row: MetricsRow, key: str) -> str:
    value = row[key]
    return ":".join(f"{weight:g}" for weight in value) if isinstance(value, list) else f"{value:,}"
