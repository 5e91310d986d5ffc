"""One picture of an evaluation: the first predictor's confusion, and everyone's accuracy with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.errors import UserError
from megabus.nli.pairs import LABELS
from megabus.report.plots import INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODEL, _BASELINE = "#0b6e99", "#b9c2c9"


def plot_set(name: str, one: dict[str, Any], out_png: Path) -> Path:
    """Draw one set of `report`'s results; the file."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {who: numbers for who, numbers in one["results"].items() if numbers is not None}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # draws into memory: no display, no pyplot state
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.35))
        first = next(iter(found))
        _draw_confusion(left, found[first]["confusion"], first)
        _draw_accuracies(right, found)
        figure.suptitle(f"{Path(name).name}, {one['pairs']:,} pairs", fontsize=10)
        try:
            figure.savefig(out_png)
        except (OSError, ValueError) as error:
            raise UserError("picture", out_png, f"cannot be written ({error})", "name a writable .png") from error
    return out_png


def _draw_confusion(axes: Axes, counts: list[list[int]], who: str) -> None:
    """Shares of each gold label, with the counts written in."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.55 else INK
            axes.text(j, i, f"{count:,}\n{shares[i][j]:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS, rotation=90, va="center")
    axes.set_xlabel(f"predicted ({who})")
    axes.set_ylabel("gold")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_accuracies(axes: Axes, found: dict[str, dict[str, Any]]) -> None:
    names = list(found)
    accuracies = [found[name]["accuracy"] for name in names]
    intervals = [found[name]["accuracy_interval"] for name in names]
    errors = [
        [a - low for a, (low, _) in zip(accuracies, intervals, strict=True)],
        [high - a for a, (_, high) in zip(accuracies, intervals, strict=True)],
    ]
    colours = [_MODEL if name.startswith(("zero-shot", "fine-tuned")) else _BASELINE for name in names]
    axes.barh(range(len(names)), accuracies, xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.65)
    for row, (accuracy, (_, high)) in enumerate(zip(accuracies, intervals, strict=True)):
        axes.text(high + 0.01, row, f"{accuracy:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.12, max(high for _, high in intervals) + 0.1))
    axes.set_xlabel("accuracy, with its 95% interval")
    axes.grid(axis="x", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
