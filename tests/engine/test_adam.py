"""Implementations of AdamW: the same run with any of them, through a growth and a resume; clear words for none."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from support.small_runs import refusal, rows_of, run_config, start, stop_after, write_corpus

LAYOUTS = [{"tp": 2}, {"dp": 2}, {"pp": 2}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def losses(config):
    return [(row["step"], row["loss"]) for row in rows_of(config, "step")]


@pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("g++") is None, reason="DeepSpeed builds its own with them"
)
def test_deepspeeds_is_torchs_to_rounding(corpus, tmp_path, pytestconfig, monkeypatch):
    # Built once a checkout, before ranks are timed; without what debuggers read, which is 40% of the compiler's time.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(pytestconfig.cache.mkdir("torch_extensions")))
    flags = CPUAdamBuilder().cxx_args()
    monkeypatch.setattr(CPUAdamBuilder, "cxx_args", lambda self: [flag for flag in flags if flag != "-g"])
    DeepSpeedCPUAdam([torch.zeros(1)])
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
