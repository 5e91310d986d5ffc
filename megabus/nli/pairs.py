"""Labelled pairs of sentences: JSONL in SNLI's form, and SNLI, MNLI and their like through `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megabus.data.order import permute
from megabus.errors import UserError

LABELS = ("entailment", "neutral", "contradiction")  # in the order of SNLI's and MNLI's label ids
UNLABELLED = ("-", "-1")  # the annotators did not agree: in SNLI's files, and on the hub
FIELDS = ("gold_label", "sentence1", "sentence2")  # SNLI 1.0 and MultiNLI 1.0 distribution
COLUMNS = ("label", "premise", "hypothesis")  # the same on the hub


class Pair(NamedTuple):
    """label: its place in LABELS."""

    label: int
    premise: str
    hypothesis: str


@dataclass(frozen=True)
class PairSet:
    """Labelled pairs in their file's order; `skipped` counts the file's others, which have no gold label."""

    name: str
    pairs: list[Pair]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labels(self) -> list[int]:
        return [pair.label for pair in self.pairs]

    @property
    def counts(self) -> dict[str, int]:
        return {label: self.labels.count(place) for place, label in enumerate(LABELS)}

    @property
    def sha256(self) -> str:
        """Of labels and sentences in order, whatever file they came in."""
        return hashlib.sha256(b"".join(json.dumps(pair).encode() + b"\n" for pair in self.pairs)).hexdigest()

    def first(self, limit: int | None) -> PairSet:
        return replace(self, pairs=self.pairs[:limit])

    def sample(self, limit: int | None, seed: int) -> PairSet:
        """`limit` pairs drawn without replacement: the first ones of the seed's permutation."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, pairs=[self.pairs[permute(i, len(self), seed, 0)] for i in range(limit)])


def read_jsonl(path: Path, key: str) -> PairSet:
    """Pairs of a file in SNLI's form, gzipped where its name ends with .gz. `key` names the file's option in errors."""
    number = 0

    def rows() -> Iterator[tuple[str, Any]]:
        nonlocal number
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)

    try:
        return _pair_set(str(path), rows(), FIELDS, key, path)
    except FileNotFoundError as error:
        raise UserError(key, path, "no such file", "check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(key, path, f"cannot be read ({error})", "check the file") from error
    except ValueError as error:  # of json, or of UTF-8
        raise UserError(key, path, f"line {number} is not JSON ({error})", "mend the line") from error


class HubData(NamedTuple):
    """Where a data set lies, which splits are reported, and on which one a fine-tuning is watched."""

    path: str
    reported: tuple[str, ...] = ("test",)
    watched: str = "validation"


HUB = {
    "snli": HubData("stanfordnlp/snli"),
    # Its test labels were never published, so its two validation splits are what papers report.
    "mnli": HubData("nyu-mll/multi_nli", ("validation_matched", "validation_mismatched"), "validation_matched"),
}


class Hub:
    """A data set of the hub, or a local directory of the same form (parquet files, or what `save_to_disk` wrote)."""

    def __init__(self, name: str) -> None:
        import datasets  # seconds to import, and local files do without

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what is raised below anyway
        datasets.disable_progress_bars()
        self.name, self.facts = name, HUB.get(name.lower(), HubData(name))
        saved = (Path(self.facts.path) / "dataset_dict.json").is_file()
        try:
            self.splits = (datasets.load_from_disk if saved else datasets.load_dataset)(self.facts.path)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            remedy = "check the name and the connection, or give local files with --valid and --train"
            raise UserError("--data", name, f"cannot be read ({error})", remedy) from error

    def read(self, split: str) -> PairSet:
        if split not in self.splits:
            raise UserError("--split", split, f"is no split of {self.name}", f"choose among {', '.join(self.splits)}")
        data = self.splits[split]
        if missing := [column for column in COLUMNS if column not in data.column_names]:
            problem = f"split {split} has no column {missing[0]}, its columns are {', '.join(data.column_names)}"
            raise UserError("--data", self.name, problem, f"it needs {', '.join(COLUMNS)}")
        names = dict(enumerate(getattr(data.features["label"], "names", None) or LABELS))
        rows = enumerate(data.select_columns(list(COLUMNS)))
        named = ((f"row {n}", row | {"label": names.get(row["label"], row["label"])}) for n, row in rows)
        return _pair_set(f"{self.name}/{split}", named, COLUMNS, "--data", self.name)


def _pair_set(name: str, rows: Iterator[tuple[str, Any]], fields: tuple[str, ...], key: str, value: object) -> PairSet:
    """Check and keep the rows; `key` and `value` say in an error where they came from."""

    def wrong(problem: str, remedy: str) -> UserError:
        return UserError(key, value, problem, remedy)

    pairs, skipped, place, needs = [], 0, "", f"needs {', '.join(fields)}"
    for place, row in rows:
        if not isinstance(row, dict):
            raise wrong(f"{place} is no JSON object", f"each line {needs}")
        if missing := [field for field in fields if field not in row]:
            raise wrong(f"{place} has no field {missing[0]}", f"each {needs}")
        label, *texts = (row[field] for field in fields)
        if str(label) in UNLABELLED:
            skipped += 1
            continue
        if label not in LABELS:
            allowed = f"allowed are {', '.join(LABELS)}, and {UNLABELLED[0]} for none"
            raise wrong(f"{place} has {fields[0]} {label!r}", allowed)
        for field, text in zip(fields[1:], texts, strict=True):
            if not isinstance(text, str):
                raise wrong(f"{place} has {field} {text!r}", "it must be text")
        pairs.append(Pair(LABELS.index(label), *texts))
    if not pairs:
        problem = f"holds no pair with a gold label ({skipped} without)" if place else "is empty"
        raise wrong(problem, "give labelled pairs")
    return PairSet(name, pairs, skipped)
