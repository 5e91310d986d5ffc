"""A step far out of the running scale moves nothing, on any rank; a lasting rise is undone, or accepted."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from megabus.config.faults import SpikesConfig
from megabus.engine.engine import StepResult
from megabus.model.decoder import Decoder
from megabus.report.history import read_rows, skipped_spikes
from megabus.report.plots import summary_table
from megabus.report.run_facts import faults, final_figures, read_run
from megabus.train import loop, spikes
from megabus.train.spikes import Level, Spikes, limits
from tests.support.small_runs import (
    digest,
    read_state_of,
    rows_of,
    run_config,
    start,
    stop_after,
    untimed,
    write_corpus,
)

STEP = 16 * 8  # tokens
SPIKES = {"window": 8, "deviations": 20.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def spiky(*steps, factor=50.0):
    """The loss of the data of these steps, counted from 1, is so many times what it is, and so are its gradients."""

    def change():
        whole, train_step, at = Decoder.loss, loop.train_step, [0]

        def loss(self, h, targets):
            found, losses = whole(self, h, targets)
            return found * (factor if at[0] in steps else 1.0), losses

        def stepping(run):
            at[0] = run.progress.position // STEP + 1
            train_step(run)
            at[0] = 0  # validations are as they are

        Decoder.loss, loop.train_step = loss, stepping

    return change


def configured(corpus, run_dir, layout=None, steps=9, **changes):
    changes = {"growth__stages": [], "growth__max_tokens": None, "faults": {"spikes": SPIKES}} | changes
    return run_config(corpus, run_dir, [layout or {}, {}, {}], train__max_tokens=STEP * steps, **changes)


def grown_after(steps):
    return {"growth__stages": [{"d_model": 52, "n_heads": 3, "d_ff": 90}], "growth__max_tokens": steps * STEP}


# ---- the scale ---------------------------------------------------------------------------------------------


def test_limits_are_those_of_median_and_mad():
    draw = np.random.default_rng(0)
    recent = [Level(*pair) for pair in draw.lognormal(size=(33, 2)).tolist()]
    for place, found in enumerate(limits(recent, 5.0)):
        values = [level[place] for level in recent]
        middle = statistics.median(values)
        spread = statistics.median(abs(value - middle) for value in values)
        assert found == pytest.approx(middle + 5 * 1.4826 * spread, rel=1e-14)


def test_limits_of_normal_noise_are_standard_deviations_and_outliers_do_not_move_them():
    draw = np.random.default_rng(1)
    recent = [Level(*pair) for pair in draw.normal(10, 0.5, size=(10_001, 2)).tolist()]
    spoiled = [Level(1e6, 1e6)] * 100 + recent[100:]
    for levels, tolerance in ((recent, 0.02), (spoiled, 0.05)):
        assert limits(levels, 4.0) == pytest.approx((12, 12), abs=tolerance * 4)
    assert np.std([level.loss for level in spoiled]) > 1e4  # what a standard deviation would make of it


def test_limits_of_equal_updates_leave_room():
    assert limits([Level(2.0, 0.5)] * 8, 10.0) == pytest.approx((2.02, 0.505))
    assert limits([Level(2.0, 0.0)] * 8, 10.0) == pytest.approx((2.02, math.inf))  # else no gradient could come back


def judged(monkeypatch, config, results):
    """What one rank answers about each step, and then sees of it."""
    monkeypatch.setattr(spikes.dist, "broadcast", lambda tensor, src: None)
    scale, answers = Spikes(config, torch.device("cpu")), []
    for loss, norm in results:
        asked = StepResult(loss, norm)
        refused = asked.is_finite and scale.asked is not None and scale.asked(asked)
        answers.append(refused)
        scale.see(StepResult(loss, norm, refused))
    return scale, answers


def test_which_steps_stand_out(monkeypatch):
    """Only once half the window is there, only upwards, of either figure; and no skipped step is in the scale."""
    calm = [(3.0 + 0.01 * (n % 3), 1.0 + 0.02 * (n % 4)) for n in range(8)]
    config = SpikesConfig(window=8, deviations=6.0)
    scale, answers = judged(monkeypatch, config, [(9.0, 9.0), *calm[:3], (9.0, 1.0), *calm[3:], (3.0, 9.0), (0.1, 0.1)])
    assert answers == [False] * 4 + [True] + [False] * 5 + [True, False]
    assert list(scale.recent) == [*calm[1:], (0.1, 0.1)]
    scale, answers = judged(monkeypatch, config, [*calm, (math.nan, 1.0), (9.0, 9.0)])
    assert answers == [False] * 9 + [True]
    assert (len(scale.recent), scale.stands_out) == (8, True)
    scale, answers = judged(monkeypatch, None, [*calm, (9.0, 9.0)])
    assert (any(answers), len(scale.recent), scale.asked) == (False, 0, None)


def test_which_of_the_two_ends_a_run(monkeypatch):
    """With its value and limit."""
    calm, config = [(3.0, 1.0)] * 8, SpikesConfig(window=8, deviations=20.0)
    cases = [
        ((9.87654, 9.0), ("train.loss", "9.877", "is a spike, above 3.06,")),
        ((3.0, 9.87654), ("train.grad_norm", "9.877", "is a spike, above 1.02,")),
        ((math.nan, 1.0), ("train.loss", "nan", "is not finite")),
        ((3.0, math.inf), ("train.grad_norm", "inf", "is not finite")),
    ]
    for step, told in cases:
        scale, _ = judged(monkeypatch, config, [*calm, step])
        assert scale.failure() == told


# ---- runs --------------------------------------------------------------------------------------------------

LAYOUTS = {
    "pp": ({"pp": 2}, {"train__micro_batch_size": 4}),
    "bf16 tp": ({"tp": 2}, {"train__precision": "bf16", "train__micro_batch_size": 4}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_spike_moves_nothing(corpus, tmp_path, name):
    """Masters, moments and weights of all ranks stay as they are, to the bit, and the run goes on."""
    layout, options = LAYOUTS[name]
    config = configured(corpus, tmp_path / "run", layout, steps=8, **options)
    for rank in start(config, 2, spiky(6, 7)):
        digests = [step.digest for step in rank.steps]
        assert digests[4] == digests[5] == digests[6]
        assert len(set(digests)) == 6
        assert [step.optimizer_step for step in rank.steps] == [1, 2, 3, 4, 5, 5, 5, 6]
        assert (rank.progress.nonfinite, rank.progress.nonfinite_in_a_row, rank.progress.spikes) == (2, 0, 2)
    told = rows_of(config, "skip")
    assert [(row["step"], row["reason"]) for row in told] == [(6, "spike"), (7, "spike")]
    assert all(row["loss"] > row["loss_limit"] > 0 and row["grad_norm"] > row["grad_norm_limit"] for row in told)
    assert read_state_of(config, 8)["progress"]["spikes"] == 2
    assert len(read_state_of(config, 8)["recent"]) == 6
    assert skipped_spikes(read_rows(config.run_dir)) == 2
    assert summary_table(config.run_dir).endswith("\nsteps skipped as spikes: 2")
    run = read_run(config.run_dir, "run")
    assert final_figures(run)["spikes skipped"] == "2"
    assert [fault["what"] for fault in faults(run)] == ["skipped spike"] * 2


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A run with one spike, and what its rank saw."""
    config = configured(corpus, tmp_path_factory.mktemp("undisturbed") / "run")
    return config, start(config, 1, spiky(7))[0]


def test_control_without_the_section_the_same_bits_until_a_spike_moves_the_weights(corpus, tmp_path, undisturbed):
    (rank,) = start(configured(corpus, tmp_path / "run", faults={}), 1, spiky(7))
    _, looked_for = undisturbed
    same = [a.digest == b.digest for a, b in zip(rank.steps, looked_for.steps, strict=True)]
    assert same == [True] * 6 + [False] * 3
    assert len({step.digest for step in rank.steps}) == 9


def test_a_resumed_run_has_the_same_scale(corpus, tmp_path, undisturbed):
    """Stopped in the middle of the window, before the spike."""
    whole, told = undisturbed
    cut = configured(corpus, tmp_path / "cut")
    start(cut, 1, spiky(7), stop_after(5))
    (second,) = start(cut, 1, spiky(7))
    assert second.steps == told.steps[5:]
    assert untimed(rows_of(cut, "skip")) == untimed(rows_of(whole, "skip")) != []
    assert read_state_of(cut, 9)["recent"] == read_state_of(whole, 9)["recent"]
    assert len(read_state_of(cut, 9)["recent"]) == 8


def test_a_growth_begins_the_scale_anew(corpus, tmp_path):
    """After step 6. Four updates later the next spike is told; the one in between is let through."""
    config = configured(corpus, tmp_path / "run", steps=12, **grown_after(6))
    (rank,) = start(config, 1, spiky(8, 12))
    assert [step.stage for step in rank.steps] == [0] * 6 + [1] * 6
    assert [row["step"] for row in rows_of(config, "skip")] == [12]
    assert len(read_state_of(config, 12)["recent"]) == 5


def records_bits(folder):
    def change():
        roll_back = loop.roll_back

        def recorded(run):
            roll_back(run)
            (folder / "digest").write_text(digest(run.engine))
            (folder / "recent").write_text(str(len(run.spikes.recent)))

        loop.roll_back = recorded

    return change


def test_other_samples_begin_the_scale_anew(corpus, tmp_path):
    """A phase of smaller batches after step 4, or a run that is resumed with them: the rise from there on is no spike.
    The validation before it is told once, and is the first point of κ's new curve."""
    smaller = {"train__phases": [{"share": 0.5, "global_batch_size": 4}]}
    config = configured(corpus, tmp_path / "run", steps=8, **smaller)
    (rank,) = start(config, 1, spiky(5, 6, 7, 8))
    assert rank.numbers == list(range(1, 13))
    assert not rows_of(config, "skip")
    assert len({step.digest for step in rank.steps}) == 12
    assert [row["step"] for row in rows_of(config, "eval")] == [0, 4, 8, 12]

    start(configured(corpus, tmp_path / "resumed"), 1, stop_after(4))
    config = configured(corpus, tmp_path / "resumed", steps=5, train__global_batch_size=4)
    start(config, 1, spiky(5))
    assert not rows_of(config, "skip")


def test_a_lasting_rise_is_undone(corpus, tmp_path):
    """The growth that the last of its steps has reached waits until it is come to again."""
    how = {"faults": {"max_skips": 1, "spikes": SPIKES}, "checkpoint": {"every": 5}}
    config = configured(corpus, tmp_path / "run", **how, **grown_after(8))
    (rank,) = start(config, 1, spiky(7, 8), records_bits(tmp_path))
    assert rank.numbers == [1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9]
    assert [step.position // STEP for step in rank.steps] == list(range(12))
    assert [step.stage for step in rank.steps] == [0] * 11 + [1]
    assert len(rows_of(config, "growth")) == 1
    assert (tmp_path / "digest").read_text() == rank.steps[4].digest
    assert (tmp_path / "recent").read_text() == "5"
    assert (rank.progress.nonfinite, rank.progress.spikes) == (2, 2)
    (resume,) = rows_of(config, "resume")
    assert (resume["step"], resume["reason"]) == (5, "spike")
    assert [fault["what"] for fault in faults(read_run(config.run_dir, "run"))][-1] == "rollback"


def test_a_lasting_rise_is_accepted(corpus, tmp_path):
    """From step 6 on the loss is what it is now: two steps are skipped, the others are the new scale. The second of
    them reaches a growth, which it does not keep from being made."""
    how = {"faults": {"max_skips": 1, "spikes": SPIKES | {"lasting": "accept"}}}
    config = configured(corpus, tmp_path / "run", steps=12, **how, **grown_after(7))
    (rank,) = start(config, 1, spiky(*range(6, 13)))
    assert rank.numbers == list(range(1, 13))
    assert [row["step"] for row in rows_of(config, "skip")] == [6, 7]
    assert len(read_state_of(config, 12)["recent"]) == 5
    assert rank.progress.nonfinite_in_a_row == 0
    assert [step.stage for step in rank.steps] == [0] * 7 + [1] * 5
