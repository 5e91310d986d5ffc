"""Pairs for lm-evaluation-harness, as megabus.nli.pairs reads them; needs nothing of megabus."""

import gzip
import json
from pathlib import Path

import datasets

LABELS = ("entailment", "neutral", "contradiction")


def local_pairs(pairs=None, **_):
    """A file in SNLI's form as the split `test`; lm-eval passes --metadata and --model_args here."""
    if pairs is None:
        raise SystemExit("""error: name the file of pairs: --metadata '{"pairs": "dev.jsonl"}'""")
    opened = gzip.open if Path(pairs).suffix == ".gz" else open
    with opened(pairs, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    columns = {
        "premise": [row["sentence1"] for row in rows],
        "hypothesis": [row["sentence2"] for row in rows],
        "label": [-1 if row["gold_label"] == "-" else LABELS.index(row["gold_label"]) for row in rows],
    }
    return {"test": datasets.Dataset.from_dict(columns)}


def labelled(data):
    """Without the pairs on which the annotators did not agree."""
    return data.filter(lambda row: row["label"] >= 0)
