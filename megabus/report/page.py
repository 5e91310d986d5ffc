"""The page: one HTML file with all it needs inside, made by a template that escapes whatever comes from files."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

import megabus
from megabus.errors import UserError
from megabus.report.curves import PANELS, Curve, Panel, drawn, gain_panels, mean_panels
from megabus.report.figure import COLOURS
from megabus.report.looks import evaluation_table, extra_panels, sample_table, time_table
from megabus.report.phases import check_phases, phase_marks, phase_table
from megabus.report.pictures import RunCurves, drawings, plot_curves
from megabus.report.plots import plot_loss, stage_table
from megabus.report.run_facts import (
    GROWTH_WORDS,
    RunFacts,
    faults,
    final_figures,
    growth_marks,
    growth_table,
    read_run,
    shortened,
)

_FILES = Path(__file__).parent / "page"
_MOST_MARKS = 1000  # of a run's faults


@dataclass(frozen=True)
class Report:
    """All that the page and its pictures show. curves: by run."""

    runs: list[RunFacts]
    panels: list[Panel]
    curves: list[RunCurves]


def gather(run_dirs: Sequence[str | Path]) -> Report:
    """Read the runs. Raises `UserError` for what is none, or holds what no run writes."""
    runs = [read_run(run_dir, name) for run_dir, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    rows = [run.rows for run in runs]
    panels = [*PANELS, *mean_panels(rows), *extra_panels(rows), *gain_panels(rows)]
    return Report(runs, panels, [_curves(run, panels) for run in runs])


def _curves(run: RunFacts, panels: Sequence[Panel]) -> RunCurves:
    fault_marks = [_fault_mark(run, fault) for fault in faults(run) if fault["is_fault"]][:_MOST_MARKS]
    check_phases(run.tracks.rows("phase"), run.folder)
    return RunCurves(run.name, drawn(run.tracks, panels), growth_marks(run), phase_marks(run), fault_marks)


def write_report(run_dirs: Sequence[str | Path], out_dir: str | Path) -> Path:
    """Write `report.html`, and beside it `loss.png` and `curves.png`; the page. Raises `UserError` for runs that cannot
    be read (then nothing is written) and a folder that cannot be written."""
    report = gather(run_dirs)
    page = _write(report, Path(out_dir))
    plot_loss(run_dirs, page.with_name("loss.png"))
    plot_curves(report.panels, report.curves, page.with_name("curves.png"))
    return page


def write_page(run_dirs: Sequence[str | Path], out_dir: str | Path) -> Path:
    """`report.html` alone, which takes a tenth of the time; see `write_report`."""
    return _write(gather(run_dirs), Path(out_dir))


def _write(report: Report, out: Path) -> Path:
    page, partial = out / "report.html", out / "report.html.partial"
    html = render(report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # What is half of a pair of UTF-16 in a file's JSON has no bytes in UTF-8.
        partial.write_text(html, encoding="utf-8", errors="replace")
        partial.replace(page)
    except OSError as error:
        raise UserError("--out", out, f"cannot be written ({error.strerror})", "name a writable folder") from error
    return page


def names_of(run_dirs: Sequence[str | Path]) -> list[str]:
    """The last part of each path, and as many before it as tell it from the others."""
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError("run_dir", twice, "is given twice", "name each run once")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def render(report: Report) -> str:
    """The HTML."""
    runs, panels, curves = report.runs, report.panels, report.curves
    shown = [i for i in range(len(panels)) if any(curve for run in curves for curve in run.drawn.curves[i])]
    drawn_panels = drawings(panels, curves, shown)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = {
        "runs": [
            {
                "name": run.name,
                "growths": run.growths,
                "phases": run.phases,
                "faults": run.faults,
                "places": run.drawn.places,
                "curves": {panels[i].key: run.drawn.curves[i] for i in shown},
            }
            for run in curves
        ],
        "panels": [
            {
                "key": panels[i].key,
                "lines": [{"event": line.event, "label": line.label} for line in panels[i].lines],
            }
            for i in shown
        ],
        "drawings": _packed(drawn_panels),
    }
    return environment.get_template("report.html").render(
        version=megabus.__version__,
        runs=runs,
        n_colours=len(COLOURS),
        panels=[
            (
                panels[i],
                _in_words(runs, panels[i], [run.drawn.curves[i] for run in curves]),
                markupsafe.Markup(drawn_panels[panels[i].key]["tokens"]),  # matplotlib has escaped what it wrote
            )
            for i in shown
        ],
        missing=[panel for i, panel in enumerate(panels) if i not in shown],
        finals=_beside([final_figures(run) for run in runs]),
        stages=[stage_table(run.curve_rows, run.layouts) for run in runs],
        words=GROWTH_WORDS,
        growths=[shortened(growth_table(run)) for run in runs],
        phases=[shortened(phase_table(run)) for run in runs],
        times=_beside([time_table(run) for run in runs]),
        samples=[shortened(sample_table(run)) for run in runs],
        evaluations=[evaluation_table(run) for run in runs],
        faults=[shortened(faults(run)) for run in runs],
        config=_beside([run.config for run in runs]),
        environment=_beside([run.environment for run in runs]),
        data=data,
    )


def _packed(drawn_panels: dict[str, dict[str, str]]) -> str:
    """Less than a seventh of their length, as the drawings of a panel differ in little."""
    return base64.b64encode(gzip.compress(json.dumps(drawn_panels).encode(), mtime=0)).decode()


def _beside(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """(key, value of each run, whether they differ) in the order in which the keys come up, of what any run has."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in rows if set(values) != {"–"}]


def _fault_mark(run: RunFacts, fault: dict[str, Any]) -> dict[str, Any]:
    row = fault["row"]
    axes = ("tokens", "flops", "time")
    return {x: run.tracks.place(row, x) for x in axes} | {"text": f"{fault['what']} at step {row['step']:,}"}  # type: ignore[arg-type]


def _in_words(runs: Sequence[RunFacts], panel: Panel, curves: Sequence[list[Curve | None]]) -> str:
    """What a diagram shows, for whoever does not see it: where the main line of each run begins and ends."""
    sentences = []
    for run, of_run in zip(runs, curves, strict=True):
        main = next((curve for curve in reversed(of_run) if curve is not None and "y" in curve), None)
        values = [y for y in main["y"] if y is not None] if main else []
        if values:
            sentences.append(f"{run.name}: from {values[0]:.4g} to {values[-1]:.4g}")
    return f"{panel.title} ({panel.unit or 'no unit'}). " + "; ".join(sentences)
