"""The task files for lm-evaluation-harness ask what tools/evaluate_nli.py asks, and find the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.nli.pairs import HUB, LABELS
from megabus.nli.settings import Template
from megabus.testing.ranks import run_ranks
from tests.support.forked import run_python
from tests.support.later import Later
from tests.support.nli_data import rows_of, run_tool, write_rows, write_run

datasets = Later("datasets")
TASKS = Path(__file__).parents[2] / "configs/eval/nli"


class Loader(yaml.SafeLoader):
    """Takes lm-eval's !function for text."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def load(name):
    return yaml.load((TASKS / name).read_text(), Loader)


def test_the_prompt_is_the_same():
    shared = load("_shared")
    assert shared["doc_to_text"].replace("{{", "{").replace("}}", "}") == Template().text
    assert tuple(shared["doc_to_choice"]) == Template().labels
    assert shared["target_delimiter"] == ""
    assert load("megabus_nli_snli.yaml")["dataset_path"] == HUB["snli"][0]
    path, reported, _ = HUB["mnli"]
    for split in reported:
        task = load(f"megabus_nli_mnli_{split.removeprefix('validation_')}.yaml")
        assert (task["dataset_path"], task["test_split"]) == (path, split)


def test_lm_eval_finds_the_same_accuracy(tmp_path):
    """The documented command on an exported model without a network: a local file, and a data set of the hub's form."""
    run, rows = write_run(tmp_path), rows_of(40, seed=5)
    rows.insert(3, rows[0] | {"gold_label": "-"})
    pairs = write_rows(tmp_path / "dev.jsonl.gz", rows)
    with OpenFiles() as files:
        convert(open_source(run, files), tmp_path / "export", "hf")
    options = ["--valid", pairs, "--max-length", "40", "--out", tmp_path / "out", "--predictions"]
    ((code, _, err),) = run_ranks(1, run_tool, [run, *options])
    assert (code, err) == (0, "")

    tasks = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    hub = {"include": "megabus_nli_snli.yaml", "task": "hub_form", "dataset_path": str(write_hub(tmp_path, rows))}
    (tasks / "hub_form.yaml").write_text(yaml.safe_dump(hub))
    model = f"pretrained={tmp_path / 'export'},trust_remote_code=True,dtype=float32,max_length=40"
    arguments = ["--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "8", "--log_samples"]
    arguments += ["--tasks", "megabus_nli_local,hub_form", "--include_path", str(tasks)]
    arguments += ["--metadata", json.dumps({"pairs": str(pairs)}), "--output_path", str(tmp_path / "lm")]
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = run_python(["-m", "lm_eval", *arguments], env=os.environ | offline, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr

    (ours,) = json.loads((tmp_path / "out/results.json").read_text())["sets"].values()
    assert 0 < ours["premises_cut"] < ours["pairs"] == 40
    (found,) = (tmp_path / "lm").rglob("results_*.json")
    for task in ("megabus_nli_local", "hub_form"):
        theirs = json.loads(found.read_text())["results"][task]
        assert theirs["acc,none"] == pytest.approx(ours["results"]["zero-shot"]["accuracy"])
        assert theirs["acc_norm,none"] == pytest.approx(ours["results"]["zero-shot, per character"]["accuracy"])
    assert largest_difference(tmp_path) <= 1e-4


def write_hub(folder, rows):
    """The same pairs as a data set with SNLI's columns, in a directory that `load_dataset` reads."""
    labels = [-1 if row["gold_label"] == "-" else LABELS.index(row["gold_label"]) for row in rows]
    columns = {"premise": [row["sentence1"] for row in rows], "hypothesis": [row["sentence2"] for row in rows]}
    (folder / "hub").mkdir()
    datasets.Dataset.from_dict(columns | {"label": labels}).to_parquet(folder / "hub/test.parquet")
    return folder / "hub"


def largest_difference(folder):
    """Between the two tools' log-likelihoods, over all pairs and labels."""
    ours = [json.loads(line) for line in (folder / "out/predictions.jsonl").read_text().splitlines()]
    (samples,) = (folder / "lm").rglob("samples_megabus_nli_local_*.jsonl")
    theirs = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}
    assert len(ours) == len(theirs) == 40
    pairs = (
        (row["zero_shot"]["log_likelihood"][label], float(theirs[row["pair"]][number][0]))
        for row in ours
        for number, label in enumerate(LABELS)
    )
    return max(abs(a - b) for a, b in pairs)
