"""What an evaluation found: results.json, predictions.jsonl, pictures, and a table to read. For rank 0 alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import megabus
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.nli.measures import CONFIDENCE, MIN_PAIRS, RESAMPLES, Baselines, C, measure
from megabus.nli.pairs import LABELS, PairSet
from megabus.nli.run import Outcome
from megabus.nli.score import CONTENT_FREE, Scores
from megabus.nli.settings import RESULTS, Settings
from megabus.report.figure import draw_bars, draw_counts, picture
from megabus.table import aligned

Results = dict[str, Any]
_MODEL, _BASELINE = "#0b6e99", "#b9c2c9"


def report(settings: Settings, outcome: Outcome, command: str) -> None:
    """Measure everything, write what --out asks for, fit the baselines, and print the table."""
    results, train = describe(settings, outcome, command), outcome.data.train
    tuned: list[Scores] | list[None] = outcome.fine_tuned or [None] * len(outcome.zero_shot)

    def finished(baselines: Baselines) -> None:
        parts = zip(outcome.data.reported, outcome.zero_shot, tuned, strict=True)
        results["sets"] = {part[0].name: measure_set(*part, baselines, settings.seed) for part in parts}

    if train is not None:
        train = train.sample(settings.baseline_pairs, settings.seed)
        if settings.out is not None:  # fitting takes time and memory: what cost a fine-tuning is safe before
            finished(Baselines(None))
            write(settings.out, results, outcome, settings.predictions)
        print(f"fitting the baselines to {len(train):,} pairs", flush=True)
    baselines = Baselines(train)
    finished(baselines)
    results["baselines"] |= {"pairs": 0 if train is None else len(train), "missing": baselines.missing}
    print(f"\n{table(results)}", flush=True)  # before anything can go wrong with files
    if settings.out is not None:
        write(settings.out, results, outcome, settings.predictions)
        print(f"\nwritten: {settings.out}")
    if outcome.saved is not None:
        print(f"saved:   {outcome.saved}")


def describe(settings: Settings, outcome: Outcome, command: str) -> Results:
    """All that the numbers depend on."""
    stage, train, watched, tuning = outcome.stage, outcome.data.train, outcome.data.watched, None
    used = {"max_length": stage.seq_len, "micro_batch_size": stage.micro_batch_size, "content_free": CONTENT_FREE}
    if outcome.curve:
        tuning = {
            "steps": outcome.curve[-1]["step"],
            "watched": watched and _facts(watched),
            "curve": outcome.curve,
            "saved": outcome.saved and str(outcome.saved.resolve()),
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "checkpoint": {"path": str(outcome.checkpoint.resolve()), "step": outcome.step},
        "model": stage.model.model_dump() | {"parameters": count_parameters(stage.model)},
        "layout": asdict(stage.layout),
        "settings": settings.as_json() | used,
        "labels": list(LABELS),
        "intervals": {"confidence": CONFIDENCE, "accuracy": "Wilson", "macro_f1": f"bootstrap, {RESAMPLES} resamples"},
        "baselines": {"kind": "TF-IDF of words and pairs of words, logistic regression", "C": C, "min_df": MIN_PAIRS},
        "train": train and _facts(train),
        "fine_tuning": tuning,
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


def prediction_rows(outcome: Outcome) -> Iterator[Results]:
    """A row a pair of each set, `pair` counted from 0 among those with a gold label."""
    models = {"zero_shot": outcome.zero_shot} | ({"fine_tuned": outcome.fine_tuned} if outcome.fine_tuned else {})
    for number, pairs in enumerate(outcome.data.reported):
        for i, pair in enumerate(pairs.pairs):
            row: Results = {"set": pairs.name, "pair": i, "gold": LABELS[pair.label]}
            for name, scores in models.items():
                values = scores[number].log_likelihood[i]
                by_label = dict(zip(LABELS, values.tolist(), strict=True))
                row[name] = {"predicted": LABELS[values.argmax()], "log_likelihood": by_label}
            yield row


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
    accuracies = aligned(["", "accuracy", "95% interval", "macro-F1", "95% interval"], rows, left={0})
    first, numbers = next(iter(one["results"].items()))
    header = [first, "precision", "recall", "F1", "pairs", *(f"→ {label}" for label in LABELS)]
    classes = [
        [label, *(f"{of[key]:.3f}" for key in ("precision", "recall", "f1")), *(f"{n:,}" for n in (of["gold"], *row))]
        for (label, of), row in zip(numbers["classes"].items(), numbers["confusion"], strict=True)
    ]
    return "\n\n".join([title, accuracies, aligned(header, classes, left={0})])


def _numbers(who: str, numbers: Results | None, missing: str | None) -> list[str]:
    if numbers is None:
        return [f"{who}, not available: {missing}", *["–"] * 4]
    pairs = ((numbers[key], *numbers[f"{key}_interval"]) for key in ("accuracy", "macro_f1"))
    return [who, *(cell for mean, low, high in pairs for cell in (f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"))]


def plot_set(name: str, one: Results, out_png: Path) -> Path:
    """Draw one set of `report`'s results; the file."""
    found = {who: numbers for who, numbers in one["results"].items() if numbers is not None}
    first, accuracies = next(iter(found)), {who: numbers["accuracy"] for who, numbers in found.items()}
    intervals = [numbers["accuracy_interval"] for numbers in found.values()]
    colours = [_MODEL if who.startswith(("zero-shot", "fine-tuned")) else _BASELINE for who in found]
    with picture(out_png, (11.0, 4.4), layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.35))
        draw_counts(left, found[first]["confusion"], LABELS)
        left.set(xlabel=f"predicted ({first})", ylabel="gold")
        draw_bars(right, accuracies, intervals, colours)
        right.set_xlabel("accuracy, with its 95% interval")
        figure.suptitle(f"{Path(name).name}, {one['pairs']:,} pairs", fontsize=10)
    return out_png
