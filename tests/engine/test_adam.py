"""Implementations of AdamW: the same run with any of them, through a growth and a resume; clear words for none."""

from __future__ import annotations

import sys
import types

import pytest
from support.small_runs import refusal, rows_of, run_config, start, stop_after, write_corpus

LAYOUTS = [{"tp": 2}, {"dp": 2}, {"pp": 2}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def losses(config):
    return [(row["step"], row["loss"]) for row in rows_of(config, "step")]


@pytest.mark.usefixtures("deepspeed_adam")
def test_deepspeeds_is_torchs_to_rounding(corpus, tmp_path):
    found = {}
    for name in ("torch", "deepspeed"):
        config = run_config(corpus, tmp_path / name, LAYOUTS, optimizer__implementation=name, log={"every": 1})
        start(config, 2, stop_after(12))  # after the first growth
        ranks = start(config, 2)
        assert ranks[0].steps[-1].optimizer_step > 12  # the moments, and their count, came along
        found[name] = losses(config)
    assert len(found["torch"]) == len(found["deepspeed"]) > 20
    for (step, a), (other, b) in zip(found["torch"], found["deepspeed"], strict=True):
        assert step == other
        assert abs(a - b) <= 1e-4


def test_what_is_not_there_is_told(corpus, tmp_path):
    """The registry's apex, a web toolkit, is not NVIDIA's."""

    def another_apex():
        sys.modules["apex"] = types.ModuleType("apex")

    config = run_config(corpus, tmp_path / "run", LAYOUTS, optimizer__implementation="apex")
    assert "optimizer.implementation = apex: cannot be used here (ModuleNotFoundError" in refusal(
        config, 2, another_apex
    )
