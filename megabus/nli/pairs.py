"""Labelled pairs of sentences: JSONL in SNLI's form, and SNLI, MNLI and their like through `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from megabus.config.read import described
from megabus.data.hub import only_retries
from megabus.data.order import permute
from megabus.errors import UserError
from megabus.plain_file import NotPlainError, open_regular

GoldLabel = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[str, ...] = get_args(GoldLabel)  # in the order of SNLI's and MNLI's label ids


class PairRow(BaseModel, strict=True):
    """A pair as SNLI 1.0's and MultiNLI 1.0's files have it; - (-1 on the hub) where the annotators did not agree."""

    gold_label: Literal[GoldLabel, "-", "-1"]
    sentence1: str
    sentence2: str


COLUMNS = {"label": "gold_label", "premise": "sentence1", "hypothesis": "sentence2"}  # the hub's names of the same


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

    def facts(self) -> dict[str, Any]:
        """What it is, as JSON has it; sha256: of labels and sentences in order, whatever file they came in."""
        digest = hashlib.sha256(b"".join(json.dumps(pair).encode() + b"\n" for pair in self.pairs)).hexdigest()
        gold = {label: self.labels.count(place) for place, label in enumerate(LABELS)}
        facts = {"name": self.name, "pairs": len(self), "without_gold_label": self.skipped}
        return facts | {"gold": gold, "sha256": digest}

    def first(self, limit: int | None) -> PairSet:
        return replace(self, pairs=self.pairs[:limit])

    def sample(self, limit: int | None, seed: int) -> PairSet:
        """`limit` pairs drawn without replacement: the first ones of the seed's permutation."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, pairs=[self.pairs[permute(i, len(self), seed, 0)] for i in range(limit)])


def read_jsonl(path: Path, key: str) -> PairSet:
    """Pairs of a file in SNLI's form, gzipped where its name ends with .gz. `key` names the file's option in errors."""
    try:
        with open_regular(path, links=True) as raw, gzip.open(raw, "rb") if path.suffix == ".gz" else raw as file:
            lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
            return _pair_set(key, str(path), lines, PairRow.model_validate_json)
    except (OSError, EOFError, zlib.error, NotPlainError) as error:
        raise UserError(key, path, f"cannot be read ({error})", "check the file") from error


# By its name the path of a data set, the splits that are reported, and the one that a fine-tuning is watched on.
HUB = {
    "snli": ("stanfordnlp/snli", ("test",), "validation"),
    # Its test labels were never published, so its two validation splits are what papers report.
    "mnli": ("nyu-mll/multi_nli", ("validation_matched", "validation_mismatched"), "validation_matched"),
}


class Hub:
    """A data set of the hub, or a local directory of the same form (parquet files, or what `save_to_disk` wrote)."""

    def __init__(self, name: str) -> None:
        import datasets  # seconds to import, and local files do without

        only_retries(datasets)
        datasets.disable_progress_bars()
        self.name, (path, self.reported, self.watched) = name, HUB.get(name.lower(), (name, ("test",), "validation"))
        saved = (Path(path) / "dataset_dict.json").is_file()
        try:
            self.splits = (datasets.load_from_disk if saved else datasets.load_dataset)(path)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            remedy = "check the name and the connection, or give local files with --valid and --train"
            raise UserError("--data", name, f"cannot be read ({error})", remedy) from error

    def read(self, split: str) -> PairSet:
        if split not in self.splits:
            raise UserError("--split", split, f"is no split of {self.name}", f"choose among {', '.join(self.splits)}")
        try:
            data = self.splits[split].select_columns(list(COLUMNS)).rename_columns(COLUMNS)
        except ValueError as error:
            raise UserError("--data", self.name, f"split {split}: {error}", f"it needs {', '.join(COLUMNS)}") from error
        names = dict(enumerate(getattr(data.features["gold_label"], "names", None) or LABELS))

        def named(row: dict[str, Any]) -> PairRow:
            return PairRow.model_validate(row | {"gold_label": names.get(row["gold_label"], str(row["gold_label"]))})

        rows = ((f"row {number}", row) for number, row in enumerate(data))
        return _pair_set("--data", f"{self.name}/{split}", rows, named)


def _pair_set(key: str, name: str, rows: Iterable[tuple[str, Any]], parse: Callable[[Any], PairRow]) -> PairSet:
    """Check and keep the rows, each behind its place; `key` is the option that `name` was given to."""
    parsed = []
    for place, given in rows:
        try:
            parsed.append(parse(given))
        except ValidationError as error:
            raise described(error, PairRow).within(f"{key} = {name}, {place}") from None
    labelled = [row for row in parsed if row.gold_label in LABELS]
    if not labelled:
        raise UserError(key, name, f"holds no pair with a gold label ({len(parsed)} without)", "give labelled pairs")
    pairs = [Pair(LABELS.index(row.gold_label), row.sentence1, row.sentence2) for row in labelled]
    return PairSet(name, pairs, len(parsed) - len(pairs))
