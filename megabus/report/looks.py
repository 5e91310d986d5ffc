"""What a report says of samples and evaluations, and of the time that a run took for what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megabus.errors import UserError
from megabus.report.curves import Line, Panel
from megabus.report.history import MetricsRow
from megabus.report.run_facts import RunFacts
from megabus.table import clock, si, visible

OF_GROWTHS = ("before growth", "after growth", "end")


def extra_panels(runs: Sequence[Sequence[MetricsRow]]) -> list[Panel]:
    """A panel for every further token file and for every score of a task that any of the runs has measured."""
    found = [row for rows in runs for row in rows]
    names = dict.fromkeys(name for row in found for name in _numbers_of(row, "evaluation", "loss"))
    scores = dict.fromkeys(name for row in found for name in _numbers_of(row, "tasks", "scores"))
    return [
        *(Panel(f"extra:{n}", f"Loss on {n}", "nats per token", (Line("evaluation", f"loss|{n}", n),)) for n in names),
        *(Panel(f"task:{n}", n, "score", (Line("tasks", f"scores|{n}", n),)) for n in scores),
    ]


def _numbers_of(row: MetricsRow, event: str, key: str) -> dict[str, float]:
    value = row.get(key) if row["event"] == event else None
    return value if isinstance(value, dict) else {}


def evaluation_table(run: RunFacts) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each measure): what was measured before and after each growth, side by side, and at the
    end."""
    moments: dict[tuple[int, str], dict[str, str]] = {}
    grown = {row["step"] for row in run.growths}
    for row in run.rows:
        when = row.get("when")
        if when == "step" and row["step"] in grown:
            when = "before growth"  # the same weights, which are not measured twice
        if row["event"] not in ("evaluation", "tasks") or when not in OF_GROWTHS:
            continue
        shown = moments.setdefault((row["step"], str(when)), {})
        for name, loss in _numbers_of(row, "evaluation", "loss").items():
            shown[f"{name}: nats per token"] = _figure(loss)
        for name, bits in _numbers_of(row, "evaluation", "bits_per_byte").items():
            shown[f"{name}: bits per byte"] = _figure(bits)
        for name, score in _numbers_of(row, "tasks", "scores").items():
            shown[name] = _figure(score)
        if row["event"] == "tasks" and row.get("error") is not None:
            shown["tasks"] = f"failed: {row['error']}"
    measures = dict.fromkeys(name for shown in moments.values() for name in shown)
    order = sorted(moments, key=lambda moment: (moment[0], OF_GROWTHS.index(moment[1])))
    header = ["measure", *(f"step {step:,}, {when}" for step, when in order)]
    return header, [[name, *(moments[moment].get(name, "–") for moment in order)] for name in measures]


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def sample_table(run: RunFacts) -> list[dict[str, Any]]:
    """A line for each time that samples were written: step, tokens, and texts as (prompt, what follows it). Raises
    `UserError` for a row that no run writes."""
    found = []
    for row in run.rows:
        if row["event"] != "sample":
            continue
        samples = row.get("samples")
        if not isinstance(samples, list) or not all(map(_is_sample, samples)):
            problem = f"of the sample row of step {row['step']} is no list of texts"
            raise UserError("metrics: samples", samples, problem, f"mend {run.folder / 'metrics.jsonl'}")
        texts = [(sample["prompt"], visible(sample["text"])) for sample in samples]
        found.append({"step": f"{row['step']:,}", "tokens": si(row.get("tokens")), "texts": texts})
    return found


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("prompt", "text"))


# ---- where the time went

PARTS = {  # what: the event and the key of its seconds
    "validations": ("eval", "seconds"),
    "growths": ("growth", "stall_s"),
    "waiting for saves": ("save", "stall_s"),
    "samples": ("sample", "seconds"),
    "evaluations of token files": ("evaluation", "seconds"),
    "weights written for tasks": ("tasks", "write_s"),
    "waiting for tasks at the end": ("tasks", "wait_s"),
}


def time_table(run: RunFacts) -> dict[str, str]:
    """What a run took for what, with its share; what it did not do is left out, and so are starts."""
    seconds = {"steps": 3600 * _hours(run)}
    for part, (event, key) in PARTS.items():
        values = [row.get(key) for row in run.rows if row["event"] == event]
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers:
            seconds[part] = float(sum(numbers))
    whole = sum(seconds.values())
    return {part: f"{clock(spent)} ({spent / whole:.1%})" for part, spent in seconds.items()} if whole > 0 else {}


def _hours(run: RunFacts) -> float:
    """In steps alone: the time axis counts the stalls of growths too."""
    rows = run.tracks.rows("step")
    if not rows:
        return 0.0
    stalls = sum(float(row.get("stall_s") or 0.0) for row in run.growths) / 3600
    return max(0.0, run.tracks.place(rows[-1], "time") - stalls)
