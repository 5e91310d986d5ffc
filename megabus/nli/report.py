"""What an evaluation found: results.json, predictions.jsonl, pictures, and a table to read. For rank 0 alone."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import megabus
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.nli.measures import CONFIDENCE, MIN_PAIRS, RESAMPLES, Baselines, C, measure
from megabus.nli.pairs import LABELS, PairSet
from megabus.nli.run import Outcome
from megabus.nli.score import CONTENT_FREE, Scores
from megabus.nli.settings import RESULTS, Settings
from megabus.report.plots import INK, STYLE
from megabus.table import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]
_MODEL, _BASELINE = "#0b6e99", "#b9c2c9"


def report(settings: Settings, outcome: Outcome, command: str) -> None:
    """Measure everything, write what --out asks for, fit the baselines, and print the table."""
    results, train = describe(settings, outcome, command), outcome.data.train
    tuned: list[Scores] | list[None] = outcome.fine_tuned or [None] * len(outcome.zero_shot)

    def sets(baselines: Baselines) -> Results:
        parts = zip(outcome.data.reported, outcome.zero_shot, tuned, strict=True)
        return {"sets": {part[0].name: measure_set(*part, baselines, settings.seed) for part in parts}}

    if train is not None:
        train = train.sample(settings.baseline_pairs, settings.seed)
        if settings.out is not None:  # fitting takes time and memory: what cost a fine-tuning is safe before
            write(settings.out, results | sets(Baselines(None)), outcome, settings.predictions)
        print(f"fitting the baselines to {len(train):,} pairs", flush=True)
    baselines = Baselines(train)
    results |= sets(baselines)
    results["baselines"] |= {"pairs": 0 if train is None else len(train), "missing": baselines.missing}
    print(f"\n{table(results)}", flush=True)  # before anything can go wrong with files
    if settings.out is not None:
        write(settings.out, results, outcome, settings.predictions)
        print(f"\nwritten: {settings.out}")
    if outcome.saved is not None:
        print(f"saved:   {outcome.saved}")


def describe(settings: Settings, outcome: Outcome, command: str) -> Results:
    """All that the numbers depend on."""
    stage, train = outcome.stage, outcome.data.train
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "checkpoint": {"path": str(outcome.checkpoint.resolve()), "step": outcome.step},
        "model": stage.model.model_dump() | {"parameters": count_parameters(stage.model)},
        "layout": {"tp": stage.layout.tp, "pp": stage.layout.pp, "dp": stage.layout.dp},
        "settings": settings.as_json()
        | {"max_length": stage.seq_len, "micro_batch_size": stage.micro_batch_size, "content_free": CONTENT_FREE},
        "labels": list(LABELS),
        "intervals": {"confidence": CONFIDENCE, "accuracy": "Wilson", "macro_f1": f"bootstrap, {RESAMPLES} resamples"},
        "baselines": {"kind": "TF-IDF of words and pairs of words, logistic regression", "C": C, "min_df": MIN_PAIRS},
        "train": None if train is None else _facts(train),
        "fine_tuning": None
        if not outcome.curve
        else {
            "steps": outcome.curve[-1]["step"],
            "watched": None if outcome.data.watched is None else _facts(outcome.data.watched),
            "curve": outcome.curve,
            "saved": None if outcome.saved is None else str(outcome.saved.resolve()),
        },
        "unit_error": outcome.unit_error,
        "seconds": outcome.seconds,
        "versions": {"megabus": megabus.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _facts(pairs: PairSet) -> Results:
    facts = {"name": pairs.name, "pairs": len(pairs), "without_gold_label": pairs.skipped}
    return facts | {"gold": pairs.counts, "sha256": pairs.sha256}


def measure_set(
    pairs: PairSet, zero_shot: Scores, fine_tuned: Scores | None, baselines: Baselines, seed: int
) -> Results:
    """Every predictor's numbers by its name, the model's own first; None where it is not available."""
    predictions: dict[str, list[int] | None] = {}
    for name, scores in (("fine-tuned", fine_tuned), ("zero-shot", zero_shot)):
        for rule, table in ({} if scores is None else scores.variants()).items():
            predictions[name if rule == "sum" else f"{name}, {rule}"] = table.argmax(1).tolist()
    predictions |= baselines.predict(pairs)
    found = {name: guess and measure(pairs.labels, guess, seed) for name, guess in predictions.items()}
    cut = {"premises_cut": zero_shot.n_cut, "cut_beyond_the_premise": zero_shot.n_beyond}
    return _facts(pairs) | cut | {"results": found}


# ---- files


def write(out: Path, results: Results, outcome: Outcome, predictions: bool) -> None:
    try:
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if predictions:
            with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in prediction_rows(outcome))
        for number, (name, one) in enumerate(results["sets"].items(), 1):
            plot_set(name, one, out / ("nli.png" if len(results["sets"]) == 1 else f"nli-{number}.png"))
    except OSError as error:
        raise UserError("--out", out, f"cannot be written ({error})", "make room or choose another place") from error


def prediction_rows(outcome: Outcome) -> list[Results]:
    """A row a pair of each set, `pair` counted from 0 among those with a gold label."""
    rows = []
    for number, pairs in enumerate(outcome.data.reported):
        models = {"zero_shot": outcome.zero_shot[number]}
        if outcome.fine_tuned is not None:
            models["fine_tuned"] = outcome.fine_tuned[number]
        for i, pair in enumerate(pairs.pairs):
            row: Results = {"set": pairs.name, "pair": i, "gold": LABELS[pair.label]}
            for name, scores in models.items():
                values = scores.log_likelihood[i]
                by_label = dict(zip(LABELS, values.tolist(), strict=True))
                row[name] = {"predicted": LABELS[int(np.argmax(values))], "log_likelihood": by_label}
            rows.append(row)
    return rows


# ---- the table


def table(results: Results) -> str:
    missing = results["baselines"]["missing"]
    return "\n\n".join(_set_table(name, one, missing) for name, one in results["sets"].items())


def _set_table(name: str, one: Results, missing: str | None) -> str:
    """Every predictor's accuracy and macro-F1, then the classes and the confusion of the first."""
    notes = {
        "others have no gold label": one["without_gold_label"],
        "premises cut to fit": one["premises_cut"],
        "lost more than the premise": one["cut_beyond_the_premise"],
    }
    title = ", ".join([f"{name}: {one['pairs']:,} pairs", *(f"{n:,} {note}" for note, n in notes.items() if n)])
    rows = [_numbers(who, numbers, missing) for who, numbers in one["results"].items()]
    first, numbers = next(iter(one["results"].items()))
    header = [first, "precision", "recall", "F1", "pairs", *(f"→ {label}" for label in LABELS)]
    classes = []
    for (label, of), counts in zip(numbers["classes"].items(), numbers["confusion"], strict=True):
        shares = [f"{of[key]:.3f}" for key in ("precision", "recall", "f1")]
        classes.append([label, *shares, f"{of['gold']:,}", *(f"{count:,}" for count in counts)])
    accuracies = aligned(["", "accuracy", "95% interval", "macro-F1", "95% interval"], rows, left={0})
    return "\n\n".join([title, accuracies, aligned(header, classes, left={0})])


def _numbers(who: str, numbers: Results | None, missing: str | None) -> list[str]:
    if numbers is None:
        return [f"{who}, not available: {missing}", *["–"] * 4]
    cells = [who]
    for key in ("accuracy", "macro_f1"):
        low, high = numbers[f"{key}_interval"]
        cells += [f"{numbers[key]:.3f}", f"[{low:.3f}, {high:.3f}]"]
    return cells


# ---- the picture


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
    axes.set(xlabel=f"predicted ({who})", ylabel="gold")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_accuracies(axes: Axes, found: dict[str, dict[str, Any]]) -> None:
    names, rows = list(found), range(len(found))
    accuracies = [numbers["accuracy"] for numbers in found.values()]
    low, high = zip(*(numbers["accuracy_interval"] for numbers in found.values()), strict=True)
    errors = [[a - end for a, end in zip(accuracies, low, strict=True)]]
    errors += [[end - a for a, end in zip(accuracies, high, strict=True)]]
    colours = [_MODEL if name.startswith(("zero-shot", "fine-tuned")) else _BASELINE for name in names]
    axes.barh(rows, accuracies, xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.65)
    for row, accuracy, end in zip(rows, accuracies, high, strict=True):
        axes.text(end + 0.01, row, f"{accuracy:.3f}", va="center", fontsize=9)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, min(1.12, max(high) + 0.1)), xlabel="accuracy, with its 95% interval")
    axes.grid(axis="x", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
