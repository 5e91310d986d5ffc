"""The curves of runs, drawn: a picture of all panels, and the drawings that the page holds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from megabus.report.curves import Curve, Drawn, Panel
from megabus.report.figure import COLOURS, FAINT, GRID, INK, STYLE, as_they_are, picture
from megabus.report.history import XAxis
from megabus.report.plots import dress_curves, short, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3  # of the picture
_CLIPPED = ("loss", "bits", "target")  # panels whose first values would flatten the rest
_FAULT = "#b3261e"
_SIZE = (370, 225)  # of the page's drawings, in units of their view box
_WIDE = (1000, 320)  # of the loss, but in a narrow window
VIEWS: list[tuple[XAxis, bool]] = [(x, log) for log in (False, True) for x in get_args(XAxis)]  # that a page offers
_THEME = {  # the page's colours, which are others in the dark
    **{colour: f"var(--run{number})" for number, colour in enumerate(COLOURS)},
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--rule)",
    _FAULT: "var(--fault)",
}


@dataclass(frozen=True)
class RunCurves:
    """A run as it is drawn. growths, phases, faults: a mark each, with its place on every axis, its `text`, and, but of
    faults, the `name` that it has in a table."""

    name: str
    drawn: Drawn
    growths: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    faults: list[dict[str, Any]]


@dataclass(frozen=True)
class View:
    """The stretch of the horizontal axis that every panel shows: from low to high, in hours where it is time.

    unit: of time; scale: from hours to it.
    """

    x: XAxis
    log: bool
    low: float
    high: float
    unit: str = "hours"
    scale: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.x} log" if self.log else self.x


def view_of(runs: Sequence[RunCurves], x: XAxis, log: bool = False) -> View:
    """What all runs cover; linear axes begin at zero."""
    every = [at for run in runs for places in run.drawn.places.values() for at in places[x] if at is not None]
    seen = [at for at in every if at > 0] if log else [*every, 0.0]
    low, high = min(seen, default=1.0), max(seen, default=1.0)
    if low == high:
        high = low + (abs(low) or 1.0)
    if x != "time":
        return View(x, log, low, high)
    unit, scale = ("hours", 1.0) if high > 2 else ("minutes", 60.0) if high > 1 / 30 else ("seconds", 3600.0)
    return View(x, log, low, high, unit, scale)


# ---- one panel


def draw_panel(
    axes: Axes, panel: Panel, runs: Sequence[RunCurves], curves: Sequence[list[Curve | None]], view: View
) -> None:
    """Draw the panel's curves (by run, then by line) and the runs' growths, phases and faults, in place of what
    was there."""
    from matplotlib.ticker import LogLocator

    for artist in [*axes.lines, *axes.collections, *axes.texts]:
        artist.remove()
    shown = limits(panel, curves)
    axes.set_yscale("log" if panel.log and shown else "linear")
    dress_curves(axes, view.x, view.log, view.unit)
    axes.set_xlim(view.low * view.scale, view.high * view.scale)
    if not view.log:  # as many as have room
        letters = 6 if view.x == "flops" else 5
        axes.locator_params(axis="x", nbins=max(2, int(_points(axes) / letters / _font_size(axes))))
    if shown is None or (view.log and not any(_positive(run, view.x) for run in runs)):
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_ylim(*shown)
    if not panel.log:
        axes.locator_params(axis="y", nbins=7 if panel.key == "loss" else 5)
    elif shown[1] >= 5 * shown[0]:  # powers of ten alone would be one or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_minor_formatter(lambda value, _: short(value) if shown[1] < 5 * shown[0] else "")
    for number, (run, of_run) in enumerate(zip(runs, curves, strict=True)):
        _draw_marks(axes, run, number, view)
        for line, curve in zip(panel.lines, of_run, strict=True):
            if curve is not None:
                at = _numbers(run.drawn.places[line.event][view.x], view.log) * view.scale
                values = {key: _numbers(curve[key], panel.log) for key in curve}
                is_training = len(runs) == 1 and panel.has_two_colours and line.event == "step"
                colour = COLOURS[1 if is_training else number % len(COLOURS)]
                _draw_curve(axes, at, values, line.shape, number, colour)
    _name_marks(axes, runs, view, full=panel.key == "loss")


def _draw_curve(
    axes: Axes, at: np.ndarray, values: dict[str, np.ndarray], shape: str, number: int, colour: str
) -> None:
    own = _of_run(number) | {"color": colour}
    if "low" in values:
        axes.fill_between(at, values["low"], values["high"], alpha=0.2, linewidth=0, **own)
        return
    axes.plot(at, values["y"], **_MANNER[shape], **own)
    there = np.isfinite(at) & np.isfinite(values["y"])
    beside = np.concatenate([[False], there, [False]])
    alone = there & ~beside[:-2] & ~beside[2:]  # of these a line shows nothing
    if alone.any():
        axes.plot(at[alone], values["y"][alone], ".", markersize=4, **own)


_MANNER: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "thin": {"linewidth": 1.1},
    "range": {"linewidth": 0.8, "alpha": 0.4},
    "dashed": {"linewidth": 1.3, "linestyle": (0, (4, 2))},
}


def _of_run(number: int) -> dict[str, Any]:
    """A run's colour, and the gid by which the page finds what belongs to it."""
    return {"color": COLOURS[number % len(COLOURS)], "gid": f"run{number}"}


def _draw_marks(axes: Axes, run: RunCurves, number: int, view: View) -> None:
    """Upright lines at growths and phases, triangles on the axis at faults."""
    across = axes.get_xaxis_transform()
    for marks, dashes in ((run.growths, (3, 3)), (run.phases, (1, 2))):
        begun = _apart(axes, _numbers([mark[view.x] for mark in marks], view.log) * view.scale)
        if len(begun):
            xs = np.stack([begun, begun, np.full_like(begun, np.nan)], axis=1).ravel()
            lines: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, dashes), "alpha": 0.8}
            axes.plot(xs, [0.0, 1.0, np.nan] * len(begun), transform=across, **_of_run(number), **lines)
    failed = _apart(axes, _numbers([mark[view.x] for mark in run.faults], view.log) * view.scale)
    if len(failed):
        shape: dict[str, Any] = {"marker": "^", "linestyle": "", "markersize": 5, "color": _FAULT}
        axes.plot(failed, [0.0] * len(failed), transform=across, clip_on=False, gid=f"run{number}", zorder=3, **shape)


def _apart(axes: Axes, xs: np.ndarray) -> np.ndarray:
    """One of those that would fall on the same point of the drawing: of a thousand growths a page stays small."""
    xs = xs[np.isfinite(xs)]
    at = axes.transData.transform(np.stack([xs, np.ones_like(xs)], axis=1))[:, 0]
    return xs[np.unique(np.round(at * 72 / float(axes.figure.dpi)), return_index=True)[1]]


def _name_marks(axes: Axes, runs: Sequence[RunCurves], view: View, full: bool) -> None:
    """Texts over growths and phases where there is room, if wanted, then names alone, then nothing; in a crowd growths
    come first."""
    width, size = _points(axes), _font_size(axes)
    transform = axes.transData + axes.transAxes.inverted()

    def at_of(mark: dict[str, Any]) -> float:
        return float(transform.transform((mark[view.x] * view.scale, 0))[0]) * width

    labels = sorted(
        (at_of(mark), kind, number, mark["name"], mark["text"])
        for number, run in enumerate(runs)
        for kind, marks in enumerate((run.growths, run.phases))
        for mark in marks
        if mark[view.x] > 0 or not view.log
    )
    ends = [*(at for at, *_ in labels[1:]), width]
    taken: list[tuple[float, float]] = []
    for (at, _, number, name, text), end in sorted(zip(labels, ends, strict=False), key=lambda pair: pair[0][1]):
        whole = f"{name}: {text}"
        shown = whole if full and 0.62 * size * len(whole) < end - at else name
        left, own = at, 0.62 * size * (len(shown) + 1)
        for begin, stop in sorted(taken):  # beside the label of a mark that is close, of another run perhaps
            left = stop if begin < left + own and left < stop else left
        if left > at + 2 * size:  # a crowd: a label here would stand too far from its line
            continue
        place: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "xycoords": "axes fraction"}
        axes.annotate(shown, (left / width, 1), fontsize=size, parse_math=False, **_of_run(number), **place)
        taken.append((left, left + own))


def _points(axes: Axes) -> float:
    """The width in points."""
    return float(axes.bbox.width * 72 / float(axes.figure.dpi))


def _font_size(axes: Axes) -> float:
    return float(axes.xaxis.label.get_fontsize())


def limits(panel: Panel, curves: Sequence[list[Curve | None]]) -> tuple[float, float] | None:
    """Of the vertical axis. What κ makes of a predictor that says nothing yet may lie anywhere: as much of it is shown
    as what is measured meanwhile leaves room for."""
    clipped = panel.key in _CLIPPED
    found = span(list(_heights(curves)), panel.log, clipped)
    if found is None or panel.key not in ("kappa", "target"):
        return found
    if panel.key == "kappa":  # a share
        return max(found[0], -0.5), found[1]
    measured = span(list(_measured_since(curves)), panel.log, clipped)
    if measured is None:
        return found
    height = measured[1] - measured[0]
    return max(found[0], measured[0] - height), min(found[1], measured[1] + height)


def _measured_since(curves: Sequence[list[Curve | None]]) -> Iterator[float]:
    """The values of each run's first line from where the others begin: of the same rows, so at the same places."""
    for measured, *said in curves:
        if measured is None:
            continue
        places = [i for curve in said if curve for i, y in enumerate(curve["y"]) if y is not None]
        yield from (y for y in measured["y"][min(places, default=0) :] if y is not None)


def _heights(curves: Sequence[list[Curve | None]]) -> Iterator[float]:
    for curve in (curve for of_run in curves for curve in of_run if curve is not None):
        for values in curve.values():
            yield from (y for y in values if y is not None)


def _positive(run: RunCurves, x: XAxis) -> bool:
    return any(at is not None and at > 0 for places in run.drawn.places.values() for at in places[x])


def _numbers(values: Sequence[float | None], log: bool) -> np.ndarray:
    """NaN for what an axis cannot show."""
    numbers = np.array(values, dtype=float)
    return np.where(numbers > 0, numbers, np.nan) if log else numbers


# ---- the picture, and the page's drawings


def plot_curves(panels: Sequence[Panel], runs: Sequence[RunCurves], out_png: Path) -> Path:
    """Draw every panel but the loss that has anything to show, over tokens; the file."""
    from matplotlib.lines import Line2D

    shown = [i for i, panel in enumerate(panels) if panel.key != "loss" and any(any(r.drawn.curves[i]) for r in runs)]
    lines = -(-max(1, len(shown)) // _COLUMNS)
    view = view_of(runs, "tokens")
    size, style = (11.0, 0.4 + 2.3 * lines), {"font.size": 8}
    with picture(out_png, size, dpi=130, layout="constrained", style=style) as figure:
        grid = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes, i in zip(grid, shown, strict=False):
            panel = panels[i]
            title = f"{panel.title}{f' ({panel.unit})' if panel.unit else ''}"
            axes.set_title(title, fontsize=8.5, loc="left", pad=12, parse_math=False)
            draw_panel(axes, panel, runs, [run.drawn.curves[i] for run in runs], view)
        if not shown:
            figure.suptitle("nothing but the loss has been logged")
        elif len(runs) > 1:
            handles = [Line2D([], [], color=COLOURS[n % len(COLOURS)]) for n in range(len(runs))]
            names = [run.name for run in runs]
            legend = figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False)
            as_they_are(legend.get_texts())
    return out_png


def drawings(panels: Sequence[Panel], runs: Sequence[RunCurves], shown: Sequence[int]) -> dict[str, dict[str, str]]:
    """SVG elements, by panel and by view: of each axis, linear and logarithmic. shown: which of the panels."""
    import matplotlib as mpl

    views = [view_of(runs, x, log) for x, log in VIEWS]
    found: dict[str, dict[str, str]] = {}
    # Text stays text; names of clip paths do not depend on chance.
    with mpl.rc_context(STYLE | {"font.size": 10.5, "svg.fonttype": "none", "svg.hashsalt": "megabus"}):
        for i in shown:
            panel, curves = panels[i], [run.drawn.curves[i] for run in runs]
            if panel.key == "loss":
                found[panel.key] = _drawn_views(f"panel{i}", panel, runs, curves, views, _WIDE)
                found[f"{panel.key} narrow"] = _drawn_views(f"panel{i}n", panel, runs, curves, views, _SIZE)
            else:
                found[panel.key] = _drawn_views(f"panel{i}", panel, runs, curves, views, _SIZE)
    return found


def _drawn_views(
    name: str,
    panel: Panel,
    runs: Sequence[RunCurves],
    curves: Sequence[list[Curve | None]],
    views: Sequence[View],
    size: tuple[int, int],
) -> dict[str, str]:
    """A panel's SVG elements, by view. name: of the panel, before the ids in the drawing; size: width and height."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    left, bottom, right, top = 50, 38, width - 14, height - 18
    axes = figure.add_axes((left / width, bottom / height, (right - left) / width, (top - bottom) / height))
    axes.xaxis.set_label_coords(0.5, -26 / (top - bottom))  # else it is sought anew for every view
    axes.yaxis.set_label_coords(0, 0.5)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    found = {}
    for view in views:  # on the same axes, as making them takes longest
        draw_panel(axes, panel, runs, curves, view)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        facts = {
            "box": f"{left} {right} {height - top} {height - bottom}",
            "span": f"{view.low:.10g} {view.high:.10g}",
            "scale": f"{view.scale:g}",
            "unit": view.unit if view.x == "time" else "FLOPs" if view.x == "flops" else "tokens",
        }
        attributes = "".join(f' data-{key}="{value}"' for key, value in facts.items())
        found[view.key] = _for_page(file.getvalue(), name, width, height, attributes)
    return found


def _for_page(svg: str, name: str, width: int, height: int, attributes: str) -> str:
    """What matplotlib wrote as an element of the page: its ids begin with the name, its colours are the page's."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="run(\d+)"', r'<g data-run="\1"', body)
    body = re.sub(r'<g id="xlabel">(\s*)<text', r'<g>\1<text class="xlabel"', body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{name}-", body)
    body = re.sub(r"\n *", "\n", body)
    body = re.sub(r' d="[^"]*"', lambda d: re.sub(r"\d+\.\d+", lambda place: f"{float(place[0]):.1f}", d[0]), body)
    for colour, themed in _THEME.items():
        body = body.replace(colour, themed)
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true"{attributes}>{body}'
