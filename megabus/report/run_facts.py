"""What a report says of a run in words and figures: what it ended with, how it grew, what went wrong, on what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from megabus.config.read import yaml_value
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, read_regular
from megabus.report.curves import Tracks
from megabus.report.history import (
    RETURNS,
    SPIKE,
    MetricsRow,
    XAxis,
    curve_rows,
    layouts_that_ran,
    read_rows,
    skipped_spikes,
    skips,
    what_counts,
)
from megabus.report.plots import growth_text, short_sizes, stage_table, why
from megabus.table import clock, si

MOST_ROWS = 100  # of a table; what lies between the first and the last half is left to metrics.jsonl
_GROWTH_NUMBERS = ("loss_before", "loss_after", "unit_error", "bytes_sent", "bytes_kept")  # or null


@dataclass
class RunFacts:
    """A run, read. rows: those that count; written: all rows of the file, in order."""

    name: str
    folder: Path
    written: list[MetricsRow]
    rows: list[MetricsRow]
    tracks: Tracks
    config: dict[str, str]
    environment: dict[str, str]

    @property
    def curve_rows(self) -> list[MetricsRow]:
        """What `megabus.report.plots` draws and tabulates."""
        return curve_rows(self.rows)

    @property
    def layouts(self) -> dict[int, list[str]]:
        """Of each stage those that it ran under."""
        return layouts_that_ran(self.written)

    @property
    def growths(self) -> list[MetricsRow]:
        return self.tracks.rows("growth")


def read_run(run_dir: str | Path, name: str) -> RunFacts:
    """Read a run directory. Raises `UserError` for what is none, or holds what no run writes."""
    folder = Path(run_dir)
    written = read_rows(run_dir)
    path = folder / "metrics.jsonl"
    rows = what_counts(written)
    if not curve_rows(rows):
        raise UserError("metrics", path, "is empty", "wait for the first logged step")
    run = RunFacts(name, folder, written, rows, Tracks(rows, path), _config(folder), _environment(written))
    for key in _GROWTH_NUMBERS:
        run.tracks.column("growth", key)
    return run


def _config(folder: Path) -> dict[str, str]:
    """`dotted.key: value` of config.yaml; empty where there is none."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        text = read_regular(path, links=True).decode("utf-8")
        value = yaml_value(text)  # first: to scan what nests too deeply takes minutes
        # A run writes none, and a few lines of them name a part more often than anyone could read.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it holds an alias of YAML, which no run writes")
        return dict(_flat("", value))
    except (OSError, NotPlainError, ValueError, yaml.YAMLError) as error:
        raise UserError("config", path, f"cannot be read ({error})", "mend or remove it") from error


def _environment(written: Sequence[MetricsRow]) -> dict[str, str]:
    """As it was at the last start."""
    found = [row["environment"] for row in written if isinstance(row.get("environment"), dict)]
    if not found:
        return {}
    shown = dict(_flat("", found[-1]))
    memory = found[-1].get("memory_bytes")
    if isinstance(memory, int):
        shown = {("memory" if key == "memory_bytes" else key): value for key, value in shown.items()}
        shown["memory"] = f"{memory / 2**30:.1f} GiB"
    return shown | {"starts": str(len(found))}


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}".lstrip("."), inner)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(f"{key}.{number}", inner)
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value)) or "–"
    else:
        yield key, "–" if value is None else str(value)


# ---- figures


def final_figures(run: RunFacts) -> dict[str, str]:
    """What the run ended with, or where it is."""
    tracks = run.tracks
    last = run.curve_rows[-1] if run.curve_rows else {}
    share = _last(tracks.column("step", "share"))
    losses, unit = tracks.column("eval", "loss"), tracks.column("step", "unit_error")
    train, mfu = tracks.column("step", "loss"), tracks.column("step", "mfu")
    memory = tracks.column("memory", "max_bytes")
    stages = stage_table(run.curve_rows, run.layouts)
    hours = tracks.place(last, "time") if last else 0.0
    tokens = last.get("tokens", 0)
    return {
        "state": "not begun"
        if share is None
        else "finished"
        if share >= 1
        else f"{math.floor(100 * share)}% of its budget",
        "last sizes": stages[-1][1] if len(stages) > 1 else "–",
        "parameters": stages[-1][2] if len(stages) > 1 else "–",
        "growths": str(len(run.growths)),
        "steps": f"{last.get('step', 0):,}",
        "tokens": si(tokens),
        "FLOPs": f"{last.get('flops', 0):.3g}",
        "time in steps and growths": clock(3600 * hours),
        "validation loss, last": _figure(_last(losses), "{:.4f}"),
        "validation loss, best": _figure(_reduce(np.nanmin, losses), "{:.4f}"),
        "bits per byte, last": _figure(_last(tracks.column("eval", "bits_per_byte")), "{:.4f}"),
        "training loss, last steps": _figure(_reduce(np.nanmean, train[-max(1, len(train) // 50) :]), "{:.4f}"),
        "tokens/s over all": _figure(tokens / hours / 3600 if hours else None, "{:,.0f}"),
        "MFU, mean": _figure(_reduce(np.nanmean, mfu), "{:.1%}"),
        "stall of growths": _figure(sum(float(row.get("stall_s") or 0) for row in run.growths), "{:.1f} s"),
        "sent by growths": _bytes(sum(row.get("bytes_sent") or 0 for row in run.growths)),
        "largest error of a unit row": _figure(_reduce(np.nanmax, unit), "{:.1e}"),
        "peak memory of a rank": _bytes(_reduce(np.nanmax, memory)),
        "spikes skipped": str(skipped_spikes(run.written)),
        "profile": _profile(run),
        "faults": str(sum(fault["is_fault"] for fault in faults(run))),
    }


def _profile(run: RunFacts) -> str:
    """Where the last look at single steps lies; a start that went on later did not look once more."""
    found = [row for row in run.written if row["event"] == "profile"]
    return f"steps {found[-1].get('first')} to {found[-1].get('last')}: {found[-1].get('folder')}" if found else "–"


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _reduce(how: Any, values: np.ndarray) -> float | None:
    return float(how(values)) if np.isfinite(values).any() else None


def _figure(number: Any, form: str) -> str:
    return "–" if not isinstance(number, int | float) or not math.isfinite(number) else form.format(number)


def _bytes(number: float | None) -> str:
    if number is None:
        return "–"
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


# ---- growths and faults


GROWTH_WORDS = ("sizes", "parameters", "layout", "why")  # columns of `growth_table` that may be broken


def growth_table(run: RunFacts) -> list[dict[str, str]]:
    """A line per growth, with its number on the curves."""
    return [
        {
            "#": str(number),
            "step": f"{row['step']:,}",
            "tokens": si(row["tokens"]),
            "sizes": f"{short_sizes(row['old'])} → {short_sizes(row['new'])}",
            "parameters": f"{si(row['old'].get('n_params'))} → {si(row['new'].get('n_params'))}",
            "layout": f"{row.get('old_layout', '–')} → {row.get('new_layout', '–')}",
            "why": why(row),
            "loss before": _figure(row.get("loss_before"), "{:.6f}"),
            "loss after": _figure(row.get("loss_after"), "{:.6f}"),
            "stall": _figure(row.get("stall_s"), "{:.2f} s"),
            "sent": _bytes(row.get("bytes_sent")),
            "kept": _bytes(row.get("bytes_kept")),
            "unit rows": _figure(row.get("unit_error"), "{:.1e}"),
        }
        for number, row in enumerate(run.growths, 1)
    ]


def growth_marks(run: RunFacts) -> list[dict[str, Any]]:
    """Where each growth lies on every axis, its number, and what it is called."""
    at = {x: run.tracks.at("growth", x) for x in get_args(XAxis)}
    return [
        {x: float(at[x][i]) for x in at} | {"name": str(i + 1), "text": growth_text(row)}
        for i, row in enumerate(run.growths)
    ]


def faults(run: RunFacts) -> list[dict[str, Any]]:
    """All that went wrong, and every start after the first, in order, what was taken back included: `row`, `what`,
    `details`, and whether it `is_fault`: a start that goes on where the last one had come to lost nothing, be it of
    a run that had ended, with a larger budget or without, or that was asked to stop."""
    return [{"is_fault": True} | found for found in _faults(run.written)]


def _faults(written: Sequence[MetricsRow]) -> Iterator[dict[str, Any]]:
    last = 0  # the step that the run had come to
    once = {id(row) for row in skips(written)}
    for row in written:
        if row["event"] == "skip" and id(row) in once:
            given = (
                f"loss {_figure(row.get('loss'), '{:.4f}')}, gradient norm {_figure(row.get('grad_norm'), '{:.3g}')}"
            )
            what = "skipped spike" if row.get("reason") == SPIKE else "skipped step"
            if what == "skipped spike":
                most = (_figure(row.get("loss_limit"), "{:.4f}"), _figure(row.get("grad_norm_limit"), "{:.3g}"))
                given += f", where at most {most[0]} and {most[1]} are usual"
            yield {"row": row, "what": what, "details": f"no update: {given}"}
        elif row["event"] == "save" and row.get("error") is not None:
            yield {"row": row, "what": "failed save", "details": str(row["error"])}
        elif row["event"] == "tasks" and row.get("error") is not None:
            details = f"tasks ({row.get('when', '–')}): {row['error']}"
            yield {"row": row, "what": "failed evaluation", "details": details}
        elif row["event"] == "resume":
            back = f"to step {row['step']:,}, from step {last:,}"
            if row.get("reason") in RETURNS:
                yield {"row": row, "what": "rollback", "details": f"{back}, past the data that failed"}
            else:
                lost = f" ({last - row['step']:,} steps not saved)" if last > row["step"] else ""
                layouts = f"{row.get('saved_layout', '–')} → {row.get('layout', '–')}"
                changes = "".join(f"; {change}" for change in row.get("changes") or [])
                details = f"{back}{lost}; {layouts}{changes}"
                yield {"row": row, "what": "resume", "details": details, "is_fault": last > row["step"]}
            last = row["step"]
        if row["event"] in ("step", "skip"):
            last = row["step"]


def shortened(table: list[Any]) -> tuple[list[Any], list[Any], int]:
    """The first and the last rows of a long table, and how many lie between."""
    if len(table) <= MOST_ROWS:
        return table, [], 0
    half = MOST_ROWS // 2
    return table[:half], table[-half:], len(table) - 2 * half
