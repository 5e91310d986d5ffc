"""Steps whose loss or gradient is no number: skipped to the bit, then undone, then the end of the run."""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist

from megabus.data.batches import TokenSource
from megabus.engine.engine import Engine, StepResult
from megabus.model.decoder import Decoder
from megabus.report.history import read_metrics
from megabus.train import loop
from tests.support.small_runs import (
    VOCAB,
    attempt,
    checkpoints,
    consumed,
    digest,
    quick_config,
    read_state_of,
    read_tokens,
    rows_of,
    start,
    stop_after,
    write_corpus,
    write_tokens,
)

BAD = VOCAB - 1
T, ROWS = 16, 8
STEP = T * ROWS  # tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Without the bad token."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    for name in ("train", "valid"):
        write_tokens(folder / name, read_tokens(folder / name) % BAD)
    return folder


def poisoned(corpus, folder, steps, rows=(ROWS - 1,)):
    """The corpus with a bad token in these rows of each of these steps, counted from 1 in the order of the data."""
    folder.mkdir(exist_ok=True)
    tokens = read_tokens(corpus / "train")
    source = TokenSource([(str(corpus / "train"), 1.0)], T, 0, VOCAB)
    for step, row in product(steps, rows):
        _, first, _ = source.sample_span((step - 1) * STEP + row * T, T)
        tokens[first + 5] = BAD
    write_tokens(folder / "train", tokens)
    write_tokens(folder / "valid", read_tokens(corpus / "valid"))
    return folder


def nan_loss(rank=None):
    """A bad target makes the loss NaN where it is computed (None: on all such ranks), and nowhere else."""
    whole = Decoder.loss

    def loss(self, h, targets):
        found, losses = whole(self, h, targets)
        bad = (targets == BAD).any() and rank in (None, dist.get_rank())
        return found * (math.nan if bad else 1.0), losses

    Decoder.loss = loss


def nan_gradient(rank):
    """Bad data makes one gradient of one rank NaN; its loss is a number."""

    def change():
        train_step = Engine.train_step

        def step(self, batches, lr):
            bad = any((tokens == BAD).any() for batch in batches for tokens in batch)
            factor = math.nan if bad and dist.get_rank() == rank else 1.0
            hook = next(self.module.parameters()).register_hook(lambda gradient: gradient * factor)
            result = train_step(self, batches, lr)
            hook.remove()
            return result

        Engine.train_step = step

    return change


def left_out(*calls):
    """Optimizer steps that are not even begun: what a skipped step must equal."""

    def change():
        train_step, called = Engine.train_step, []

        def step(self, batches, lr):
            called.append(lr)
            if len(called) in calls:
                return StepResult(math.nan, math.nan)
            return train_step(self, batches, lr)

        Engine.train_step = step

    return change


def configured(corpus, run_dir, layout, steps=6, **changes):
    changes = {"growth__stages": [], "growth__max_tokens": None} | changes
    return quick_config(corpus, run_dir, [layout, {}, {}], train__max_tokens=STEP * steps, **changes)


LAYOUTS = {
    "tp": ({"tp": 2}, {"train__micro_batch_size": 4}),
    "pp": ({"pp": 2}, {"train__micro_batch_size": 4}),
    "dp": ({"dp": 2}, {}),
    "zero2": ({"dp": 2}, {"train__zero_stage": 2}),
    "bf16": ({"dp": 2}, {"train__precision": "bf16"}),
    "bf16 zero2 tp": ({"tp": 2}, {"train__precision": "bf16", "train__zero_stage": 2}),
    "bf16 pp gpt": ({"pp": 2}, {"train__precision": "bf16", "model__kind": "gpt"}),
}
FOUR = {
    "zero2 tp dp": ({"tp": 2, "dp": 2}, {"train__zero_stage": 2}),
    "pp dp": ({"pp": 2, "dp": 2}, {}),
    "bf16 tp pp": ({"tp": 2, "pp": 2}, {"train__precision": "bf16"}),
    "bf16 tp dp": ({"tp": 2, "dp": 2}, {"train__precision": "bf16"}),
}


# The loss is NaN where row 7 is read; the gradients of one rank, where rows 0 and 7 are.
WAYS = [(name, nan_loss, (ROWS - 1,)) for name in LAYOUTS]
ONE = [("tp", 1), ("pp", 0), ("pp", 1), ("bf16", 0), *zip(FOUR, (3, 0, 1, 2), strict=True)]
WAYS += [(name, nan_gradient(rank), (0, ROWS - 1)) for name, rank in ONE]
WAYS += [("tp", partial(nan_loss, 1), (ROWS - 1,))]  # of a loss that both ranks compute


@pytest.mark.parametrize(("name", "how", "rows"), WAYS)
def test_such_a_step_is_skipped(corpus, tmp_path, name, how, rows):
    """Steps 3 and 4: masters, moments and weights of all ranks stay as they are, to the bit, and the run goes on as
    if there had been none."""
    layout, options = (LAYOUTS | FOUR)[name]
    bad = poisoned(corpus, tmp_path / "bad", (3, 4), rows)
    config = configured(bad, tmp_path / "run", layout, **options)
    ranks = start(config, math.prod(layout.values()), how)
    for rank in ranks:
        assert rank.numbers == [1, 2, 3, 4, 5, 6]
        digests = [step.digest for step in rank.steps]
        assert digests[1] == digests[2] == digests[3]
        assert len(set(digests)) == 4
        assert [step.optimizer_step for step in rank.steps] == [1, 2, 2, 2, 3, 4]
        assert (rank.progress.nonfinite, rank.progress.nonfinite_in_a_row) == (2, 0)
    assert [row["step"] for row in rows_of(config, "skip")] == [3, 4]
    assert [row["step"] for row in rows_of(config, "step")] == [1, 2, 5, 6]
    assert all(math.isfinite(row["loss"]) for row in rows_of(config, "eval"))
    assert read_state_of(config, 6)["progress"]["nonfinite"] == 2

    if how is nan_loss:
        reference = start(configured(bad, tmp_path / "reference", layout, **options), 2, left_out(3, 4))
        for rank, other in zip(ranks, reference, strict=True):
            assert [step.digest for step in rank.steps] == [step.digest for step in other.steps]


def records_returns(folder):
    """What every rank holds after a return to a checkpoint, in a file of its own."""

    def change():
        roll_back = loop.roll_back

        def recorded(run):
            roll_back(run)
            (folder / f"{dist.get_rank()}.digest").write_text(digest(run.engine))

        loop.roll_back = recorded

    return change


GROWN = {
    "growth__max_tokens": 4 * STEP,
    "growth__stages": [{"d_model": 52, "n_heads": 3, "d_ff": 90, "layout": {"pp": 2}}],
    "checkpoint": {"every": 3},
    "faults": {"max_skips": 1},
    "eval__every": 2,
}


def test_too_many_in_a_row_are_undone(corpus, tmp_path):
    """The run grows after step 4, in the middle of the series. It returns to step 3 and to the smaller size, passes
    over the data of steps 4 and 5, and grows again."""
    config = configured(poisoned(corpus, tmp_path / "bad", (4, 5)), tmp_path / "run", {"tp": 2}, 8, **GROWN)
    ranks = start(config, 2, nan_loss, records_returns(tmp_path), stop_after(7))
    for number, rank in enumerate(ranks):
        assert rank.numbers == [1, 2, 3, 4, 5, 4, 5, 6, 7]
        assert [step.stage for step in rank.steps] == [0, 0, 0, 0, 1, 0, 1, 1, 1]
        assert [step.position // STEP for step in rank.steps] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
        assert (tmp_path / f"{number}.digest").read_text() == rank.steps[2].digest
        assert rank.progress.nonfinite == 2
    last = start(config, 2, nan_loss)
    assert [(step.step, step.position // STEP) for step in last[0].steps] == [(8, 9)]
    resume, _ = rows_of(config, "resume")
    assert (resume["step"], resume["stage"], resume["reason"], resume["changes"]) == (3, 0, "not finite", [])
    assert [row["step"] for row in rows_of(config, "growth")] == [4, 4]
    assert [row["step"] for row in rows_of(config, "save")] == [3, 4, 6, 7, 8]  # not at step 4 the first time
    told = read_metrics(config.run_dir)
    assert [row["step"] for row in told if row["event"] == "step"] == list(range(1, 9))
    assert [row["step"] for row in told if row["event"] == "growth"] == [4]
    assert all(math.isfinite(row["loss"]) for row in told if row["event"] in ("step", "eval"))

    # What the run reads after the return is what an undisturbed one reads there.
    undisturbed = start(configured(corpus, tmp_path / "undisturbed", {"tp": 2}, 10), 2)
    read = consumed([rank._replace(steps=rank.steps[5:]) for rank in ranks], ROWS) | consumed(last, ROWS)
    order = consumed(undisturbed, ROWS)
    assert read == {step: order[step + 2] for step in range(4, 9)}


def test_single_ones_do_not_add_up(corpus, tmp_path):
    """Neither in one start nor in two."""
    config = configured(poisoned(corpus, tmp_path / "bad", (2, 4, 6)), tmp_path / "run", {"dp": 2}, 7, **GROWN)
    start(config, 2, nan_loss, stop_after(5))
    ranks = start(config, 2, nan_loss)
    assert [(rank.numbers, rank.progress.nonfinite) for rank in ranks] == [([6, 7], 3)] * 2
    assert [row["reason"] for row in rows_of(config, "resume")] == ["start"]
    assert [row["step"] for row in rows_of(config, "step")] == [1, 3, 5, 7]


def test_a_run_that_cannot_be_saved_ends(corpus, tmp_path):
    """All data from step 4 on is bad: one return, and then one error on all ranks."""
    bad = poisoned(corpus, tmp_path / "bad", range(4, 30))
    config = configured(
        bad, tmp_path / "run", {"pp": 2}, checkpoint={"every": 3}, faults={"max_skips": 1, "max_rollbacks": 1}
    )
    ranks = attempt(config, 2, nan_loss)
    assert {rank.error for rank in ranks} == {
        "train.loss = nan: is not finite at step 5, the last of 2 such steps in a row, after 1 return(s) to a "
        "checkpoint; lower optimizer.lr or look at the data of those steps"
    }
    assert [rank.numbers for rank in ranks] == [[1, 2, 3, 4, 5, 4, 5]] * 2
    assert checkpoints(config) == ["latest", "step-00000003"]


def test_a_run_without_a_checkpoint_ends(corpus, tmp_path):
    bad = poisoned(corpus, tmp_path / "bad", range(2, 30))
    config = configured(bad, tmp_path / "run", {"dp": 2}, faults={"max_skips": 0})
    ranks = attempt(config, 2, nan_loss)
    assert {rank.error for rank in ranks} == {
        "train.loss = nan: is not finite at step 2, the last of 1 such steps in a row, and there is no checkpoint to "
        "return to; lower optimizer.lr or look at the data of those steps"
    }
    assert not (Path(config.run_dir) / "checkpoints").exists()


def test_nothing_is_saved_within_a_series(corpus, tmp_path):
    """But for a stop of a run that has saved nothing: then the next start goes on counting, and returns to it."""
    bad = poisoned(corpus, tmp_path / "bad", (3, 4))
    config = configured(bad, tmp_path / "run", {"dp": 2}, checkpoint={"every": 1, "keep_last": 9})
    start(config, 2, nan_loss)
    assert checkpoints(config) == ["latest", *(f"step-{step:08d}" for step in (1, 2, 5, 6))]
    assert [row["step"] for row in rows_of(config, "save")] == [1, 2, 5, 6]

    config = configured(bad, tmp_path / "stopped", {"dp": 2}, faults={"max_skips": 1})
    first = start(config, 2, nan_loss, stop_after(3))
    assert first[0].checkpoint == f"{config.run_dir}/checkpoints/step-00000003"  # there was no other
    assert read_state_of(config, 3)["progress"]["nonfinite_in_a_row"] == 1
    second = start(config, 2, nan_loss)
    for rank, before in zip(second, first, strict=True):
        assert rank.numbers == [4, 4, 5, 6]
        assert rank.begun == rank.steps[0].digest == before.steps[1].digest
    assert [(row["step"], row["reason"]) for row in rows_of(config, "resume")] == [(3, "start"), (3, "not finite")]


def test_a_save_that_was_due_within_a_series_comes_after_it(corpus, tmp_path, capfd):
    """And a stop within one waits for its end: an update, which is saved, or a return to the checkpoint before it."""
    bad = poisoned(corpus, tmp_path / "bad", (3, 4))
    config = configured(bad, tmp_path / "run", {"dp": 2}, checkpoint={"every": 4, "keep_last": 9})
    start(config, 2, nan_loss)
    assert [row["step"] for row in rows_of(config, "save")] == [5, 6]

    config = configured(bad, tmp_path / "stopped", {"dp": 2}, checkpoint={"every": 2}, faults={"max_skips": 2})
    first = start(config, 2, nan_loss, stop_after(3))
    folder = f"{config.run_dir}/checkpoints/step-00000005"
    assert [(rank.numbers, rank.stopped, rank.checkpoint) for rank in first] == [([1, 2, 3, 4, 5], True, folder)] * 2
    assert "asked to stop by SIGTERM: saving once the steps without an update are over\n" in capfd.readouterr().out

    config = configured(bad, tmp_path / "returned", {"dp": 2}, checkpoint={"every": 2}, faults={"max_skips": 1})
    first = start(config, 2, nan_loss, stop_after(3))
    folder = f"{config.run_dir}/checkpoints/step-00000002"
    assert [(rank.numbers, rank.stopped, rank.checkpoint) for rank in first] == [([1, 2, 3, 4], True, folder)] * 2
    second = start(config, 2, nan_loss)
    assert [rank.numbers for rank in second] == [[3, 4, 3, 4, 5, 6]] * 2
    reasons = [(2, "not finite"), (2, "start"), (2, "not finite")]
    assert [(row["step"], row["reason"]) for row in rows_of(config, "resume")] == reasons


def test_each_trouble_has_returns_of_its_own(corpus, tmp_path):
    """A checkpoint beyond the first one ends it: two troubles of one return each are no trouble of two."""
    faults = {"max_skips": 0, "max_rollbacks": 1}
    bad = poisoned(corpus, tmp_path / "bad", (3, 6))
    config = configured(bad, tmp_path / "run", {"dp": 2}, 7, checkpoint={"every": 2}, faults=faults)
    ranks = start(config, 2, nan_loss)
    assert [rank.numbers for rank in ranks] == [[1, 2, 3, 3, 4, 5, 5, 6, 7]] * 2
    worse = poisoned(corpus, tmp_path / "worse", (3, 4))
    at_once = configured(worse, tmp_path / "again", {"dp": 2}, checkpoint={"every": 2}, faults=faults)
    ranks = attempt(at_once, 2, nan_loss)
    (error,) = {rank.error for rank in ranks}
    assert "is not finite at step 3, the last of 1 such steps in a row, after 1 return(s) to a checkpoint" in error


def test_a_loss_without_a_number_whose_gradient_is_one(corpus, tmp_path):
    """What is told as a step without an update is one."""

    def nan_told():
        whole = Decoder.loss

        def loss(self, h, targets):
            found, losses = whole(self, h, targets)
            return found + (math.nan if (targets == BAD).any() else 0.0), losses

        Decoder.loss = loss

    config = configured(poisoned(corpus, tmp_path / "bad", (3,)), tmp_path / "run", {"dp": 2}, 4)
    ranks = start(config, 2, nan_told)
    assert [row["step"] for row in rows_of(config, "skip")] == [3]
    for rank in ranks:
        assert rank.steps[2].digest == rank.steps[1].digest
