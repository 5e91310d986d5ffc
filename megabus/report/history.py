"""The rows of a run's `metrics.jsonl`, as written, and which of them count.

One JSON object a line, told apart by `event`, each with `step` and all but `save` with the run's totals tokens and
flops: `step` and `eval` rows add loss (nats per token; step rows tokens_per_s too); `growth` rows from_stage, to_stage,
the sizes `old` and `new`, old_layout, new_layout, loss_before, loss_after, reason and stall_s; an optional `start` row
stage, sizes and layout, so that a run that has not grown is known. See `train/loop.py` for the others: `gains`,
`memory`, `skip`, `save`, `resume`, and `phase`, whose samples hold from there on; `train/samples.py` for `sample`; and
`train/evaluations.py` for `evaluation` and `tasks`, whose rows come when the scores are there and lie at the step that
they are of.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megabus.errors import UserError
from megabus.plain_file import DEEPEST, NotPlainError, check_regular, deeper_than

MetricsRow = dict[str, Any]
XAxis = Literal["flops", "tokens", "time"]

NOT_FINITE, SPIKE = "not finite", "spike"  # the reasons of a `skip` row, and of a `resume` row that is a return
RETURNS = (NOT_FINITE, SPIKE)
_CURVES = ("start", "step", "eval", "growth")
# What rows must say for all that is drawn and tabled of them, and what they may leave out or call null.
_AMOUNTS = ("tokens", "flops")  # of the curves' rows
_Kinds = dict[str, type]
_GROWTH: _Kinds = {"old": dict, "new": dict, "reason": str, "from_stage": int, "to_stage": int, "stall_s": float}
_GROWTH_MAY: _Kinds = {"loss_before": float, "loss_after": float, "old_layout": str, "new_layout": str}
_START_MAY: _Kinds = {"sizes": dict, "layout": str, "stage": int}
_NAMES: dict[type, str] = {float: "number", int: "whole number", dict: "section", str: "text"}
MOST = 2**63  # beyond which no whole number of a run lies
_CHUNK = 4096  # lines that are parsed at once, so that their keys are the same objects: half the memory


def read_rows(run_dir: str | Path) -> list[MetricsRow]:
    """All rows of a run in the order they were written. Raises `UserError` where there is no file of them, a line is no
    JSON object with an event and a step, or a row of a curve has a value that no run writes. A last line without its
    newline is still being written and is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not os.path.lexists(path) or not os.fspath(run_dir):  # without a name it would be the working directory
        there, named = os.path.lexists(run_dir), os.fspath(run_dir) or "''"
        problem = "does not exist" if not there else "holds no metrics.jsonl" if path.parent.is_dir() else "is a file"
        raise UserError("run_dir", named, problem, "name the directory of a megabus run")
    try:
        check_regular(path, links=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except NotPlainError as error:
        raise UserError("metrics", path, str(error), "name the directory of a megabus run") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("metrics", path, f"cannot be read ({error})", "name the directory of a megabus run") from error
    rows: list[MetricsRow] = []
    for first in range(0, len(lines), _CHUNK):
        rows += _parsed(path, first, lines[first : first + _CHUNK])
    _check(rows, path)
    return rows


def _check(rows: Sequence[MetricsRow], path: Path) -> None:
    of = {event: [row for row in rows if row["event"] == event] for event in (*_CURVES, "resume")}
    for key in _AMOUNTS:
        numbers(curve_rows(rows), key, path, required=True)
    numbers(of["step"] + of["eval"], "loss", path)
    for key in ("tokens_per_s", "share"):
        numbers(of["step"], key, path)
    for row in of["start"] + of["resume"]:
        _check_kinds(row, _START_MAY | dict.fromkeys(_AMOUNTS, float), path, may=True)
        _check_sizes(row, row.get("sizes") or {}, path)
    for row in of["growth"]:
        _check_kinds(row, _GROWTH, path)
        _check_kinds(row, _GROWTH_MAY, path, may=True)
        for sizes in (row["old"], row["new"]):
            _check_sizes(row, sizes, path)


def _check_kinds(row: MetricsRow, kinds: _Kinds, path: Path, may: bool = False) -> None:
    for key, kind in kinds.items():
        value = row.get(key)
        if not (may and value is None) and not _is(value, kind):
            raise _wrong(row, key, value, _NAMES[kind], path)


def _check_sizes(row: MetricsRow, sizes: dict[str, Any], path: Path) -> None:
    for size, value in sizes.items():
        if not _is(value, int):
            raise _wrong(row, size, value, "size", path)


def _is(value: Any, kind: type) -> bool:
    if type(value) is int:
        return kind in (int, float) and -MOST <= value < MOST
    return type(value) is kind


def _wrong(row: MetricsRow, key: str, value: Any, what: str, source: object) -> UserError:
    problem = f"of the {row['event']} row of step {row['step']} is no {what}"
    return UserError(f"metrics: {key}", value, problem, f"mend {source}")


def numbers(rows: Sequence[MetricsRow], key: str, source: object, required: bool = False) -> list[float | None]:
    """The values of a key, which may be nested as `outer|inner`. Raises `UserError` for what is no number; None is one
    unless it is `required`, and so are NaN and infinities, which JSON allows."""
    values: list[Any] = [_value(row, key) for row in rows] if "|" in key else [row.get(key) for row in rows]
    allowed = {int, float} if required else {int, float, type(None)}
    whole = [value for value in values if type(value) is int]
    good = set(map(type, values)) <= allowed and (not whole or (min(whole) >= -MOST and max(whole) < MOST))
    if not good or (required and not all(map(math.isfinite, values))):
        for row, value in zip(rows, values, strict=True):
            if (required or value is not None) and not (_is(value, float) and (not required or math.isfinite(value))):
                raise _wrong(row, key, value, "number", source)
    return values


def _value(row: MetricsRow, key: str) -> Any:
    """What is nested as `outer|inner`; None where there is none."""
    outer, _, inner = key.partition("|")
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else value


def _parsed(path: Path, first: int, lines: list[str]) -> list[MetricsRow]:
    try:
        rows = json.loads(f"[{','.join(lines)}]")
        if len(rows) == len(lines) and all(map(_is_row, rows, lines)):
            return rows
    except (ValueError, RecursionError):
        pass  # the line that is none is named below
    rows = []
    for number, line in enumerate(lines, first + 1):
        try:
            row = json.loads(line)
            if not _is_row(row, line):
                raise TypeError
        except (ValueError, TypeError, RecursionError) as error:
            problem = f"line {number} is no metrics row ({type(error).__name__})"
            raise UserError("metrics", path, problem, "remove the line") from error
        rows.append(row)
    return rows


def _is_row(row: Any, line: str) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("event"), str) and _is(row.get("step"), int)):
        return False
    if line.count("[") + line.count("{") > DEEPEST and deeper_than(row, DEEPEST):
        raise RecursionError(f"nests deeper than {DEEPEST} levels")
    return True


def what_counts(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """A `resume` row takes back all rows of later steps: the resumed run writes them again. Where nothing is left
    before it, the log starts with it."""
    counted: list[MetricsRow] = []
    for row in rows:
        if row["event"] == "resume":
            counted = [earlier for earlier in counted if earlier["step"] <= row["step"]]
            if not counted and all(row.get(key) is not None for key in _AMOUNTS):
                counted = [row | {"event": "start"}]
        else:
            counted.append(row)
    return counted


def skips(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The `skip` rows of a run, those that a return to a checkpoint took back included: they happened. A start does
    the steps behind its checkpoint anew, and tells their skips once more, so that what was told before does not count.
    rows: all of the file."""
    counted: list[MetricsRow] = []
    by_step: dict[int, int] = {}  # how many there were when the run was last at a step
    for row in rows:
        if row["event"] == "resume" and row.get("reason") not in RETURNS:
            del counted[by_step.get(row["step"], 0) :]
        if row["event"] == "skip":
            counted.append(row)
        if row["event"] in ("step", "skip"):
            by_step[row["step"]] = len(counted)
    return counted


def not_logged(rows: Sequence[MetricsRow]) -> str | None:
    """A line on the steps before a log begins: of a run that goes on from a checkpoint that was copied without it.
    rows: those that count."""
    start = next((row for row in rows if row["event"] == "start"), None)
    if start is None or start["step"] < 1:
        return None
    growths = start.get("stage", 0)
    message = f" and {growths} growth{'s' * (growths > 1)}" if growths else ""
    return f"not in this log: the first {start['step']} step(s){message}, which came before the run was resumed here"


def skipped_spikes(rows: Sequence[MetricsRow]) -> int:
    """Of these the finite spikes."""
    return sum(row.get("reason") == SPIKE for row in skips(rows))


def layouts_that_ran(rows: Sequence[MetricsRow]) -> dict[int, list[str]]:
    """Of each stage the layouts under which those of its steps were computed that count, in order. rows: all of the
    file. A run that is started again may have another layout from then on."""
    ran: list[tuple[int, int, str | None]] = []
    layout: str | None = None  # where there is no start row, the growth out of the first stage tells
    stage = 0
    for row in rows:
        if row["event"] == "growth":
            ran = [(step, at, how or row.get("old_layout")) for step, at, how in ran]
            layout, stage = row.get("new_layout"), row["to_stage"]
        elif row["event"] in ("start", "resume"):
            layout, stage = row.get("layout", layout), row.get("stage", stage)
            ran = [earlier for earlier in ran if earlier[0] <= row["step"]]
        elif row["event"] == "step":
            ran.append((row["step"], stage, layout))
    found: dict[int, list[str]] = {}
    for _, at, how in ran:
        if how is not None and found.setdefault(at, [how])[-1] != how:
            found[at].append(how)
    return found


def curve_rows(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The `start`, `step`, `eval` and `growth` rows."""
    return [row for row in rows if row["event"] in _CURVES]


def read_metrics(run_dir: str | Path) -> list[MetricsRow]:
    """The `start`, `step`, `eval` and `growth` rows of a run that count, in order. Raises `UserError` where there are
    none (see also `read_rows`)."""
    return read_curves(run_dir)[0]


def read_curves(run_dir: str | Path) -> tuple[list[MetricsRow], list[MetricsRow]]:
    """The rows of `read_metrics`, and the `phase` rows that count."""
    counted, path = what_counts(read_rows(run_dir)), Path(run_dir) / "metrics.jsonl"
    rows, phases = curve_rows(counted), [row for row in counted if row["event"] == "phase"]
    if not rows:
        raise UserError("metrics", path, "is empty", "wait for the first logged step")
    for key in ("tokens", "flops"):
        numbers(phases, key, path, required=True)
    return rows, phases


def places(rows: Sequence[MetricsRow], x: XAxis) -> list[float]:
    """Each row's place on the axis. Time, in hours, is tokens over the logged speed, plus growth stalls.

    A step row without tokens_per_s (the first, say) adds no time.
    """
    if x != "time":
        return [float(row[x]) for row in rows]
    hours, tokens, found = 0.0, 0, []
    for row in rows:
        if row["event"] == "step" and row["tokens"] > tokens:
            hours += (row["tokens"] - tokens) / (row.get("tokens_per_s") or math.inf) / 3600
            tokens = row["tokens"]
        hours += (row.get("stall_s") or 0.0) / 3600
        found.append(hours)
    return found
