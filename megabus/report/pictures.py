"""The page's diagrams, but for the loss, as one PNG: for papers, chats and mails."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.report.curves import Curve, Drawn, Panel
from megabus.report.figure import COLOURS, dress, picture
from megabus.report.plots import X_LABEL
from megabus.table import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


def plot_curves(names: Sequence[str], panels: Sequence[Panel], runs: Sequence[Drawn], out_png: Path) -> Path:
    """Draw every panel but the loss that has anything to show, over tokens; the file."""
    from matplotlib.lines import Line2D

    shown = [i for i, panel in enumerate(panels) if panel.key != "loss" and any(any(run.curves[i]) for run in runs)]
    lines = -(-max(1, len(shown)) // _COLUMNS)
    size, style = (11.0, 0.4 + 2.3 * lines), {"font.size": 8, "axes.formatter.use_mathtext": True}
    with picture(out_png, size, dpi=130, layout="constrained", style=style) as figure:
        grid = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes, i in zip(grid, shown, strict=False):
            _draw(axes, panels[i], [(run, run.curves[i]) for run in runs])
        if not shown:
            figure.suptitle("nothing but the loss has been logged")
        elif len(names) > 1:
            handles = [Line2D([], [], color=COLOURS[n % len(COLOURS)]) for n in range(len(names))]
            figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False)
    return out_png


def _draw(axes: Axes, panel: Panel, runs: Sequence[tuple[Drawn, list[Curve | None]]]) -> None:
    for number, (run, curves) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for line, curve in zip(panel.lines, curves, strict=True):
            if curve is None:
                continue
            tokens = _floats(run.places[line.event]["tokens"])
            if "low" in curve:
                low, high = (_floats(curve[key]) for key in ("low", "high"))
                axes.fill_between(tokens, low, high, color=colour, alpha=0.16, linewidth=0)
            else:
                values = _floats(curve["y"])
                axes.plot(tokens, values, color=colour, **_manner(line.shape))
                for token, value in _alone(tokens, values):
                    axes.plot(token, value, ".", color=colour, markersize=3)
    axes.set_title(f"{panel.title}{f' ({panel.unit})' if panel.unit else ''}", fontsize=8.5, loc="left")
    axes.set_xlabel(X_LABEL["tokens"])
    axes.xaxis.set_major_formatter(lambda tokens, _: si(tokens))
    if panel.log and any(y and y > 0 for _, curves in runs for c in curves if c for y in c.get("y", [])):
        axes.set_yscale("log")
    dress(axes, width=0.7)


def _alone(tokens: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Points without a neighbour, of which a line shows nothing."""
    there = [False, *map(isfinite, values), False]
    points = enumerate(zip(tokens, values, strict=True), 1)
    return [point for i, point in points if there[i] and not there[i - 1] and not there[i + 1]]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _manner(shape: str) -> dict[str, Any]:
    manners: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 1.5},
        "thin": {"linewidth": 1.0, "alpha": 0.75},
        "range": {"linewidth": 0.7, "alpha": 0.3},
        "dashed": {"linewidth": 1.1, "linestyle": (0, (4, 2))},
    }
    return manners[shape]
