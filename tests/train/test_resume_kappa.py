"""An interruption moves no growth that kappa triggers: the monitor remembers all that it saw."""

from __future__ import annotations

import shutil

import pytest

from megabus.kappa.monitor import KappaMonitor
from megabus.report.history import read_metrics
from tests.support.small_runs import read_state_of, rows_of, run_config, start, stop_after, untimed, write_corpus

CONSTANT = {"predictor": "constant", "constant": 3.0}
FIRST, SECOND = {"d_model": 52, "n_heads": 4, "d_ff": 90}, {"n_layers": 4}
# The trigger, the growths, and what a control forgets of the monitor's state.
CASES = {
    "fit": (
        {"predictor": "fit", "kappa": 0.12, "min_evals": 5, "patience": 2, "max_std": 2.0},
        [FIRST],
        {"curve": []},
    ),
    "patience": (CONSTANT | {"kappa": 0.4, "min_evals": 3, "patience": 3}, [FIRST], {"met": 0}),
    "two growths": (
        CONSTANT | {"kappa": 0.3, "min_evals": 2, "patience": 1},
        [FIRST | {"kappa": 0.3}, SECOND],
        {"curve": []},
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def configured(corpus, run_dir, case):
    trigger, stages, _ = CASES[case]
    return run_config(
        corpus,
        run_dir,
        [{"tp": 1}] * 3,
        growth__max_tokens=None,
        growth__stages=stages,
        growth__trigger=trigger,
        train__max_tokens=1664,
        train__micro_batch_size=8,
        optimizer__schedule="constant",
        eval__every=1,
        eval__tokens=128,
    )


def forget(some):
    """A monitor that is restored without some of its state."""

    def change():
        load = KappaMonitor.load_state_dict
        KappaMonitor.load_state_dict = lambda self, state: load(self, state | some)

    return change


def growth_steps(config):
    assert {row["reason"] for row in rows_of(config, "growth")} <= {"kappa"}
    return [row["step"] for row in rows_of(config, "growth")]


@pytest.mark.parametrize("case", CASES)
def test_growth_by_kappa_is_not_moved(corpus, tmp_path, case):
    """Neither by a stop long before it, nor by one at the step before it, in the middle of its patience."""
    trigger, stages, lost = CASES[case]
    whole = configured(corpus, tmp_path / "whole", case)
    start(whole, 1)
    growths = growth_steps(whole)
    assert len(growths) == len(stages)
    assert 4 < growths[-1] < 15

    config = configured(corpus, tmp_path / "run", case)
    for last in (growths[-1] // 2, growths[-1] - 1):
        start(config, 1, stop_after(last))
    assert read_state_of(config, last)["monitor"]["met"] == trigger["patience"] - 1
    shutil.copytree(tmp_path / "run", tmp_path / "control")
    start(config, 1)
    assert growth_steps(config) == growths
    assert untimed(read_metrics(config.run_dir)) == untimed(read_metrics(whole.run_dir))

    control = configured(corpus, tmp_path / "control", case)
    start(control, 1, forget(lost))
    assert growth_steps(control) != growths
