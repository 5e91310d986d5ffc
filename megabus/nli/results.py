"""What an evaluation found: results.json, predictions.jsonl, pictures, and a table to read. For rank 0 alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megabus.errors import UserError, say
from megabus.nli.measures import CONFIDENCE, MIN_PAIRS, RESAMPLES, Baselines, C, measure
from megabus.nli.pairs import LABELS, PairSet
from megabus.nli.run import Outcome
from megabus.nli.settings import RESULTS, Settings
from megabus.report.figure import COLOURS, draw_bars, draw_counts, picture
from megabus.table import aligned

Results = dict[str, Any]


def report(settings: Settings, outcome: Outcome) -> None:
    """Measure everything, write what --out asks for, fit the baselines, and print the table."""
    train = outcome.data.train
    results = outcome.facts | {
        "labels": list(LABELS),
        "intervals": {"confidence": CONFIDENCE, "accuracy": "Wilson", "macro_f1": f"bootstrap, {RESAMPLES} resamples"},
        "sets": {pairs.name: of_model(n, outcome, settings.seed) for n, pairs in enumerate(outcome.data.reported)},
    }
    write(settings, results, outcome)  # fitting takes time and memory: what cost a fine-tuning is safe before
    if train is not None:
        train = train.sample(settings.baseline_pairs, settings.seed)
        say(f"fitting the baselines to {len(train):,} pairs")
    baselines, kind = Baselines(train), "TF-IDF of words and pairs of words, logistic regression"
    fitted = {"kind": kind, "C": C, "min_df": MIN_PAIRS, "pairs": len(train or ()), "missing": baselines.missing}
    results["baselines"] = fitted
    for pairs in outcome.data.reported:
        results["sets"][pairs.name]["results"] |= measured(pairs, baselines.predict(pairs), settings.seed)
    say(f"\n{table(results)}")  # before anything can go wrong with files
    write(settings, results, outcome)
    if settings.out is not None:
        say(f"\nwritten: {settings.out}")


def of_model(number: int, outcome: Outcome, seed: int) -> Results:
    """Facts of the number-th set, and the model's `results` by its name and the rule, fine-tuned before zero-shot."""
    pairs, guesses = outcome.data.reported[number], dict[str, list[int]]()
    for who, scores in reversed(outcome.scores.items()):
        one = scores[number]
        rules = {"": one.log_likelihood, ", per character": one.per_character, ", PMI": one.pmi}
        guesses |= {who + rule: values.argmax(1).tolist() for rule, values in rules.items()}
    cut = {"premises_cut": one.n_cut, "cut_beyond_the_premise": one.n_beyond}
    return pairs.facts() | cut | {"results": measured(pairs, guesses, seed)}


def measured(pairs: PairSet, guesses: Mapping[str, list[int] | None], seed: int) -> Results:
    """Every predictor's numbers by its name; None where it is not available."""
    return {name: guess and measure(pairs.labels, guess, seed) for name, guess in guesses.items()}


def write(settings: Settings, results: Results, outcome: Outcome) -> None:
    if (out := settings.out) is None:
        return
    try:
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if settings.predictions:
            with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in prediction_rows(outcome))
        for number, (name, one) in enumerate(results["sets"].items(), 1):
            plot_set(name, one, out / ("nli.png" if len(results["sets"]) == 1 else f"nli-{number}.png"))
    except OSError as error:
        raise UserError("--out", out, f"cannot be written ({error})", "make room or choose another place") from error


def prediction_rows(outcome: Outcome) -> Iterator[Results]:
    """A row a pair of each set, `pair` counted from 0 among those with a gold label."""
    for number, pairs in enumerate(outcome.data.reported):
        for i, pair in enumerate(pairs.pairs):
            row: Results = {"set": pairs.name, "pair": i, "gold": LABELS[pair.label]}
            for who, scores in outcome.scores.items():
                values = scores[number].log_likelihood[i]
                by_label = dict(zip(LABELS, values.tolist(), strict=True))
                row[who.replace("-", "_")] = {"predicted": LABELS[values.argmax()], "log_likelihood": by_label}
            yield row


def table(results: Results) -> str:
    """Of each set every predictor's accuracy and macro-F1, then the classes and the confusion of the first."""
    parts, missing, shares = [], results["baselines"]["missing"], ("precision", "recall", "f1")
    for name, one in results["sets"].items():
        notes = {
            "others have no gold label": one["without_gold_label"],
            "premises cut to fit": one["premises_cut"],
            "lost more than the premise": one["cut_beyond_the_premise"],
        }
        title = ", ".join([f"{name}: {one['pairs']:,} pairs", *(f"{n:,} {note}" for note, n in notes.items() if n)])
        rows = [_numbers(who, numbers, missing) for who, numbers in one["results"].items()]
        first, numbers = next(iter(one["results"].items()))
        header = [first, "precision", "recall", "F1", "pairs", *(f"→ {label}" for label in LABELS)]
        classes = [
            [label, *(f"{of[key]:.3f}" for key in shares), *(f"{count:,}" for count in (of["gold"], *row))]
            for (label, of), row in zip(numbers["classes"].items(), numbers["confusion"], strict=True)
        ]
        accuracies = aligned(["", "accuracy", "95% interval", "macro-F1", "95% interval"], rows, left={0})
        parts += [title, accuracies, aligned(header, classes, left={0})]
    return "\n\n".join(parts)


def _numbers(who: str, numbers: Results | None, missing: str | None) -> list[str]:
    if numbers is None:
        return [f"{who}, not available: {missing}", *["–"] * 4]
    pairs = ((numbers[key], *numbers[f"{key}_interval"]) for key in ("accuracy", "macro_f1"))
    return [who, *(cell for mean, low, high in pairs for cell in (f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"))]


def plot_set(name: str, one: Results, out_png: Path) -> None:
    """Draw one set of `report`'s results."""
    found = {who: numbers for who, numbers in one["results"].items() if numbers is not None}
    first, accuracies = next(iter(found)), {who: numbers["accuracy"] for who, numbers in found.items()}
    colours = [COLOURS[0] if who.startswith(("zero-shot", "fine-tuned")) else "#b9c2c9" for who in found]
    with picture(out_png, (11.0, 4.4), layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.35))
        draw_counts(left, found[first]["confusion"], LABELS)
        left.set(xlabel=f"predicted ({first})", ylabel="gold")
        draw_bars(right, accuracies, [of["accuracy_interval"] for of in found.values()], colours)
        right.set_xlabel("accuracy, with its 95% interval")
        figure.suptitle(f"{Path(name).name}, {one['pairs']:,} pairs", fontsize=10)
