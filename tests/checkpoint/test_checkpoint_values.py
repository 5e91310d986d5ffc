"""What state.json says is not believed because its hash is right: each value must be one that some run could have."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import megabus
from megabus.checkpoint.manifest import MANIFEST, DamagedError
from megabus.checkpoint.relations import check_relations
from megabus.checkpoint.state import STATE, WRITTEN, Progress, SavedState
from megabus.checkpoint.store import checkpoints_of
from megabus.config import Layout
from megabus.config.rope import RopeScaling
from megabus.convert.checkpoint import write_checkpoint
from megabus.model.cost import count_parameters, totals
from megabus.parallel.fragments import KINDS
from megabus.plain_file import VALUES
from tests.support import altered
from tests.support.sources import MemorySource, model_config

# ---- values: each is (key, value), or a whole text


class Told(NamedTuple):
    """A value that is told as something else than its key: what it does not fit."""

    value: Any
    by: str


WRONG_VALUES = {
    "stage": [-1, "0", 0.0, True, None, 2**63, *(Told(n, f"(monitor.span.index: 1 is not stage, {n}") for n in (0, 2))],
    "progress": [None, [], "none", {}],
    "progress.step": [-1, 8.0, "8", False, Told(7, "(progress.tokens: 256 is not what its steps add up to, 224")],
    "progress.tokens": [-5, 1.5, "256", 2**63, 10**30, 255, 224, 257, Told(0, "exceeds progress.tokens, 0")],
    "progress.position": [-1, None, Told(255, "(progress.tokens: 256 exceeds progress.position, 255"), 264, 257, 2**62],
    "progress.flops": [-1.0, "1e9", None, math.nan, math.inf, 4e7, 41928193.0, 1e300],
    "progress.stage_tokens": [
        -1,
        *(Told(n, f"(monitor.span.tokens: 96 is not progress.stage_tokens, {n}") for n in (0, 97)),
    ],
    "progress.stage_flops": [-0.5, Told(0.0, "(monitor.span.flops: 12310272.0 is not progress.stage_flops, 0.0")],
    "progress.growths": ["none", None, {}, [1], [{}], [{"step": 1}], Told([], "23907 is no size that has grown")],
    "progress.growths.0.step": [
        -1,
        "3",
        9,
        Told(4, "(progress.growths: the last step: 4 exceeds progress.since.step, 3"),
    ],
    "progress.growths.0.tokens": [-1, None, 95, 97, 0],
    "progress.growths.0.flops": [-1.0, None, 12310271.0, 1e12],
    "progress.growths.0.stage": [-1, 0, 2, None],
    "progress.growths.0.reason": [None, 1, "", "because", "loss\nx"],
    "progress.growths.0.old": [None, [], {"d_model": -1}, Told({}, "23907 is no size that has grown")],
    "progress.growths.0.old.d_model": [Told(n, "(progress.growths.0.old.n_params: 23907 is not ") for n in (9, 35)]
    + [Told(0, "are the sizes of no model")],
    "progress.growths.0.old.n_kv_heads": [Told(n, "are the sizes of no model") for n in (0,)],
    "progress.growths.0.old.n_params": [Told(n, "23907 is no size that has grown") for n in (1, 23906)],
    "progress.deals": [None, [], [[0, [1024]]]],
    "progress.growths.0.old.n_layers": [
        Told(4, "(progress.growths.0.old.n_layers: 4 exceeds progress.growths.0.new.n_layers")
    ],
    "progress.growths.0.new": [None, "x", Told({}, "(progress.growths.0.new.d_model: is missing")],
    "progress.growths.0.new.n_layers": [
        Told(2, "(progress.growths.0.new.n_layers: 2 is not the model's: n_layers, 3"),
        -1,
    ],
    "progress.growths.0.new.n_params": [33414, 10**12],
    "progress.nonfinite": [-1, None, *(Told(n, "(optimizer_step: 7 is not its finite steps, ") for n in (0, 2))],
    "progress.nonfinite_in_a_row": [2, -1],
    "progress.rollbacks": [-1, "0", 2, 1],
    "progress.spikes": [-1, None, Told(2, "(progress.spikes: 2 exceeds progress.nonfinite, 1")],
    "recent": ["x", None, [[1.0]], [[1.0, -1.0]], [[1.0, math.nan]], Told([[1.0, 2.0]] * 6, "(recent: its updates: 6")],
    "averaged": ["x", None, [], {"ema-0.9": -1}, *(Told({kind: 1}, "(kinds: ") for kind in ("ema-0.9", "weight"))],
    "progress.since": ["none", [], {}, None],
    "progress.since.step": [-1, 9, None, Told(2, "(progress.since.optimizer_step: 3 exceeds progress.since.step, 2")],
    "progress.since.tokens": [-1, 257, Told(95, "(progress.stage_tokens: 96 exceeds progress.since.tokens, 95")],
    "progress.since.position": [-1, 257, Told(95, "(progress.position: 256 is not where its steps lead to, 255")],
    "progress.since.nonfinite": [-1, 2, Told(1, "(optimizer_step: 7 is not its finite steps, 8")],
    "progress.since.optimizer_step": [-1, 4, Told(2, "(optimizer_step: 7 is not its finite steps, 6")],
    "progress.since.step_tokens": [-1, Told(31, "(progress.tokens: 256 is not what its steps add up to, 251")],
    "progress.since.step_flops": [-1.0, Told(6e6, "(progress.flops: 41928192.0 is not what its steps add up to")],
    "progress.unknown": [1],
    "optimizer_step": [-1, 10**30, 9, 8, 6, 1, 1.0, Told(0, "(kinds: ")],
    "kinds": ["weight", [], ["weight"], ["weight", "exp_avg"], ["weight"] * 3, [1, 2, 3], ["weight", "x", "y"]],
    "layout": [None, [2, 1, 1], {"tp": 2, "pp": 1}],
    "layout.tp": [
        *(0, -1, "2", 2.0),
        *(Told(tp, f"(model.n_heads = 4: is not divisible by layout.tp = {tp}") for tp in (10**9, 3)),
        Told(1, "(files: shard-00002-model-00001-of-00003.safetensors is no shard of TP1"),
    ],
    "layout.pp": [
        0,
        *(Told(pp, f"(model.n_layers = 3: leaves some of the layout.pp = {pp}") for pp in (4, 10**6)),
        Told(2, "(files: the shards listed hold "),
    ],
    "layout.dp": [0, -2, None, *(Told(dp, "(files: the shards listed hold ") for dp in (10**9, 2)), 2**63],
    "layout.ep": [1],
    "model": [None, [], {}],
    "model.kind": ["bert", None, 1, Told("gpt", "(monitor.span.n_params: ")],
    "model.d_model": [
        *(0, -36, True, 10**9, 10**30),
        *(Told(other, "(model: d_model is no int") for other in ("36", 36.0)),
        *(Told(other, "(monitor.span.n_params: ") for other in (37, 2**20)),
    ],
    "model.n_layers": [10**8, 2**63, *(Told(n, "(monitor.span.n_params: ") for n in (0, 2, 4, 4000))],
    "model.vocab_size": [10**12, *(Told(n, "(monitor.span.n_params: ") for n in (1, 68, 2**31))],
    "model.n_heads": [10**9, *(Told(n, "(monitor.span.n_params: ") for n in (2, 5))],
    "model.n_kv_heads": [Told(3, "(monitor.span.n_params: "), 0, -2, Told(1, "(monitor.span.n_params: ")],
    "model.head_dim": [Told(5, "(monitor.span.n_params: "), 10**9, Told(12, "(monitor.span.n_params: ")],
    "model.d_ff": [Told(63, "(monitor.span.n_params: "), 10**10],
    "model.rope_theta": [0.0, -1.0, "10000.0", math.nan],
    "model.rope_scaling": [{}, {"kind": "yarn", "factor": 2.0}],
    "model.unknown": [1],
    "monitor": ["x", [], None, {"curve": []}, Told({}, "(monitor: is empty, and data is not")],
    "monitor.met": [-1, "0", None, 4],
    "monitor.nonfinite": [-1, "0", None, 7, 10**6],
    "monitor.curve": ["x", [[1, 2.0]], [[1, 2.0, None]], [[5, 0.1, 3.0], [1, 0.2, 2.0]]],
    "monitor.curve.1.1": [Told(-1.0, "(curve: a number of FLOPs: "), Told(3e7, "(curve: a number of FLOPs: ")],
    "monitor.curve.1.2": [Told(-3.0, "(curve: a loss: ")],
    "monitor.curve.2.0": [Told(257, "(monitor.curve: the last tokens: 257 exceeds progress.tokens, 256")],
    "monitor.curve.2.1": [Told(5e7, "(monitor.curve: the last FLOPs: 50000000.0 exceeds progress.flops, 41928192.0")],
    "monitor.span.tokens": [
        Told(97, "curve.0: is out of"),
        -1,
        Told(95, "(monitor.span.tokens: 95 is not "),
    ],
    "monitor.span.flops": [Told(1.3e7, "curve.0: is out of"), -0.5],
    "monitor.span": [None, {}],
    "monitor.span.index": [-1, 0, 10**9],
    "monitor.span.kappa": [2.0, "0.9", math.nan, Told(0.5, "(monitor.span.kappa: 0.5 is not that of this")],
    "monitor.span.max_flops": [Told(1e9, "(monitor.span.max_flops: 1000000000.0 is not config.growth.s")],
    "monitor.span.last": [Told(True, "(monitor.span.last: True, and config grows on from stage 1")],
    "monitor.span.n_params": [0, -1, 33414],
    "monitor.span.max_tokens": [0, -5, None, 4095],
    "monitor.span.ahead": [{}, 1],
    "monitor.span.ahead.n_params": [0, -1, 1.5, 2**63],
    "monitor.span.ahead.flops_per_token": [0.0, -1.0, None, math.nan],
    "monitor.span.ahead.run_tokens": [-1.0, "1"],
    "monitor.span.ahead.run_flops": [0.0, -1.0],
    "monitor.past": [None, [{}], 1],
    "monitor.past.0.n_params": [0, -1, 2**63, 23908],
    "monitor.past.0.tokens": [[], [0.0, 20.0], [20.0, 10.0]],
    "monitor.past.0.losses": [[], [4.0], [4.0, -3.0], [4.0, 3.0, 2.0], [4.0, None]],
    "monitor.past.0.std": [[], [0.01], [0.01, 0.0], [0.01, -0.1]],
    "monitor.past.0.mixing": [-1.0, None],
    "config": ["x", [], {"train": {}}, {"model": {}}, Told({}, "(config: is empty, and monitor is not")],
    "config.model": [None, "x", {}, {"kind": "ngpt"}],
    "config.train.ema": [None, "x", Told([0.9], "(averaged: [] is not those of config.train.ema, ['ema-0.9']")],
    "config.model.rope_theta": [Told(5e5, "(config: rope_theta of stage 1: 500000.0 is not model.rope_theta, 10000.0")],
    "config.optimizer": [None, {"lr": "fast"}],
    "config.optimizer.lr": [None, "fast", [0.1]],
    "config.train.max_steps": ["many", 1.5, [], "9", 9.0, True],
    "config.train.seed": ["0", 0.0, False],
    "config.train.micro_batch_size": ["2", 2.0, True],
    "config.optimizer.beta1": ["0.9", True],
    "config.log.wandb": [0, "false", None],
    "config.model.d_model": [Told(48, "(config: d_model of stage 1: 48 is not model.d_model, 36")],
    "config.train.seq_len": [
        -1,
        0,
        10**12,
        "16",
        None,
        Told(16, "(progress.since.step_tokens: 32 is not "),
    ],
    "config.train.global_batch_size": [0, "4", Told(8, "(progress.since.step_tokens: 32 is not the stage's batch in ")],
    "config.growth": [None, {}],
    "config.growth.stages": ["none", [1], [{"seq_len": -1}], Told([], "(stage: 1 exceeds growths in config, 0")],
    "config.growth.stages.0.n_layers": [Told(4, "(config: n_layers of stage 1: 4 is not model.n_layers, 3")],
    "data": [None, [], "x", Told({}, "(data: is empty, and monitor is not")],
    "data.train": [None, {}],
    "data.train.blend": [[], [512, 512]],
    "data.train.blend.0": [Told(n, f"(data.train.blend: [{n}] are no slots") for n in (0, 1000, 1025)],
    "data.valid.blend.0": [Told(n, f"(data.valid.blend: [{n}] are no slots") for n in (0, 1025)],
    "data.valid.tokens": [[], [999, 999]],
    "data.document_mask": [True, "no"],
    "config.eval": [None, []],
    "config.data.document_mask": [None, "no", 0],
    "config.growth.max_tokens": ["96", True],
    "config.growth.stages.0.max_tokens": ["4096", True],
    "config.growth.stages.0.kappa": ["0.9", {}],
    "config.growth.trigger": [None, [1]],
    "config.growth.trigger.kappa": ["0.95", True],
    "config.eval.tokens": [
        *("64", -5, 0, True, 64.0),
        Told(65, "(data.valid_tokens: 64 is less than what config.eval.tokens asks for, 72"),
    ],
    "data.train.chunk_len": [0, "8", 16],
    "data.train.tokens": [None, [-1], [1.5]],
    "data.valid_tokens": [-1, None, 0, 63, 1000, 10**12],
}
WRONG_TEXTS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"2",
    "null": b"null",
    "not UTF-8": b'{"format": 2, "a": "\xff"}',
    "a NUL": b"\0" * 100,
    "a NUL in a text": b'{"format": 2, "data": {"a": "\\u0000"}}',
    "deep": b'{"format": 2, "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"format": 2, "data": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "cut deep": b"[" * 100_000,
    "a key twice": b'{"format": 2, "format": 2}',
    "millions of values": b'{"format": 2, "x": [' + b"0," * VALUES + b"0]}",
    "a long number": b'{"format": 2, "stage": ' + b"9" * 10_000 + b"}",
    "a large number": b'{"format": 2, "stage": 1e999}',
    "a lone surrogate": b'{"format": 2, "data": {"a": "\\ud800"}}',
    "no format": b'{"stage": 0}',
    "a format of a wrong type": b'{"format": "2"}',
    "true for a format": b'{"format": true}',
    "a broken format": b'{"format": 2.0}',
    "a negative format": b'{"format": -2}',
}


def named(text, key):
    """Whether what is told begins with the key, or with one in it; κ's own check leaves out its section."""
    return re.search(rf"[('](monitor\.)?{re.escape(key.removeprefix('monitor.'))}\b", text) is not None


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_wrong_value_in_the_state_is_named(folder, key):
    good = (folder / STATE).read_bytes()
    for case in WRONG_VALUES[key]:
        value, by = case if isinstance(case, Told) else (case, None)
        altered.put_state(folder, good)
        altered.set_value(folder, key, value)
        with pytest.raises(DamagedError) as caught:  # some fit the model, and not the files
            megabus.load(folder)
        text = str(caught.value)
        assert text.startswith(f"checkpoint = {folder}"), (value, text)
        assert by in text if by else named(text, key), (value, text)
        assert "\n" not in text
    altered.put_state(folder, good)
    megabus.load(folder)  # the control: writing it again is no harm


def test_means_that_their_run_has_not_had_are_refused():
    """Of none, of no update though the last step made one; and what may be so: no update where all were skipped."""
    source = MemorySource(model_config("ngpt"), step=3)
    path, state = Path("state.json"), source.state
    now = state.progress = Progress(3, 96, 96, 3.0)
    state.kinds, state.averaged, state.optimizer_step = (*KINDS, "ema-0.9"), {"ema-0.9": 0}, 3
    with pytest.raises(ValueError, match=r"averaged.ema-0\.9: 0, and the last step has moved the weights"):
        check_relations(path, state)
    now.nonfinite = now.nonfinite_in_a_row = 1
    check_relations(path, state)


SIZES, EXTRA = "(model: its sizes take", "holds a tensor that it should not hold, 'weight/layers."
WRONG_MODELS = {
    "kind": [("gpt", EXTRA)],
    "d_model": [(2**20, SIZES), (37, "(weight/embed.weight is F32 [1188], and not F32 [1221]")],
    "n_layers": [(4096, SIZES), (4, SIZES), (0, f"{EXTRA}0."), (2, f"{EXTRA}2.")],
    "vocab_size": [(2**31, SIZES), (1, "(model.vocab_size = 1: is below"), (68, "F32 [1188], and not F32 [1224]")],
    "n_heads": [(2**16, SIZES), (2, "(weight/layers.0.s_qk is F32 [12], and not F32 [6]")],
    "head_dim": [(2**16, SIZES), (5, "(model.head_dim = 5: is odd"), (12, SIZES)],
    "d_ff": [(2**24, SIZES)],
}


def test_a_model_that_the_files_do_not_hold_is_refused(tmp_path):
    """Of weights without a run, beside which nothing else says how large they are."""
    folder = write_checkpoint(MemorySource(model_config("ngpt")), checkpoints_of(tmp_path), Layout(2, 1, 1))
    megabus.load(folder)
    good = (folder / STATE).read_bytes()
    for key, cases in WRONG_MODELS.items():
        for value, told in cases:
            altered.put_state(folder, good)
            altered.set_value(folder, f"model.{key}", value)
            with pytest.raises(DamagedError, match=re.escape(told)):
                megabus.load(folder)


LATER = ("recent", "averaged")  # keys of the state that came later: one that lacks them is whole


@pytest.mark.parametrize("key", ["format", *(item.name for item in fields(SavedState) if item.name not in LATER)])
def test_a_key_that_the_state_lacks_is_named(folder, key):
    tree = json.loads((folder / STATE).read_text())
    del tree[key]
    altered.put_state(folder, json.dumps(tree))
    assert key in altered.refused(folder, STATE)


@pytest.mark.parametrize("section", WRITTEN)
def test_a_key_that_a_section_lacks_is_named(folder, section):
    tree = json.loads((folder / STATE).read_text())
    tree["model"]["rope_scaling"] = RopeScaling(kind="linear", factor=2.0).model_dump()
    for key in WRITTEN[section].split():
        spoilt = json.loads(json.dumps(tree))
        inside, _ = altered.at(spoilt, f"{section}.{key}")
        del inside[key]
        altered.put_state(folder, json.dumps(spoilt))
        assert f"({section}.{key}: is missing)" in altered.refused(folder, STATE)


SCALINGS = {"linear": {"factor": 2.0}, "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_of_before_yarn_is_read(folder, kind):
    """As all that came later in a section: what it says is compared, and what it leaves out is as it was then."""
    scaling = RopeScaling(kind=kind, **SCALINGS[kind])
    old = {key: getattr(scaling, key) for key in WRITTEN["model.rope_scaling"].split()}
    for key in ("model.rope_scaling", "config.model.rope_scaling"):  # both, before it is read
        altered.set_value(folder, key, old)
    assert megabus.load(folder).config.rope_scaling == scaling
    altered.set_value(folder, "config.model.rope_scaling.factor", 3.0)
    assert "(config: rope_scaling of stage 1: " in altered.refused(folder, STATE)
    altered.set_value(folder, "model.rope_scaling.factor", 3)
    assert "(model: rope_scaling is no dict as it is saved" in altered.refused(folder, STATE)


@pytest.mark.parametrize("text", WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_what_is_no_state_is_refused(folder, text):
    altered.put_state(folder, text)
    altered.refused(folder, STATE)


def test_a_huge_state_is_not_read(folder):
    with (folder / STATE).open("r+b") as file:
        file.truncate(2**40)  # takes no room
    tree = altered.read_manifest_tree(folder)
    entry = next(entry for entry in tree["files"] if entry["name"] == STATE)
    entry["bytes"] = 2**40
    altered.seal(folder, tree)
    assert "has 1099511627776 bytes" in altered.refused(folder, MANIFEST)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_totals_are_those_of_the_declarations(kind):
    for changes in ({}, {"n_layers": 0}, {"n_layers": 1}, {"n_layers": 7, "d_ff": 64, "n_kv_heads": 1}):
        model = model_config(kind, **changes)
        assert totals(model)[1] == count_parameters(model)
