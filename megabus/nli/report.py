"""What an evaluation found: results.json, predictions.jsonl, pictures, and a table to read. For rank 0 alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megabus
from megabus.errors import UserError
from megabus.model.cost import count_parameters
from megabus.nli.baselines import MIN_PAIRS, Baselines, C
from megabus.nli.metrics import CONFIDENCE, RESAMPLES, measure
from megabus.nli.pairs import LABELS, PairSet
from megabus.nli.run import Outcome
from megabus.nli.score import CONTENT_FREE, Scores
from megabus.nli.settings import RESULTS, Settings

Results = dict[str, Any]


def report(settings: Settings, outcome: Outcome, command: str) -> None:
    """Measure everything, write what --out asks for, fit the baselines, and print the table."""
    results = describe(settings, outcome, command)
    train = outcome.data.train
    if train is not None:
        train = train.sample(settings.baseline_pairs, settings.seed)
        if settings.out is not None:  # fitting takes time and memory: what cost a fine-tuning is safe before
            write(settings.out, results | measured(settings, outcome, Baselines(None)), outcome, settings.predictions)
        print(f"fitting the baselines to {len(train):,} pairs", flush=True)
    baselines = Baselines(train)
    results |= measured(settings, outcome, baselines)
    results["baselines"] |= {"pairs": 0 if train is None else len(train), "missing": baselines.missing}
    print(f"\n{table(results)}", flush=True)  # before anything can go wrong with files
    if settings.out is not None:
        write(settings.out, results, outcome, settings.predictions)
        print(f"\nwritten: {settings.out}")
    if outcome.saved is not None:
        print(f"saved:   {outcome.saved}")


def measured(settings: Settings, outcome: Outcome, baselines: Baselines) -> Results:
    """The sets of pairs by name, each with every predictor's numbers."""
    sets: Results = {}
    for number, pairs in enumerate(outcome.data.reported):
        tuned = None if outcome.fine_tuned is None else outcome.fine_tuned[number]
        sets[pairs.name] = measure_set(pairs, outcome.zero_shot[number], tuned, baselines, settings.seed)
    return {"sets": sets}


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
    predictions: dict[str, Sequence[int] | None] = {}
    for name, scores in (("fine-tuned", fine_tuned), ("zero-shot", zero_shot)):
        for rule, table in ({} if scores is None else scores.variants()).items():
            predictions[name if rule == "sum" else f"{name}, {rule}"] = table.argmax(1).tolist()
    predictions |= baselines.predict(pairs)
    return _facts(pairs) | {
        "premises_cut": zero_shot.n_cut,
        "cut_beyond_the_premise": zero_shot.n_beyond,
        "results": {
            name: None if guess is None else measure(pairs.labels, guess, seed) for name, guess in predictions.items()
        },
    }


# ---- files


def write(out: Path, results: Results, outcome: Outcome, predictions: bool) -> None:
    from megabus.nli.plots import plot_set

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
    notes = [f"{one['pairs']:,} pairs"]
    if one["without_gold_label"]:
        notes.append(f"{one['without_gold_label']:,} others have no gold label")
    if one["premises_cut"]:
        notes.append(f"{one['premises_cut']:,} premises cut to fit")
    if one["cut_beyond_the_premise"]:
        notes.append(f"{one['cut_beyond_the_premise']:,} lost more than the premise")
    rows = [["", "accuracy", "95% interval", "macro-F1", "95% interval"]]
    for who, numbers in one["results"].items():
        rows.append([who, f"not available: {missing}", "", "", ""] if numbers is None else _numbers(who, numbers))
    first, numbers = next(iter(one["results"].items()))
    classes = [[first, "precision", "recall", "F1", "pairs", *(f"→ {label}" for label in LABELS)]]
    for label, counts in zip(LABELS, numbers["confusion"], strict=True):
        of = numbers["classes"][label]
        shares = [f"{of[key]:.3f}" for key in ("precision", "recall", "f1")]
        classes.append([label, *shares, f"{of['gold']:,}", *(f"{count:,}" for count in counts)])
    return "\n".join([f"{name}: {', '.join(notes)}", "", *aligned(rows), "", *aligned(classes)])


def _numbers(who: str, numbers: Results) -> list[str]:
    cells = [who]
    for key in ("accuracy", "macro_f1"):
        low, high = numbers[f"{key}_interval"]
        cells += [f"{numbers[key]:.3f}", f"[{low:.3f}, {high:.3f}]"]
    return cells


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be, the first one's cells on the left; a cell with nothing to its right runs on."""
    widths = [
        max(len(row[i]) for row in rows if i in (0, len(row) - 1) or any(row[i + 1 :])) for i in range(len(rows[0]))
    ]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
