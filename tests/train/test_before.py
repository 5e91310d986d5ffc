"""What speaks against a run is told before anything of it is opened, measured or made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megabus.checkpoint.state import STATE, without_run
from megabus.checkpoint.store import checkpoints_of
from megabus.config import Layout, resolve_stages
from megabus.config.schema import PreflightConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.convert.convert import convert
from megabus.engine import ds_config
from megabus.errors import UserError
from megabus.estimate import devices
from megabus.train import before
from megabus.train.before import _checked
from tests.support import altered
from tests.support.small_runs import refusal, run_config, write_corpus
from tests.support.sources import MemorySource, model_config


def noted(config):
    return _checked(config, resolve_stages(config, 1))


def told(config):
    with pytest.raises(UserError) as caught:
        noted(config)
    return str(caught.value)


def config_of(tmp_path, **changes):
    return run_config(tmp_path, tmp_path / "run", [{}, {}, {}], **changes)


def test_a_configuration_is_judged_by_itself(tmp_path):
    wrong = {"predictor": "constant", "constant": -1.0, "kappa": 0.99}
    assert told(config_of(tmp_path, growth__trigger=wrong)).startswith("growth.trigger.constant = -1.0: ")
    few = {"predictor": "reference", "reference": [[1e3, 4.0]]}
    assert told(config_of(tmp_path, growth__trigger=few)).startswith("growth.trigger.reference = ")
    assert "nothing ends this stage" in told(config_of(tmp_path, growth__max_tokens=None, optimizer__decay_share=1.0))
    assert noted(config_of(tmp_path)) == ([], [])


def test_what_a_run_would_begin_with_is_read(tmp_path):
    assert told(config_of(tmp_path, init_from=str(tmp_path / "none"))).startswith(f"checkpoint = {tmp_path / 'none'}: ")
    other = tmp_path / "other"
    write_checkpoint(MemorySource(model_config("ngpt")), checkpoints_of(other), Layout(1, 1, 1))
    assert told(config_of(tmp_path, init_from=str(other))).startswith("model.n_heads = 2: is 4 in ")


def test_sequences_longer_than_the_weights_context_are_told(tmp_path):
    """By config.json; by the run that a checkpoint comes from; by nothing where weights alone say none."""
    config = config_of(tmp_path, init_from=str(tmp_path / "hf"))
    source = MemorySource(resolve_stages(config, 1)[0].model)
    convert(source, tmp_path / "hf", "hf")
    said = json.loads((tmp_path / "hf/config.json").read_text())
    for context, n in ((32, 0), (31, 1)):
        (tmp_path / "hf/config.json").write_text(json.dumps(said | {"max_position_embeddings": context}))
        assert len(noted(config).warned) == n
    (line,) = noted(config).warned
    assert line.startswith(
        f"seq_len 32: the longest sequence of the weights of {tmp_path / 'hf'} is 31; positions beyond"
    )
    for name, trained, n in (("alone", {}, 0), ("other", {"train": {"seq_len": 8}, "growth": {"stages": []}}, 1)):
        source.state.config = trained
        write_checkpoint(without(source), checkpoints_of(tmp_path / name), Layout(1, 1, 1))
        assert len(noted(config_of(tmp_path, init_from=str(tmp_path / name))).warned) == n


def without(source):
    """Weights alone."""
    source.state = without_run(source.state, source.state.model)
    return source


def test_what_a_run_would_go_on_from_is_read(tmp_path):
    run = tmp_path / "run"
    newest = altered.write_run(run, layout=(1, 1, 1))
    config = altered.run_of(model_config("ngpt")).model_copy(update={"run_dir": str(run)})
    assert noted(config) == ([], [])
    none = config.model_copy(update={"growth": config.growth.model_copy(update={"stages": [], "max_tokens": None})})
    assert told(none) == (
        f"growth.stages = 0: has 0 growths, {newest.name} comes after growth 1; keep the growths that were made"
    )
    wider = config.model_copy(update={"model": config.model.grown(d_model=37)})
    assert told(wider).startswith(f"model.d_model = 37: is 36 in {newest}; ")
    strict = config.model_copy(update={"resume": "strict"})
    lr = strict.model_copy(update={"optimizer": strict.optimizer.model_copy(update={"lr": 0.5})})
    assert told(lr) == f"optimizer.lr = 0.5: was 0.01 in {newest}; set it back, or resume=auto"
    (newest / STATE).write_text("{")  # is set aside later, and the one before it is read
    assert told(none).startswith(f"growth.stages = 0: has 0 growths, {newest.with_name('step-00000007').name} ")
    shutil.rmtree(newest)
    assert noted(config) == ([], [])


def test_it_comes_before_the_data_is_opened(tmp_path):
    """Of two faults the one that needs no files is told; nothing is left behind."""
    config = config_of(tmp_path, growth__max_tokens=None, optimizer__decay_share=1.0, preflight={})
    assert refusal(config, 1).startswith("growth.max_tokens = (missing): nothing ends this stage")
    assert not (tmp_path / "run").exists()
    write_corpus(tmp_path)
    assert "the file does not exist" in refusal(config_of(tmp_path / "none", preflight={}), 1)  # the control


def test_what_cannot_fit_is_refused_with_a_preflight_or_without(tmp_path):
    wide = config_of(tmp_path, growth={"stages": [{"d_model": 2**20, "d_ff": 2**20}], "max_tokens": 1024})
    assert told(wide).startswith("growth.stages.0 = stage 1: takes 1")
    assert "on this machine at least, which has " in told(wide)
    assert told(wide.model_copy(update={"preflight": PreflightConfig()})) == told(wide)


def test_what_a_gpu_cannot_hold_is_refused_with_layouts_that_fit(tmp_path, monkeypatch):
    """By the estimate: the states alone would fit."""
    monkeypatch.setattr(ds_config, "BUCKET_ENTRIES", 10_000)  # which several ranks have: more than all of this model
    config = config_of(tmp_path, train__seq_len=512, train__micro_batch_size=8, growth={"stages": []})
    (stage,) = resolve_stages(config, 1)
    need = max(memory.total for memory in before.pipeline_memory(config, stage, True))
    monkeypatch.setattr(before, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setitem(devices.DEVICES, "h100", replace(devices.DEVICES["h100"], reserve=0))
    gpu = SimpleNamespace(name="Tesla T4", total_memory=need, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    (eager,), _ = noted(config)
    assert eager.startswith("train.kernels: auto computes in eager form: ")
    assert noted(config.model_copy(update={"train": config.train.model_copy(update={"kernels": "eager"})}))[0] == []
    assert noted(config)[1] == []
    gpu.total_memory = need - 1
    (warned,) = noted(config)[1]
    assert warned.startswith("model = stage 0: takes some ")
    gpu.total_memory = -(-need * 10 // 11) + 1  # 110 %
    assert len(noted(config)[1]) == 1
    gpu.total_memory = need * 10 // 11 - 1
    message = told(config)
    assert message.startswith("model = stage 0: takes some ")
    assert " of a GPU in TP1/PP1/DP1 by the estimate, and a Tesla T4 has " in message
    fit = message.partition("these would fit: ")[2].split("; ")
    assert len(fit) == 3
    assert "TP1/PP1/DP1 with micro_batch_size 4, recompute false" in fit[0]
    gpu.total_memory = 10_000
    assert "on this machine at least, which has 9.8 KiB; " in told(config)  # not even the states
