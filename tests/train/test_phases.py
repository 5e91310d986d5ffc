"""Runs whose samples change with the budget, and with growths: weights, lengths and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megabus.checkpoint.state import read_state
from megabus.config import resolve_stages
from megabus.config.phases import KEYS
from megabus.data.order import Deal
from megabus.data.sources import open_sources
from megabus.model.cost import flops_per_token
from megabus.report.history import read_rows
from tests.support.small_runs import (
    VOCAB,
    after_step,
    read_state_of,
    rows_of,
    run_config,
    start,
    stop_after,
    untimed,
    write_corpus,
    write_tokens,
)

# Of 2048 tokens, with a growth after 512: the first phase comes before it. Micro batches so far are no multiple of 10.
PHASES = [
    {"share": 0.1, "weights": [1, 1], "micro_batch_size": 1},
    {"share": 0.6, "seq_len": 32, "global_batch_size": 10},
    {"share": 0.8, "weights": [0, 1], "seq_len": 8, "micro_batch_size": 2, "global_batch_size": 12},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    write_tokens(folder / "other", np.random.default_rng(4).integers(0, VOCAB, 6000).tolist())
    return folder


@pytest.fixture(scope="module")
def config_of(corpus):
    def make(run_dir, layouts=({}, {}), **changes):
        blend = [{"path": str(corpus / "train"), "weight": 3}, {"path": str(corpus / "other"), "weight": 1}]
        tree = {
            "growth__stages": [{"n_layers": 5, "layout": layouts[1]}],
            "growth__max_tokens": 512,
            "train__max_tokens": 2048,
            "train__phases": PHASES,
            "data__train": blend,
            "eval__every": 5,
            "eval__tokens": 128,
            "checkpoint__every": 100,
        }
        return run_config(corpus, run_dir, [layouts[0], {}, {}], **tree | changes)

    return make


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    """A run on one rank at one go, and its configuration."""
    config = config_of(tmp_path_factory.mktemp("whole") / "run")
    return start(config, 1), config


def test_each_step_takes_the_samples_of_its_phase(whole):
    """Its length, batch and cost; the log says when a phase begins, and κ's curve begins anew there."""
    ranks, config = whole
    stages, rows = resolve_stages(config, 1), rows_of(config, "step")
    assert len(rows) == len(ranks[0].steps)
    tokens, flops = 0, 0.0
    for step, row in zip(ranks[0].steps, rows, strict=True):
        part = stages[step.stage].at(tokens / 2048)
        assert len(step.samples) == part.global_batch_size
        assert {len(sample) // 8 - 1 for sample in step.samples.values()} == {part.seq_len}
        tokens += part.tokens_per_step
        flops += part.tokens_per_step * flops_per_token(part.model, part.seq_len)
        assert (row["tokens"], row["flops"]) == (tokens, pytest.approx(flops))
    assert [row["changed"] for row in rows_of(config, "phase")] == [
        ["weights", "micro_batch_size"], ["seq_len", "global_batch_size"], list(KEYS)]  # fmt: skip
    assert [(row["share"] >= at, row["seq_len"], row["global_batch_size"]) for row, at in
            zip(rows_of(config, "phase"), (0.1, 0.6, 0.8), strict=True)] == [
        (True, 16, 8), (True, 32, 10), (True, 8, 12)]  # fmt: skip
    begun = [row["step"] for row in rows_of(config, "phase")]
    curves = {row["step"]: row["kappa_evals"] for row in rows_of(config, "eval") if "kappa_evals" in row}
    assert curves[begun[0]] == 1
    assert len(rows_of(config, "growth")) == 1
    assert rows_of(config, "eval")[-1]["loss"] > 0


def read_in(config, steps):
    """(corpus, first token, last token) of all samples of each step, by the order that the run has come to in the end:
    those that it has read."""
    stages = resolve_stages(config, 1)
    sources = open_sources(config, stages)
    deals = read_state_of(config, steps[-1].step)["progress"]["deals"]
    source, found = sources.train.dealt([Deal(deal["start"], tuple(deal["counts"])) for deal in deals]), []
    for step in steps:
        inputs, targets = source.batch(step.position, *size_of(step))
        samples = torch.cat([inputs, targets[:, -1:]], dim=1).numpy()
        assert [sample.tobytes() for sample in samples] == [step.samples[row] for row in sorted(step.samples)]
        seq_len, rows = size_of(step)
        found.append([source.sample_span(step.position + row * seq_len, seq_len) for row in rows])
    return found


def size_of(step):
    return len(step.samples[0]) // 8 - 1, range(len(step.samples))


def repeated(steps):
    """How many tokens were inputs more than once."""
    read = [(k, token) for spans in steps for k, start, stop in spans for token in range(start, stop - 1)]
    return len(read) - len(set(read))


def test_no_sample_comes_twice_and_weights_hold(whole):
    ranks, config = whole
    steps = read_in(config, ranks[0].steps)
    assert repeated(steps) == 0
    assert {k for spans in steps[:-2] for k, *_ in spans} == {0, 1}
    assert {k for spans in steps[-2:] for k, *_ in spans} == {1}  # alone in the last phase
    # Control: read on from where each phase began by the blend that every run begins with.
    source = open_sources(config, resolve_stages(config, 1)).train
    naive = [
        [source.sample_span(step.position + row * size_of(step)[0], size_of(step)[0]) for row in size_of(step)[1]]
        for step in ranks[0].steps[8:]
    ]
    assert repeated([*steps[:8], *naive]) > 0


def test_a_resumed_run_repeats_it_to_the_bit(whole, config_of, tmp_path):
    """Stopped at a change of the blend, and between one of lengths and the last."""
    ranks, whole_config = whole
    config = config_of(tmp_path / "run")
    first, second, _ = [row["step"] for row in rows_of(whole_config, "phase")]
    steps = [step for stop in (first, second + 1) for step in start(config, 1, stop_after(stop))[0].steps]
    steps += start(config, 1)[0].steps
    assert [step[:5] for step in steps] == [step[:5] for step in ranks[0].steps]
    assert [step.samples for step in steps] == [step.samples for step in ranks[0].steps]
    runs = config, whole_config
    for event in ("step", "eval", "growth", "phase", "gains"):
        ours, theirs = (untimed(rows_of(run, event)) for run in runs)
        assert ours == theirs
    ours, theirs = (read_state_of(run, steps[-1].step) for run in runs)
    assert ours["monitor"] == theirs["monitor"]
    assert ours["progress"] == theirs["progress"]
    assert [deal["start"] for deal in ours["progress"]["deals"]] == [0, 8, 60]


def test_layouts_read_the_same(whole, config_of, tmp_path):
    """Pipelines and replicas, grown from one to the other, and stopped and gone on in a third."""
    ranks, whole_config = whole
    config = config_of(tmp_path / "run", ({"pp": 2}, {"dp": 2}))
    third = rows_of(whole_config, "phase")[2]["step"]
    parts = [start(config, 2, stop_after(third - 1)), None]
    parts[1] = start(config_of(tmp_path / "run", ({"pp": 2}, {"tp": 2})), 2)
    read = {}
    for part in parts:
        for rank in part:
            for step in rank.steps:
                read.setdefault(step.step, {}).update(step.samples)
    assert read == {step.step: step.samples for step in ranks[0].steps}
    for name in ("loss", "grad_norm", "tokens", "flops"):
        ours, theirs = ([row[name] for row in rows_of(run, "step")] for run in (config, whole_config))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_after_a_return_nothing_comes_twice(config_of, tmp_path):
    """The steps behind a checkpoint are undone, in another phase of the run; their data is passed over."""

    def fail(run):
        run.progress.nonfinite = run.progress.nonfinite_in_a_row = 4

    short = {"growth__stages": [], "growth__max_tokens": None, "train__max_tokens": 1200}
    config = config_of(tmp_path / "run", checkpoint__every=5, **short)
    (rank,) = start(config, 1, after_step(8, fail, times=1))
    numbers = rank.numbers
    assert numbers[:8] == list(range(1, 9))
    assert numbers[8] == 6
    assert repeated(read_in(config, rank.steps)) == 0
    deals = read_state_of(config, numbers[-1])["progress"]["deals"]
    assert [deal["counts"] for deal in deals] == [[768, 256], [512, 512], [0, 1024], [512, 512], [0, 1024]]


def test_a_phase_may_begin_with_a_growth(config_of, tmp_path):
    """One row each, in that order; the loss after the growth is of the lengths before, and once more of those that
    come."""
    phases = [{"share": 0.25, "weights": [0, 1], "seq_len": 32, "global_batch_size": 4}]
    config = config_of(tmp_path / "run", train__phases=phases, train__max_tokens=1024, growth__max_tokens=256)
    (rank,) = start(config, 1)
    told = [row for row in read_rows(config.run_dir) if row["step"] == 2]
    told = [row for row in told if row["event"] in ("eval", "growth", "phase")]
    assert [row["event"] for row in told] == ["eval", "growth", "phase", "eval"]
    before, growth, phase, after = told
    assert growth["loss_before"] == before["loss"]
    assert growth["loss_after"] == pytest.approx(before["loss"], abs=1e-6)
    assert abs(after["loss"] - growth["loss_after"]) > 1e-4
    assert phase["changed"] == ["weights", "seq_len", "global_batch_size"]
    assert after["kappa_evals"] == 1 if "kappa_evals" in after else after["stage"] == 1
    steps = read_in(config, rank.steps)
    assert {k for spans in steps[2:] for k, *_ in spans} == {1}
    assert repeated(steps) == 0


def test_a_run_goes_on_with_longer_sequences(config_of, tmp_path):
    """Chunks are others then, and their numbers too: the weights that hold are dealt, and the checkpoints are whole."""
    phases = [{"share": 0.25, "weights": [0, 1]}]
    short = {"growth__stages": [], "growth__max_tokens": None, "train__max_tokens": 1024}
    start(config_of(tmp_path / "run", train__phases=phases, **short), 1, stop_after(3))
    config = config_of(tmp_path / "run", train__phases=[*phases, {"share": 0.7, "seq_len": 32}], **short)
    (first,) = start(config, 1, stop_after(4))
    assert read_state_of(config, 4)["monitor"]["curve"] == []  # what κ knew is of other samples
    (rank,) = start(config, 1)
    assert {k for spans in read_in(config, first.steps + rank.steps) for k, *_ in spans} == {1}
    state = read_state(Path(rank.checkpoint))
    assert state.progress.deals == (Deal(0, (0, 1024)),)
    phases = [(row["step"], row["seq_len"], row.get("changed")) for row in rows_of(config, "phase")]
    assert phases == [(2, 16, ["weights"]), (3, 16, None), (6, 32, ["seq_len"])]
