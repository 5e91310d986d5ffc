"""Pairs for lm-evaluation-harness, as megabus.nli.pairs reads them; needs nothing of megabus."""

import gzip
import json
from pathlib import Path

import datasets

LABELS = ("entailment", "neutral", "contradiction")
UNLABELLED = ("-", "-1")
FIELDS = ("sentence1", "sentence2", "gold_label")


def local_pairs(pairs=None, **_):
    """A file in SNLI's form as the split `test`; lm-eval passes --metadata and --model_args here."""
    if pairs is None:
        raise SystemExit("""error: name the file of pairs: --metadata '{"pairs": "dev.jsonl"}'""")
    opened = gzip.open if Path(pairs).suffix == ".gz" else open
    with opened(pairs, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for number, row in enumerate(rows, 1):
        missing = [field for field in FIELDS if field not in row]
        if missing or row["gold_label"] not in (*LABELS, *UNLABELLED):
            problem = f"has no {missing[0]}" if missing else f"has gold_label {row['gold_label']!r}"
            raise SystemExit(f"error: pairs = {pairs}: pair {number} {problem}; mend it")
    columns = {
        "premise": [row["sentence1"] for row in rows],
        "hypothesis": [row["sentence2"] for row in rows],
        "label": [LABELS.index(row["gold_label"]) if row["gold_label"] in LABELS else -1 for row in rows],
    }
    return {"test": datasets.Dataset.from_dict(columns)}


def labelled(data):
    """Without the pairs on which the annotators did not agree."""
    return data.filter(lambda row: row["label"] >= 0)
