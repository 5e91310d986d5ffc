"""What all pictures of the project share: colours, the page they are drawn on, and diagrams of shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabus.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLOURS = ("#0b6e99", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#5c6b73")
INK, FAINT, GRID = "#22282e", "#8b949e", "#e6e9ec"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextmanager
def picture(out_png: str | Path, figsize: tuple[float, float], dpi: int = 150, **options: Any) -> Iterator[Figure]:
    """A figure in the project's style, written when the block ends. `style`: settings beside STYLE; the other options
    are the figure's. Raises `UserError` where it cannot be written."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE | options.pop("style", {})):
        figure = Figure(figsize=figsize, dpi=dpi, **options)
        FigureCanvasAgg(figure)  # draws into memory: no display, no pyplot state
        yield figure
        try:
            figure.savefig(out_png)
        except (OSError, ValueError) as error:
            raise UserError("picture", out_png, f"cannot be written ({error})", "name a writable .png") from error


def as_they_are(texts: Sequence[Text]) -> None:
    """Names from files: dollar signs in them begin no formula."""
    for text in texts:
        text.set_parse_math(False)


def dress(axes: Axes, axis: Any = "both") -> None:
    """A grid behind what is drawn, and no frame above and on the right."""
    axes.grid(axis=axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_counts(axes: Axes, counts: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """A square table of counts, coloured by each one's share of its row."""
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.55 else INK
            axes.text(j, i, f"{count:,}\n{shares[i][j]:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names, rotation=90, va="center")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_bars(
    axes: Axes, values: dict[str, float], intervals: Sequence[tuple[float, float]], colours: Sequence[str]
) -> None:
    """A bar for each share, from the top down, with its interval and its value behind it."""
    low, high = zip(*intervals, strict=True)
    errors = [[value - end for value, end in zip(values.values(), low, strict=True)]]
    errors += [[end - value for value, end in zip(values.values(), high, strict=True)]]
    rows = range(len(values))
    axes.barh(rows, list(values.values()), xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.65)
    for row, value, end in zip(rows, values.values(), high, strict=True):
        axes.text(end + 0.01, row, f"{value:.3f}", va="center", fontsize=9)
    axes.set_yticks(rows, list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.12, max(high) + 0.1))
    dress(axes, "x")
    axes.tick_params(length=3)
