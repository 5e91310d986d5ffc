"""Pictures and tables of runs, from their metrics (`megabus/report/history.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megabus.config.reasons import REASONS
from megabus.errors import UserError
from megabus.report.figure import COLOURS, as_they_are, dress, picture
from megabus.report.history import (
    MetricsRow,
    XAxis,
    layouts_that_ran,
    not_logged,
    places,
    read_curves,
    read_metrics,
    read_rows,
    skipped_spikes,
)
from megabus.report.phases import check_phases, letters, phase_text
from megabus.table import aligned, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_SHORT = {"d_model": "d", "n_layers": "L", "n_heads": "H", "n_kv_heads": "KV", "d_ff": "ff"}
X_LABEL = {"flops": "training compute (FLOPs)", "tokens": "tokens", "time": "training time (hours)"}
_HEIGHT = 4.6  # of the axes, in inches
MOST_FLAGS = 40  # labels of growths that a picture has room for


# ---- what all curves have in common


def dress_curves(axes: Axes, x: XAxis, log_x: bool, unit: str = "hours") -> None:
    """The horizontal axis, the grid and the frame. unit: of time."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log" if log_x else "linear")
    if log_x:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda at, _: _power(at) if x == "flops" else short(at))
    axes.set_xlabel(X_LABEL[x].replace("hours", unit), labelpad=5, gid="xlabel")
    dress(axes)
    axes.tick_params(length=3)


def span(values: Sequence[float], log: bool, clipped: bool) -> tuple[float, float] | None:
    """The lowest and the highest value of a vertical axis; None where it can show nothing.

    clipped: without the highest hundredth and a half, such as the first steps' losses, where these would take most of
    the height. Of few values, such as those of validations, all are shown.
    """
    shown = sorted(value for value in values if value > 0 or not log)
    if not shown:
        return None
    low, high, most = shown[0], shown[-1], shown[math.ceil(0.985 * len(shown)) - 1]
    if clipped and high - low > 2 * (most - low):
        high = most
    if log:
        return (low / 1.15, high * 1.15) if low < high else (low / 2, high * 2)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def short(value: float) -> str:
    """As on an axis: 12.5M, 0.0125."""
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.4g}"
    return si(value) if 999.5 <= value < 1e15 else _power(value)


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{float(mantissa):g}e{int(exponent)}"


# ---- the picture


def plot_loss(run_dirs: Sequence[str | Path], out_png: str | Path, x: XAxis = "flops", log_x: bool = False) -> Path:
    """Draw the runs' training loss (faint), validation loss, growths and phases (labelled lines); the file."""
    if x not in X_LABEL:
        raise UserError("x", x, "no such axis", f"use one of {', '.join(X_LABEL)}")
    read = [read_curves(run_dir) for run_dir in run_dirs]
    runs = [rows for rows, _ in read]
    with picture(out_png, (9.6, _HEIGHT)) as figure:
        axes = figure.add_axes((0.075, 0.1, 0.895, 0.8))
        labels, curves = [], {}
        for i, (run_dir, (rows, phases)) in enumerate(zip(run_dirs, read, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            faint = colour if len(runs) > 1 else COLOURS[1]  # of one run the two losses have a colour each
            curve, name = _draw_run(axes, rows, Path(run_dir).resolve().name, (colour, faint), x, log_x)
            curves[curve] = name
            check_phases(phases, Path(run_dir))
            labels += [(at, text, colour) for at, text in (*_growths(rows, x), *_phases(rows, phases, x))]
        _dress(axes, runs, curves, x, log_x)
        _lay_labels(figure, axes, labels)
    return Path(out_png)


def _series(rows: Sequence[MetricsRow], event: str, x: XAxis) -> tuple[list[float], list[float]]:
    """(x, loss) of the rows of one kind with a finite loss."""
    pairs = [
        (at, row["loss"])
        for at, row in zip(places(rows, x), rows, strict=True)
        if row["event"] == event and row["loss"] is not None and math.isfinite(row["loss"])
    ]
    return [at for at, _ in pairs], [loss for _, loss in pairs]


def _draw_run(
    axes: Axes, rows: Sequence[MetricsRow], name: str, colours: tuple[str, str], x: XAxis, log_x: bool
) -> tuple[Line2D, str]:
    """The validation's curve, and what it is called. colours: of the validation and of the training loss."""
    train, valid = (_series([row for row in rows if row["step"] > 0 or not log_x], e, x) for e in ("step", "eval"))
    axes.plot(*train, color=colours[1], alpha=0.3, linewidth=0.8, zorder=2)
    every = max(1, len(valid[0]) // 40)  # a point on each of hundreds of evaluations would be a thick line
    label = f"{name}  {valid[1][-1]:.3f}" if valid[1] else name
    points: dict[str, Any] = {"marker": "o", "markersize": 3.2, "markevery": every}
    (curve,) = axes.plot(*valid, color=colours[0], linewidth=1.7, zorder=3, **points)
    return curve, label


def _growths(rows: Sequence[MetricsRow], x: XAxis) -> list[tuple[float, str]]:
    """(x, label) of each growth."""
    pairs = zip(places(rows, x), rows, strict=True)
    return [(at, growth_text(row)) for at, row in pairs if row["event"] == "growth"]


def _phases(rows: Sequence[MetricsRow], phases: Sequence[MetricsRow], x: XAxis) -> list[tuple[float, str]]:
    """(x, label) of each phase but the first, with the letter that the report page has for it."""
    at = np.interp([row["step"] for row in phases], [row["step"] for row in rows], places(rows, x))
    return [(float(at[i]), f"{letters(i)}: {phase_text(row)}") for i, row in enumerate(phases)]


def growth_text(row: MetricsRow) -> str:
    """`d 96→144, L 4→6 (κ)`: what changed in width and depth, else in whatever did, and why."""
    changed = [key for key, value in row["new"].items() if row["old"].get(key) != value and key != "n_params"]
    shown = [key for key in ("d_model", "n_layers") if key in changed] or changed[:2]
    sizes = ", ".join(f"{_SHORT.get(key, key)} {row['old'].get(key, '–')}→{row['new'][key]}" for key in shown)
    return f"{sizes or 'same size'} ({why(row)})"


def why(growth: MetricsRow) -> str:
    reason: str = growth["reason"]
    return REASONS[reason].flag if reason in REASONS else reason


def _dress(
    axes: Axes, runs: Sequence[Sequence[MetricsRow]], curves: Mapping[Line2D, str], x: XAxis, log_x: bool
) -> None:
    """Axes, legend, and a view that the first steps' high losses do not flatten."""
    seen = [
        point
        for rows in runs
        for event in ("step", "eval")
        for point in zip(*_series(rows, event, x), strict=True)
        if point[0] > 0 or not log_x
    ]
    axes.margins(x=0.015)
    log_x = log_x and bool(seen)
    dress_curves(axes, x, log_x)
    limits = span([loss for _, loss in seen], log=False, clipped=True)
    if limits:
        axes.set_ylim(*limits)
        if log_x:
            axes.set_xlim(left=0.9 * min(at for at, loss in seen if loss <= limits[1]))
    axes.set_ylabel("loss (nats per token)", labelpad=6)
    legend = axes.legend(  # given its labels, for it leaves out those of artists that begin with "_"
        [*curves],
        [*curves.values()],
        title="validation loss  (faint: training)",
        loc="upper right",
        frameon=True,
        framealpha=0.92,
        edgecolor="none",
        fontsize=9,
        title_fontsize=8,
        alignment="left",
    )
    as_they_are(legend.get_texts())


def _lay_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Growth lines with their labels as flags over the axes, on a page made tall enough for them.

    A flag flies right from its pole. Placed from right to left, each as low as it can over those it would
    touch, no pole crosses a flag (but for flags turned in at the page's edge, which hide it).
    """
    pixel = 72 / figure.dpi  # in points
    lane_height, gap = 12.5, 5.0  # points
    axes.set_xlim(axes.get_xlim())  # settle the scale: places on the page depend on it
    # (x, text, colour, left, right, lane); left and right in points on the page
    flags: list[tuple[float, str, str, float, float, int]] = []
    if len(labels) > MOST_FLAGS:  # they would be taller than the curves
        for at, _, colour in labels:
            axes.axvline(at, zorder=1, color=colour, linewidth=0.6, alpha=0.5)
        labels = []
    for at, text, colour in sorted(labels, reverse=True):
        flag = axes.text(0, 0, text, fontsize=8.5, transform=axes.transAxes, parse_math=False)
        width = flag.get_window_extent().width * pixel
        flag.remove()
        pole = axes.transData.transform((at, 0))[0] * pixel
        left = min(pole + 3, figure.bbox.width * pixel - gap - width)
        below = [f[5] for f in flags if f[3] - gap < left + width and left - gap < f[4]]
        flags.append((at, text, colour, left, left + width, max(below, default=-1) + 1))

    room = 10 + lane_height * max((flag[5] + 1 for flag in flags), default=0)
    box, height = axes.get_position(), _HEIGHT * 72  # of the axes, in points
    page = height + room + 40  # 40: tick labels and the axis label below
    figure.set_figheight(page / 72)
    axes.set_position((box.x0, 40 / page, box.width, height / page))
    for at, text, colour, left, _, lane in flags:
        pole = axes.transData.transform((at, 0))[0] * pixel
        top = 1 + (lane_height * (lane + 1) - 2) / height
        line: dict[str, Any] = {"color": colour, "linewidth": 0.9, "linestyle": (0, (4, 3)), "alpha": 0.75}
        axes.axvline(at, ymax=top, clip_on=False, zorder=1, **line)
        axes.annotate(
            text,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(left - pole, lane_height * lane + 3),
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )


# ---- the table


@dataclass
class _Span:
    """One stage of a run; tokens and FLOPs are its own."""

    stage: int
    sizes: dict[str, Any]
    layout: str
    steps: int
    tokens: int
    flops: float
    first_loss: float | None
    last_loss: float | None
    growth: MetricsRow | None


def _spans(rows: Sequence[MetricsRow]) -> Iterator[_Span]:
    """Cut a run at its growth events."""
    start = next((row for row in rows if row["event"] == "start"), {})
    sizes, layout, stage = start.get("sizes", {}), start.get("layout", "–"), start.get("stage", 0)
    origin: MetricsRow = {"step": 0, "tokens": 0, "flops": 0} | start
    first = 0
    for cut in [*(i for i, row in enumerate(rows) if row["event"] == "growth"), None]:
        growth = None if cut is None else rows[cut]
        here = rows[first:cut]
        first = len(rows) if cut is None else cut + 1
        if growth is None and not here:
            return
        if growth:
            sizes, layout, stage = growth["old"], growth.get("old_layout", layout), growth["from_stage"]
        end = growth or here[-1]
        losses = _series(here, "eval", "tokens")[1]
        yield _Span(
            stage,
            sizes,
            layout,
            steps=end["step"] - origin["step"],
            tokens=end["tokens"] - origin["tokens"],
            flops=end["flops"] - origin["flops"],
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            growth=growth,
        )
        if growth:
            sizes, layout, stage = growth["new"], growth.get("new_layout", layout), growth["to_stage"]
            origin = growth


def stage_table(rows: Sequence[MetricsRow], layouts: dict[int, list[str]]) -> list[list[str]]:
    """A header, then a line per stage: what it was, what it spent, what it learned, how it ended.

    layouts: see `layouts_that_ran`; a stage without a step has the one that it was to have.
    """
    header = ["stage", "sizes", "params", "layout", "steps", "tokens", "FLOPs", "valid loss"]
    header += ["growth", "loss at growth", "stall"]
    lines = [header]
    for span in _spans(rows):
        sizes = short_sizes(span.sizes)
        grown = span.growth
        lines.append(
            [
                str(span.stage),
                sizes or "–",
                si(span.sizes.get("n_params")),
                ", ".join(layouts.get(span.stage, [span.layout])),
                f"{span.steps:,}",
                si(span.tokens),
                f"{span.flops:.2e}",
                f"{_loss(span.first_loss)} → {_loss(span.last_loss)}",
                why(grown) if grown else "–",
                f"{_loss(grown.get('loss_before'))} → {_loss(grown.get('loss_after'))}" if grown else "–",
                f"{grown['stall_s']:.1f} s" if grown else "–",
            ]
        )
    return lines


def summary_table(run_dir: str | Path) -> str:
    """`stage_table` of a run in aligned columns, how many spikes it skipped, and what is not in its log, if any."""
    rows, counted = read_rows(run_dir), read_metrics(run_dir)
    header, *lines = stage_table(counted, layouts_that_ran(rows))
    spikes, missing = skipped_spikes(rows), not_logged(counted)
    message = f"\nsteps skipped as spikes: {spikes}" if spikes else ""
    message += f"\n{missing}" if missing else ""
    return aligned(header, lines, left={1, 3, 7, 8, 9}) + message


def short_sizes(sizes: dict[str, Any]) -> str:
    """`d96 L4 H3 KV3 ff384`."""
    return " ".join(f"{short}{sizes[key]}" for key, short in _SHORT.items() if key in sizes)


def _loss(loss: float | None) -> str:
    return "–" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"
