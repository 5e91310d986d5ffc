"""NLI's pairs and numbers: what is read and what is refused, metrics and baselines against scikit-learn's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megabus.errors import UserError
from megabus.nli.pairs import LABELS, Hub, Pair, PairSet, read_jsonl
from megabus.nli.settings import Settings
from megabus.testing.ranks import run_ranks
from tests.support.later import Later
from tests.support.nli_data import rows_of, run_tool, write_rows, write_run

datasets, metrics = Later("datasets"), Later("sklearn.metrics")
measures, results, evaluation, harness = (
    Later(f"megabus.{name}") for name in ("nli.measures", "nli.results", "nli.run", "scoring.harness")
)


def pair_set(n, seed=0, name="pairs"):
    rows = rows_of(n, seed)
    pairs = [Pair(LABELS.index(row["gold_label"]), row["sentence1"], row["sentence2"]) for row in rows]
    return PairSet(name, pairs)


def message_of(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_files_are_read_in_order(tmp_path, name):
    """Other fields and blank lines do no harm, a line separator within a sentence is text, unlabelled pairs count."""
    rows = rows_of(5)
    rows[2]["sentence1"] = "one\u2028two\x85three"
    rows.insert(1, rows[0] | {"gold_label": "-", "pairID": "7"})
    path = write_rows(tmp_path / name, rows)
    pairs = read_jsonl(path, "--valid")
    del rows[1]
    expected = [(LABELS.index(row["gold_label"]), row["sentence1"], row["sentence2"]) for row in rows]
    assert list(map(tuple, pairs.pairs)) == expected
    assert pairs.skipped == 1
    assert sum(pairs.facts()["gold"].values()) == len(pairs) == 5
    sums = [some.facts()["sha256"] for some in (pairs, replace(pairs, name="other"), pairs.first(4))]
    assert sums[0] == sums[1] != sums[2]


def test_samples_are_drawn_without_replacement():
    pairs = pair_set(40)
    some = pairs.sample(10, 1)
    assert len(some) == 10
    assert some.pairs == pairs.sample(20, 1).pairs[:10]
    assert some.pairs != pairs.sample(10, 2).pairs
    assert set(pairs.sample(39, 0).pairs) <= set(pairs.pairs)
    assert pairs.sample(None, 0) is pairs.sample(40, 0) is pairs


GOOD = {"gold_label": "neutral", "sentence1": "a", "sentence2": "b"}
REFUSED = {
    "no field": (
        [GOOD, {"gold_label": "neutral", "sentence1": "a"}],
        ", line 2: sentence2 = (missing): this key is needed; add it",
    ),
    "no label": ([GOOD, GOOD, {"sentence1": "a", "sentence2": "b"}], ", line 3: gold_label = (missing)"),
    "unknown label": (
        [GOOD | {"gold_label": "maybe"}],
        ", line 1: gold_label = maybe: Input should be 'entailment', 'neutral', 'contradiction', '-' or '-1'; give",
    ),
    "label of another kind": ([GOOD | {"gold_label": 0}], ", line 1: gold_label = 0: Input should be 'entailment'"),
    "label that is a list": ([GOOD | {"gold_label": ["neutral"]}], ", line 1: gold_label = ['neutral']: Input should"),
    "no text": ([GOOD, GOOD | {"sentence1": None}], ", line 2: sentence1 = None: Input should be a valid string"),
    "a number": ([GOOD | {"sentence2": 3}], ", line 1: sentence2 = 3: Input should be a valid string"),
    "no object": (
        [GOOD, [1, 2]],
        ", line 2 = [1, 2]: is no section of keys; give its keys (gold_label, sentence1, sent",
    ),
    "empty": ([], ": holds no pair with a gold label (0 without); give labelled pairs"),
    "unlabelled": ([GOOD | {"gold_label": "-"}] * 2, ": holds no pair with a gold label (2 without)"),
}


@pytest.mark.parametrize(("rows", "problem"), REFUSED.values(), ids=REFUSED)
def test_wrong_rows_are_told(tmp_path, rows, problem):
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert message_of(read_jsonl, path, "--train").startswith(f"--train = {path}{problem}")


def test_what_is_no_such_file_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    assert message_of(read_jsonl, path, "--valid").startswith(f"--valid = {path}: cannot be read ([Errno 2] No such")
    path.write_text(json.dumps(GOOD) + "\n\n{oh")
    assert message_of(read_jsonl, path, "--valid").startswith(f"--valid = {path}, line 3 = b'{{oh': Invalid JSON: ")
    path.write_bytes(b"\xff\xfe\n")
    assert message_of(read_jsonl, path, "--valid").startswith(
        f"--valid = {path}, line 1 = b'\\xff\\xfe\\n': Invalid JSON"
    )
    path.write_text(json.dumps([GOOD] * 300))  # all rows on one line
    assert len(message_of(read_jsonl, path, "--valid")) < 500
    path.write_text("x" * 1000)
    assert len(message_of(read_jsonl, path, "--valid")) < 500
    gz = write_rows(tmp_path / "b.gz", [GOOD] * 300)
    gz.write_bytes(gz.read_bytes()[:-12])
    assert "b.gz: cannot be read (" in message_of(read_jsonl, gz, "--valid")
    gz.write_text("plain")
    assert "b.gz: cannot be read (" in message_of(read_jsonl, gz, "--valid")


# ---- the hub's form


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The same pairs as parquet files and as `save_to_disk` writes them: labels are ids, -1 is none."""
    names = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(LABELS)),
        }
    )
    splits = {}
    for number, split in enumerate(("train", "validation", "test")):
        rows = rows_of((90, 12, 11)[number], seed=number)
        labels = [LABELS.index(row["gold_label"]) for row in rows]
        labels[3] = -1
        columns = {"premise": [r["sentence1"] for r in rows], "hypothesis": [r["sentence2"] for r in rows]}
        splits[split] = datasets.Dataset.from_dict(columns | {"label": labels}, features=names)
    folder = tmp_path_factory.mktemp("hub")
    (folder / "parquet").mkdir()
    for split, data in splits.items():
        data.to_parquet(folder / "parquet" / f"{split}.parquet")
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_data_sets_of_the_hubs_form(hub, form, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = Hub(str(hub / form))
    pairs, rows = data.read("test"), rows_of(11, seed=2)
    assert set(data.splits) == {"train", "validation", "test"}
    assert (len(pairs), pairs.skipped) == (10, 1)
    del rows[3]
    assert [pair.hypothesis for pair in pairs.pairs] == [row["sentence2"] for row in rows]
    assert [LABELS[label] for label in pairs.labels] == [row["gold_label"] for row in rows]
    problem = f"--split = dev: is no split of {hub / form}; choose among "
    assert message_of(data.read, "dev").startswith(problem)


def test_other_data_sets_are_told(tmp_path):
    columns = {"text": ["a"], "label": [0]}
    datasets.DatasetDict(test=datasets.Dataset.from_dict(columns)).save_to_disk(tmp_path / "d")
    told = message_of(Hub(str(tmp_path / "d")).read, "test")
    assert told.startswith(f"--data = {tmp_path / 'd'}: split test: Column name ['")
    assert told.endswith("Current columns in the dataset: ['text', 'label'].; it needs label, premise, hypothesis")
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [7]}
    datasets.DatasetDict(test=datasets.Dataset.from_dict(columns)).save_to_disk(tmp_path / "e")
    assert "e/test, row 0: gold_label = 7: Input should be 'entailment'" in message_of(
        Hub(str(tmp_path / "e")).read, "test"
    )
    assert "cannot be read (" in message_of(Hub, str(tmp_path / "nowhere"))


def test_a_hub_data_set_from_end_to_end(hub, tmp_path):
    """The test split is reported; the curve is of the validation split; the train split is trained on."""
    run = write_run(tmp_path)
    options = ["--data", hub / "saved", "--fine-tune", "--curve-every", "2", "--batch-size", "30"]
    told = run_ranks(2, run_tool, [run, *options, "--dp", "2", "--out", tmp_path / "out", "--train-limit", "80"])
    assert [(code, err) for code, _, err in told] == [(0, ""), (0, "")]
    assert told[1][1] == ""  # rank 0 speaks for all
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(name, one["pairs"]) for name, one in results["sets"].items()] == [(f"{hub / 'saved'}/test", 10)]
    assert results["fine_tuning"]["watched"]["name"].endswith("/validation")
    assert [row["step"] for row in results["fine_tuning"]["curve"]] == [0, 2, 3]
    assert results["train"]["pairs"] == 80
    (one,) = results["sets"].values()
    assert next(iter(one["results"])) == "fine-tuned"
    assert not (tmp_path / "out/predictions.jsonl").exists()


# ---- the command line


COMMANDS = {
    "nothing": ([], "--data = (missing): there is nothing to evaluate; give it, or --valid FILE"),
    "two sources": (["--data", "snli", "--valid", "{file}"], "--data = snli: and --valid are two sources"),
    "split of a file": (["--valid", "{file}", "--split", "test"], "--split = test: is of --data, which is not given"),
    "twice": (["--valid", "{file}", "--test", "{file}"], "--test = {file}: is --valid too; give it once"),
    "split twice": (["--data", "x", "--split", "a", "a"], "--split = a a: names one twice; give each once"),
    "no file": (["--valid", "nowhere"], "--valid = nowhere: Path does not point to a file"),
    "nothing to tune on": (["--valid", "{file}", "--fine-tune"], "--train = (missing): there is nothing to fine-tune"),
    "save": (["--valid", "{file}", "--save", "x"], "--save = x: there is nothing new to save; add --fine-tune"),
    "predictions": (["--valid", "{file}", "--predictions"], "--predictions = given: there is no directory"),
    "limit": (["--valid", "{file}", "--limit", "0"], "--limit = 0: Input should be greater than 0"),
    "short": (
        ["--valid", "{file}", "--max-length", "1", "--labels", "neutral= none of these"],
        "--max-length = 1: is less than the ",
    ),
    "no token": (
        ["--valid", "{file}", "--template", "{{hypothesis}} th", "--labels", "neutral=e"],
        "--labels = e: adds no token of its own to 'a th'",
    ),
    "not finite": (
        ["--valid", "{file}", "--train", "{file}", "--fine-tune", "--lr", "1e38", "--batch-size", "2", "--epochs", "9"],
        "--lr = 9.166666666666666e+37: the loss of step 2 is nan",
    ),
    "lr": (["--valid", "{file}", "--lr", "-1"], "--lr = -1: Input should be greater than 0"),
    "clip": (
        ["--valid", "{file}", "--gradient-clipping", "nan"],
        "--gradient-clipping = nan: Input should be a finite number",
    ),
    "warm-up": (
        ["--valid", "{file}", "--warmup-share", "2"],
        "--warmup-share = 2: Input should be less than or equal to 1",
    ),
    "seed": (["--valid", "{file}", "--seed", "-1"], "--seed = -1: Input should be greater than or equal to 0"),
    "layout": (["--valid", "{file}", "--layout", "tp=x"], "--tp = x: Input should be a valid integer"),
    "layout's key": (["--valid", "{file}", "--layout", "xp=2"], "--layout = xp=2: is not of the form KEY=VALUE"),
    "labels": (["--valid", "{file}", "--labels", "entailment"], "--labels = entailment: is not of the form KEY=VALUE"),
    "no such precision": (["--valid", "{file}", "--precision", "fp8"], "--precision = fp8: Input should be 'fp32'"),
    "template": (["--valid", "{file}", "--template", "x"], "--template = x: must hold {{hypothesis}} once"),
    "option": (["--valid", "{file}", "--bad"], "command line = "),
    "world": (["--valid", "{file}", "--tp", "2"], "layout = tp 2 x pp 1: cannot fill the world of 1 rank(s)"),
    "tp": (["--valid", "{file}", "--layout", "tp=3"], "layout = tp 3 x pp 1: cannot fill the world"),
    "batch": (
        ["--valid", "{file}", "--train", "{file}", "--fine-tune", "--batch-size", "6", "--micro-batch-size", "4"],
        "--batch-size = 6: is not divisible by --micro-batch-size x dp = 4 x 1; choose a multiple",
    ),
    "checkpoint": (["--valid", "{file}"], "checkpoint = {folder}: holds none"),
    "tokenizer": (["--valid", "{file}", "--tokenizer", "{file}"], "tokenizer = {file}: is not JSON (Extra data"),
    "vocabulary": (
        ["--valid", "{file}", "--tokenizer", "{other}"],
        "tokenizer = {other}: is another than the one saved in {folder}",
    ),
    "another tokenizer": (
        ["--valid", "{file}", "--tokenizer", "{smaller}"],
        "tokenizer = {smaller}: is another than the one saved in ",
    ),
    "bad rows": (["--valid", "{bad}"], "--valid = {bad}, line 1: gold_label = maybe: Input"),
    "out": (["--valid", "{file}", "--out", "{file}/x"], "--out = {file}/x: cannot be written ("),
    "save's place": (
        ["--valid", "{file}", "--train", "{file}", "--fine-tune", "--save", "{file}/x"],
        "--save = {file}/x: cannot be written (",
    ),
}


TEXTS = [" ".join(f"{a}{b}{c}" for a in "abcd" for b in "efgh" for c in "klmn")] * 9


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    from megabus.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("places")
    return {
        "run": write_run(folder),
        "folder": folder,
        "file": write_rows(folder / "good.jsonl", rows_of(4)),
        "bad": write_rows(folder / "bad.jsonl", [GOOD | {"gold_label": "maybe"}]),
        "other": train_tokenizer(TEXTS, 345, folder / "other", model_type="bpe"),
        "smaller": train_tokenizer(TEXTS, 300, folder / "smaller", model_type="bpe"),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_command_lines_are_told_in_one_line(places, name):
    arguments, problem = COMMANDS[name]
    checkpoint = places["folder"] if name == "checkpoint" else places["run"]
    options = [argument.format(**places) for argument in arguments]
    ((code, _, err),) = run_ranks(1, run_tool, [checkpoint, *options])
    assert code == 2
    assert err.startswith("error: " + problem.format(**places))
    assert err.count("\n") == 1


def test_a_full_directory_is_not_saved_into(places):
    run, file = places["run"], places["file"]
    settings = Settings(checkpoint=run, valid=file, train=file, fine_tune=True, save=run)
    assert "holds checkpoints already; choose another, or remove it" in message_of(settings.check)


# ---- metrics


def labels(n, seed, shares=(0.5, 0.3, 0.2)):
    return np.random.default_rng(seed).choice(3, n, p=shares)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(seed):
    gold = labels(60, seed)
    guess = np.where(labels(60, seed + 10) == 0, gold, labels(60, seed + 20, (0.9, 0.1, 0.0)))
    found = measures.measure(gold, guess, seed=0)
    assert found["confusion"] == metrics.confusion_matrix(gold, guess, labels=[0, 1, 2]).tolist()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(gold, guess))
    scores = metrics.precision_recall_fscore_support(gold, guess, labels=[0, 1, 2], zero_division=0)
    for label, *expected in zip(LABELS, *scores, strict=True):
        got = found["classes"][label]
        assert [got["precision"], got["recall"], got["f1"], got["gold"]] == pytest.approx(expected)
    assert found["macro_f1"] == pytest.approx(scores[2].mean())
    assert json.loads(json.dumps(found)) == found


def test_a_label_that_is_never_said_counts_as_zero():
    found = measures.measure([0, 0, 1, 2], [0, 0, 0, 0], seed=0)
    assert [one["f1"] for one in found["classes"].values()] == pytest.approx([2 / 3, 0, 0])
    assert found["macro_f1"] == pytest.approx(2 / 9)


def test_wilson_interval_is_the_closed_form():
    """Where a share p is just z standard errors from the measured one; 0 and n give shares within [0, 1]."""
    z = 1.959963984540054

    def wilson_interval(hits, total):
        return measures.measure([0] * total, [0] * hits + [1] * (total - hits), seed=0)["accuracy_interval"]

    for hits, total in ((0, 10), (3, 10), (10, 10), (555, 1000)):
        low, high = wilson_interval(hits, total)
        assert 0 <= low < high <= 1
        for p in (low, high):
            assert abs(hits / total - p) == pytest.approx(z * math.sqrt(p * (1 - p) / total), abs=1e-8)
    # Newcombe 1998, table I: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_the_bootstrap_is_one_over_pairs():
    """Drawing confusion matrices gives what drawing pairs gives, the same each time."""
    gold, guess = labels(200, 1), np.where(labels(200, 2) == 0, labels(200, 1), labels(200, 3))
    matrix = metrics.confusion_matrix(gold, guess)
    low, high = measures.bootstrap_macro_f1(matrix, seed=0)
    assert [low, high] == measures.bootstrap_macro_f1(matrix, seed=0) != measures.bootstrap_macro_f1(matrix, seed=1)
    draws = np.random.default_rng(0).integers(0, 200, (1000, 200))
    values = [measures.macro_f1(metrics.confusion_matrix(gold[d], guess[d])) for d in draws]
    assert (low, high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.015)
    assert low < measures.macro_f1(matrix) < high


# ---- baselines


def test_features():
    """Those of the hypothesis alone do not change with the premise; both sentences' know which is which."""
    pair = Pair(0, "A red cat.", "Red cats?")
    alone, both = (model[0].fit([pair, pair, Pair(0, "other", "words")]) for model in measures.classifiers().values())
    names = [name.split("__")[1] for name in alone.get_feature_names_out()]
    assert sorted(names) == sorted(["red", "cats", "?", "red cats", "cats ?"])
    assert (alone.transform([pair._replace(premise="x")]) != alone.transform([pair])).nnz == 0
    terms = ["countvectorizer-1__a red", "countvectorizer-2__red cats", "both:red", "new:cats", "missing:cat", "both"]
    assert {term if "__" in term else f"countvectorizer-3__{term}" for term in terms} <= {*both.get_feature_names_out()}
    assert measures.overlap(("a b", "B c b")) == ["both:b", "new:c", "both:b", "missing:a", "both", "new", "both"]


def test_baselines():
    """The colour is in the hypothesis, so its n-grams suffice; unknown words and empty sentences are passed over."""
    train, test = pair_set(90, 1), pair_set(30, 2)
    found = measures.Baselines(train).predict(test)
    assert found["hypothesis n-grams"] == test.labels
    assert found["premise + hypothesis n-grams"] == test.labels
    assert found["majority of training pairs"] == [np.argmax(np.bincount(train.labels))] * 30
    assert len(measures.Baselines(train).predict(PairSet("odd", [Pair(0, "", "")]))["hypothesis n-grams"]) == 1
    alone = measures.Baselines(None).predict(test)
    assert alone["majority of these pairs"] == [np.argmax(np.bincount(test.labels))] * 30
    assert alone["hypothesis n-grams"] is alone["premise + hypothesis n-grams"] is None
    tied = PairSet("tied", [Pair(label, "", "") for label in (2, 1, 2, 1)])
    equally_common = measures.Baselines(None).predict(tied)
    assert equally_common["majority of these pairs"] == [1] * 4  # the first of them


@pytest.mark.parametrize("pairs", [[Pair(1, "a b", "c d")] * 4, [Pair(0, "a", "b"), Pair(1, "c", "d")]])
def test_baselines_that_cannot_be_fitted_do_not_take_the_rest_along(pairs):
    """One label only; no term in two pairs."""
    baselines = measures.Baselines(PairSet("train", pairs))
    assert "cannot be fitted to these training pairs" in baselines.missing
    found = baselines.predict(pair_set(5, 1))
    assert found["hypothesis n-grams"] is None
    assert len(found["majority of training pairs"]) == 5


def test_the_table_and_the_picture(tmp_path):
    pairs = replace(pair_set(30, 2), skipped=2)
    values = np.eye(3)[np.array(pairs.labels)]
    scores = harness.Scores(values, values, values, n_cut=4, n_beyond=1)
    one = results.of_model(
        0, evaluation.Outcome(evaluation.Data(None, None, [pairs]), {"zero-shot": [scores]}, {}), seed=0
    )
    one["results"] |= results.measured(pairs, measures.Baselines(None).predict(pairs), seed=0)
    text = results.table({"sets": {"dev": one}, "baselines": {"missing": "no training pairs"}})
    assert text.startswith("dev: 30 pairs, 2 others have no gold label, 4 premises cut to fit, 1 lost more")
    assert "not available: no training pairs" in text
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("zero-shot ")).split()[1] == "1.000"
    assert max(map(len, lines)) <= 120
    results.plot_set("dev", one, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot be written" in message_of(results.plot_set, "dev", one, Path(tmp_path / "no/a.png"))
