"""NLI scores and fine-tuning: what one plain process computes, under every layout; each pair once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import megabus
from megabus.checkpoint.load import checkpoint_at
from megabus.convert.convert import convert, open_source
from megabus.convert.source import OpenFiles
from megabus.data.tokenizer import Tokenizer
from megabus.errors import UserError
from megabus.nli.pairs import LABELS, Pair
from megabus.nli.settings import Settings, Template
from megabus.testing.ranks import run_ranks
from tests.support.nli_data import rows_of, run_tool, write_rows, write_run

LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}]
TUNED = [{}, {"dp": 2}, {"tp": 2, "pp": 2}]  # those that are fine-tuned in, too
N = 23  # of no batch a multiple
TEMPLATE = Template().text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("nli"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    dev = rows_of(N, seed=1)
    dev.insert(4, dev[0] | {"gold_label": "-"})
    return write_rows(folder / "dev.jsonl", dev), write_rows(folder / "train.jsonl.gz", rows_of(160, seed=2))


def world_of(layout):
    return int(np.prod(list(layout.values()), dtype=int))


def evaluate(settings):
    from megabus.nli.run import evaluate

    return evaluate(settings)


def outcomes(settings, layout):
    """Of every rank."""
    return run_ranks(world_of(layout), evaluate, settings.model_copy(update=layout))


def plain_scores(run, rows, max_length=None):
    """Log-likelihoods (N, 3) in one process, a sequence at a time, without the code under test."""
    model, tokenizer = megabus.load(run), Tokenizer(checkpoint_at(run) / "tokenizer.model")
    table = torch.empty(len(rows), 3)
    for i, row in enumerate(rows):
        prompt = TEMPLATE.format(premise=row["sentence1"], hypothesis=row["sentence2"])
        for j, label in enumerate((" True", " Neither", " False")):
            tokens, n_prompt = torch.tensor(tokenizer.encode(prompt + label)), len(tokenizer.encode(prompt))
            n_label = len(tokens) - n_prompt
            tokens = tokens if max_length is None else tokens[-(max_length + 1) :]
            with torch.no_grad():
                log_probs = model(tokens[None, :-1])[0].log_softmax(-1)
            table[i, j] = log_probs[-n_label:].gather(1, tokens[-n_label:, None]).sum()
    return table.numpy()


# ---- scores


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_those_of_one_plain_process(run, files, layout):
    """Every rank has every pair's score, once, whatever the layout; pairs without a label are left out."""
    rows = rows_of(N, seed=1)
    expected = plain_scores(run, rows)
    assert np.ptp(expected, axis=1).min() > 1e-3  # control: labels differ
    for outcome in outcomes(Settings(checkpoint=run, valid=files[0], micro_batch_size=3), layout):
        pairs, scores = outcome.data.reported[0], outcome.scores["zero-shot"][0]
        assert (len(pairs), pairs.skipped, scores.n_cut) == (N, 1, 0)
        assert outcome.facts["checkpoint"]["step"] == 7
        assert [LABELS[label] for label in pairs.labels] == [row["gold_label"] for row in rows]
        assert scores.log_likelihood.shape == (N, 3)
        assert np.abs(scores.log_likelihood - expected).max() <= 1e-5
        assert (scores.log_likelihood.argmax(1) == expected.argmax(1)).all()


def test_long_premises_lose_their_beginning(run, files):
    rows = rows_of(N, seed=1)
    (outcome,) = outcomes(Settings(checkpoint=run, valid=files[0], max_length=30), {})
    scores = outcome.scores["zero-shot"][0]
    lengths = [len(Tokenizer(checkpoint_at(run) / "tokenizer.model").encode(row["sentence1"])) for row in rows]
    assert 0 < scores.n_cut < N
    assert scores.n_beyond == 0
    assert min(lengths) < max(lengths)
    assert np.abs(scores.log_likelihood - plain_scores(run, rows, 30)).max() <= 1e-5


def test_variants_of_the_score(run, files):
    (outcome,) = outcomes(Settings(checkpoint=run, valid=files[0]), {})
    scores = outcome.scores["zero-shot"][0]
    expected = plain_scores(run, rows_of(N, seed=1))
    empty = plain_scores(run, [{"sentence1": "N/A", "sentence2": "N/A"}])
    assert np.abs(scores.per_character - expected / [5, 8, 6]).max() <= 1e-5
    assert np.abs(scores.pmi - (expected - empty)).max() <= 2e-5


def test_weights_may_lie_in_a_hugging_face_directory(run, files, tmp_path):
    with OpenFiles() as opened:
        convert(open_source(run, opened), tmp_path / "hf", "hf")
    for outcome in outcomes(Settings(checkpoint=tmp_path / "hf", valid=files[0], max_length=500), {"tp": 2}):
        assert outcome.facts["checkpoint"] == {"path": str(tmp_path / "hf"), "step": 0}
        scores = outcome.scores["zero-shot"][0].log_likelihood
        assert np.abs(scores - plain_scores(run, rows_of(N, seed=1))).max() <= 1e-5


def test_bf16_is_near(run, files):
    (outcome,) = outcomes(Settings(checkpoint=run, valid=files[0], precision="bf16"), {})
    difference = np.abs(outcome.scores["zero-shot"][0].log_likelihood - plain_scores(run, rows_of(N, seed=1)))
    assert 1e-5 < difference.max() < 0.5


# ---- prompts


def encoder_of(run, template=None, max_length=500):
    from megabus.nli.score import Encoder

    return Encoder(Tokenizer(checkpoint_at(run) / "tokenizer.model"), template or Template(), max_length)


def test_what_is_cut_is_the_premise_even_behind_other_text(run):
    """The text before the premise stays, then the premise's end, then all that follows."""
    template = Template("Facts: {premise} Claim: {hypothesis} It is", (" so", " open", " not so"))
    short, long = encoder_of(run, template, 40), encoder_of(run, template)
    premise, hypothesis = "the cat and " * 12 + "the dog.", "the bird is red."
    whole, cut = long.encode(Pair(0, premise, hypothesis), 2), short.encode(Pair(0, premise, hypothesis), 2)
    n_head = len(long.tokenizer.encode("Facts: "))
    tokens = whole.sequence.tokens
    assert (cut.sequence.n_inputs, cut.sequence.n_scored, cut.beyond) == (40, whole.sequence.n_scored, False)
    assert cut.n_cut == whole.sequence.n_inputs - 40
    assert cut.sequence.tokens == tokens[:n_head] + tokens[n_head + cut.n_cut :]


def test_a_long_hypothesis_loses_its_beginning_last(run):
    pair = Pair(0, "I saw a cat.", "the cat and " * 12 + "the dog is red.")
    scored, whole = encoder_of(run, max_length=24).encode(pair, 0), encoder_of(run).encode(pair, 0)
    assert (scored.sequence.n_inputs, scored.beyond) == (24, True)
    assert scored.sequence.tokens == whole.sequence.tokens[-25:]


def test_space_at_a_prompts_end_belongs_to_the_label(run):
    """As in lm-evaluation-harness: pieces begin with their space."""
    spaced = encoder_of(run, Template(TEMPLATE + " ", tuple(label.strip() for label in Template().labels)))
    assert spaced.encode(Pair(0, "a", "b"), 1) == encoder_of(run).encode(Pair(0, "a", "b"), 1)


def test_an_empty_prompt_begins_with_the_end_of_a_document(run):
    encoder = encoder_of(run, Template("{premise}{hypothesis}"))
    scored = encoder.encode(Pair(0, "", ""), 0).sequence
    assert scored.tokens[0] == encoder.tokenizer.eod
    assert scored.n_scored == scored.n_inputs


TEMPLATES = {
    "{premise} {hypothesis} {other}": "and no other field",
    "{premise} {}": "and no other field",
    "{premise}": "must hold {hypothesis} once",
    "{premise}{premise}{hypothesis}": "{premise} at most once",
    "{hypothesis} {hypothesis}": "must hold {hypothesis} once",
    "{premise {hypothesis}": "is malformed",
}


@pytest.mark.parametrize(("text", "problem"), TEMPLATES.items(), ids=str)
def test_wrong_templates_are_told(text, problem):
    with pytest.raises(UserError) as caught:
        Template(text)
    assert str(caught.value).startswith("--template = ")
    assert problem in str(caught.value)


def test_wrong_labels_are_told(run):
    with pytest.raises(UserError, match="--labels = neutral=' Yes': is blank or another label's too"):
        Template(labels=(" No", " Yes", " Yes"))
    with pytest.raises(UserError, match="--labels = contradiction=' ': is blank or"):
        Template(labels=(" No", " Yes", " "))
    with pytest.raises(UserError, match=r"max_length = 3: is less than the \d+ tokens of ' neither"):
        encoder_of(run, Template(labels=(" True", " neither the one nor the other", " False")), max_length=3)


# ---- fine-tuning

TUNING = {"fine_tune": True, "epochs": 2, "lr": 4e-2, "batch_size": 8, "curve_every": 20, "curve_pairs": 10}


@pytest.fixture(scope="module")
def tuned(run, files, tmp_path_factory):
    """The same fine-tuning under several layouts."""
    found = {}
    for layout in TUNED:
        folder = tmp_path_factory.mktemp("tuned") / "run"
        micro = 2 if layout else None  # several micro batches a step, or one
        settings = Settings(
            checkpoint=run, valid=files[0], train=files[1], save=folder, micro_batch_size=micro, **TUNING
        )
        found[str(layout)] = outcomes(settings, layout)[0]
    return found


def curve_of(outcome):
    return outcome.facts["fine_tuning"]["curve"]


def guesses_of(outcome):
    return outcome.scores["fine-tuned"][0].log_likelihood.argmax(1)


def test_fine_tuning_learns(tuned):
    outcome = tuned["{}"]
    gold = outcome.data.reported[0].labels
    assert (outcome.scores["zero-shot"][0].log_likelihood.argmax(1) == gold).mean() < 0.7
    assert (outcome.scores["fine-tuned"][0].log_likelihood.argmax(1) == gold).mean() > 0.9
    curve = curve_of(outcome)
    assert [row["step"] for row in curve] == [0, 20, 40]
    assert curve[-1]["train_loss"] < 1 < curve[1]["train_loss"]
    assert curve[-1]["valid_accuracy"] > 0.9
    assert [row["lr"] for row in curve][-1] == pytest.approx(4e-2 * 0.5 / 40)
    assert outcome.facts["unit_error"] <= 1e-6  # it stays on the sphere


@pytest.mark.parametrize("layout", TUNED[1:], ids=str)
def test_fine_tuning_does_not_depend_on_the_layout(tuned, layout):
    one, other = tuned["{}"], tuned[str(layout)]
    for a, b in zip(curve_of(one), curve_of(other), strict=True):
        assert (a["step"], a["lr"], a["valid_accuracy"]) == (b["step"], b["lr"], b["valid_accuracy"])
        assert abs(a["valid_loss"] - b["valid_loss"]) <= 3e-5  # after 40 steps
        assert a["step"] == 0 or abs(a["train_loss"] - b["train_loss"]) <= 3e-5
    assert (guesses_of(one) == guesses_of(other)).all()
    assert other.facts["unit_error"] <= 1e-6


def test_the_saved_model_is_the_fine_tuned_one(tuned):
    for outcome in tuned.values():
        folder = Path(outcome.facts["fine_tuning"]["saved"])
        assert folder.name == "step-00000040"
        assert (folder / "tokenizer.model").is_file()
        scores = plain_scores(folder, rows_of(N, seed=1))
        assert np.abs(scores - outcome.scores["fine-tuned"][0].log_likelihood).max() <= 1e-5


def test_the_report_and_its_files(run, files, tmp_path):
    """Everything the numbers depend on, and each pair once, from the command line as a single process."""
    options = ["--valid", files[0], "--train", files[1], "--out", tmp_path / "out", "--predictions"]
    ((code, out, err),) = run_ranks(1, run_tool, [run, *options])
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["checkpoint"]["step"] == 7
    assert results["settings"]["template"]["text"] == TEMPLATE
    assert results["settings"]["max_length"] == 2048  # of a model whose run is not known
    assert results["train"]["pairs"] == 160
    (one,) = results["sets"].values()
    assert (one["pairs"], one["without_gold_label"]) == (N, 1)
    assert one["results"]["hypothesis n-grams"]["accuracy"] == 1.0  # the colour decides
    for name, numbers in one["results"].items():
        assert name in out
        assert f"{numbers['accuracy']:.3f}" in out
        assert sum(map(sum, numbers["confusion"])) == N
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["pair"] for line in lines] == list(range(N))
    right = sum(line["zero_shot"]["predicted"] == line["gold"] for line in lines)
    assert right == one["results"]["zero-shot"]["correct"]
    assert (tmp_path / "out/nli.png").read_bytes().startswith(b"\x89PNG")
