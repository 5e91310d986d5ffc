"""A checkpoint whose hashes are right is not believed for that: what it holds must be what a save writes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from support import altered
from support import checkpoints as ck
from support.command import run_command
from support.sources import model_config

import megabus
from megabus.checkpoint.contents import look, totals
from megabus.checkpoint.manifest import MANIFEST, DamagedError
from megabus.checkpoint.restore import find_checkpoint
from megabus.checkpoint.state import STATE, WRITTEN, SavedState, read_state
from megabus.checkpoint.store import checkpoints_of, complete, latest_of, step_of
from megabus.config.model import RopeScaling
from megabus.model.cost import count_parameters
from megabus.testing.ranks import run_ranks

SHARD = "shard-00001-model-00001-of-00003.safetensors"
LAST = "shard-00002-model-00003-of-00003.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    altered.write_run(run)
    return run


@pytest.fixture
def folder(pristine, tmp_path):
    """The newer of two checkpoints, to be altered."""
    return complete(checkpoints_of(shutil.copytree(pristine, tmp_path / "run")))[0]


# ---- state.json: each is (key, value), or a whole text


class Told(NamedTuple):
    """A value that is told as something else than its key: what it does not fit."""

    value: Any
    by: str


SIZES, EXTRA = "(model: its sizes take", "holds a tensor that it should not hold, 'weight/layers."

WRONG_VALUES = {
    "stage": [-1, "0", 0.0, True, None, 2**63, Told(1, "(monitor.span.index: 0 is not stage, 1")],
    "progress": [None, [], "none", {}],
    "progress.step": [-1, 8.0, "8", False, Told(7, "is the checkpoint of step 7")],
    "progress.tokens": [-5, 1.5, "100", 2**63, 10**30, 129],
    "progress.position": [-1, Told(99, "(progress.tokens: 100 exceeds progress.position, 99"), None],
    "progress.flops": [-1.0, "1e9", None, math.nan, math.inf],
    "progress.stage_tokens": [-1, Told(1, "(monitor.span.tokens: 0 is not progress.stage_tokens, 1")],
    "progress.stage_flops": [-0.5, Told(0.3, "(monitor.span.flops: 0.0 is not progress.stage_flops, 0.3")],
    "progress.growths": ["none", None, {}, [1], [{}], [{"step": 1}]],
    "progress.nonfinite": [-1, None],
    "progress.nonfinite_in_a_row": [1, -1],
    "progress.rollbacks": [-1, "0"],
    "progress.unknown": [1],
    "optimizer_step": [-1, 10**30, 9, 1.0, Told(0, "(kinds: ")],
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
    "model.kind": ["bert", None, 1, Told("gpt", EXTRA)],
    "model.d_model": [
        *(0, -36, True),
        *(Told(large, SIZES) for large in (10**9, 10**30)),
        *(Told(other, "(model: d_model is no int") for other in ("36", 36.0)),
        Told(37, "(weight/embed.weight is F32 [1188], and not F32 [1221]"),
    ],
    "model.n_layers": [*(Told(n, SIZES) for n in (10**8, 4, 2**63)), *(Told(n, f"{EXTRA}{n}.") for n in (0, 2))],
    "model.vocab_size": [Told(10**12, SIZES), 1, Told(68, "(weight/embed.weight is F32 [1188], and not F32 [1224]")],
    "model.n_heads": [5, Told(10**9, SIZES), Told(2, "(weight/layers.0.s_qk is F32 [12], and not F32 [6]")],
    "model.n_kv_heads": [Told(3, "(model.n_heads = 4: is not divisible by n_kv_heads = 3"), 0, -2, 1],
    "model.head_dim": [5, Told(10**9, SIZES), Told(12, SIZES)],
    "model.d_ff": [63, Told(10**10, SIZES)],
    "model.rope_theta": [0.0, -1.0, "10000.0", math.nan],
    "model.rope_scaling": [{}, {"kind": "yarn", "factor": 2.0}],
    "model.unknown": [1],
    "monitor": ["x", [], None, {"curve": []}],
    "monitor.met": [-1, "0", None],
    "monitor.curve": ["x", [[1, 2.0]], [[1, 2.0, None]], [[5, 0.1, 3.0], [1, 0.2, 2.0]]],
    "monitor.curve.2.0": [Told(101, "(monitor.curve: the last tokens: 101 exceeds progress.tokens, 100")],
    "monitor.curve.2.1": [Told(0.34, "(monitor.curve: the last FLOPs: 0.34 exceeds progress.flops, 0.33")],
    "monitor.span.tokens": [Told(1, "curve.0: is out of"), -1],
    "monitor.span.flops": [Told(0.05, "curve.0: is out of"), -0.5],
    "monitor.span": [None, {}],
    "monitor.span.index": [-1, 1, 10**9],
    "monitor.span.kappa": [2.0, "0.9", math.nan],
    "monitor.span.n_params": [0, -1],
    "monitor.span.max_tokens": [0, -5],
    "monitor.span.ahead": [{}, 1],
    "monitor.span.ahead.n_params": [0, -1, 1.5, 2**63],
    "monitor.span.ahead.flops_per_token": [0.0, -1.0, None, math.nan],
    "monitor.span.ahead.run_tokens": [-1.0, "1"],
    "monitor.span.ahead.run_flops": [0.0, -1.0],
    "monitor.past": [None, [{}], 1],
    "monitor.past.0.n_params": [0, -1, 2**63],
    "monitor.past.0.tokens": [[], [0.0, 20.0], [20.0, 10.0]],
    "monitor.past.0.losses": [[], [4.0], [4.0, 3.0, 2.0], [4.0, None]],
    "monitor.past.0.std": [[], [0.01], [0.01, 0.0], [0.01, -0.1]],
    "monitor.past.0.mixing": [-1.0, None],
    "config": ["x", [], {"train": {}}, {"model": {}}],
    "config.train.seq_len": [-1, 0, 10**12, "16", None],
    "config.growth": [None, {}],
    "config.growth.stages": ["none", [1], [{"seq_len": -1}]],
    "data": [None, [], "x"],
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
    "a long number": b'{"format": 2, "stage": ' + b"9" * 10_000 + b"}",
    "a large number": b'{"format": 2, "stage": 1e999}',
    "a lone surrogate": b'{"format": 2, "data": {"a": "\\ud800"}}',
    "no format": b'{"stage": 0}',
    "a format of a wrong type": b'{"format": "2"}',
    "true for a format": b'{"format": true}',
    "a broken format": b'{"format": 2.0}',
    "a negative format": b'{"format": -2}',
}


def refused(folder, file):
    """The one line in which a plain process refuses to load, about that file; soon."""
    begun = time.monotonic()
    with pytest.raises(DamagedError) as caught:
        megabus.load(folder)
    text = str(caught.value)
    assert time.monotonic() - begun < 10
    assert text.startswith(f"checkpoint = {folder / file}: "), text
    assert "\n" not in text
    assert len(text) < 700
    return text


def set_value(folder, key, value):
    tree = json.loads((folder / STATE).read_text())
    section, last = altered.at(tree, key)
    section[last] = value
    altered.put_state(folder, json.dumps(tree))


def named(text, key):
    """Whether what is told begins with the key, or with one in it; κ's own check leaves out its section."""
    return re.search(rf"[('](monitor\.)?{re.escape(key.removeprefix('monitor.'))}\b", text) is not None


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_wrong_value_in_the_state_is_named(folder, key):
    good = (folder / STATE).read_bytes()
    for case in WRONG_VALUES[key]:
        value, by = case if isinstance(case, Told) else (case, None)
        altered.put_state(folder, good)
        set_value(folder, key, value)
        with pytest.raises(DamagedError) as caught:  # some fit the model, and not the files
            megabus.load(folder)
        text = str(caught.value)
        assert text.startswith(f"checkpoint = {folder}"), (value, text)
        assert by in text if by else named(text, key), (value, text)
        assert "\n" not in text
    altered.put_state(folder, good)
    megabus.load(folder)  # the control: writing it again is no harm


@pytest.mark.parametrize("key", ["format", *(item.name for item in fields(SavedState))])
def test_a_key_that_the_state_lacks_is_named(folder, key):
    tree = json.loads((folder / STATE).read_text())
    del tree[key]
    altered.put_state(folder, json.dumps(tree))
    assert key in refused(folder, STATE)


@pytest.mark.parametrize("section", WRITTEN)
def test_a_key_that_a_section_lacks_is_named(folder, section):
    tree = json.loads((folder / STATE).read_text())
    tree["model"]["rope_scaling"] = RopeScaling(kind="linear", factor=2.0).model_dump()
    for key in WRITTEN[section].split():
        spoilt = json.loads(json.dumps(tree))
        inside, _ = altered.at(spoilt, f"{section}.{key}")
        del inside[key]
        altered.put_state(folder, json.dumps(spoilt))
        assert f"({section}.{key}: is missing)" in refused(folder, STATE)


@pytest.mark.parametrize("text", WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_what_is_no_state_is_refused(folder, text):
    altered.put_state(folder, text)
    refused(folder, STATE)


def test_a_huge_state_is_not_read(folder):
    with (folder / STATE).open("r+b") as file:
        file.truncate(2**40)  # takes no room
    tree = altered.read_manifest_tree(folder)
    entry = next(entry for entry in tree["files"] if entry["name"] == STATE)
    entry["bytes"] = 2**40
    altered.seal(folder, tree)
    assert "has 1099511627776 bytes" in refused(folder, MANIFEST)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_totals_are_those_of_the_declarations(kind):
    for changes in ({}, {"n_layers": 0}, {"n_layers": 1}, {"n_layers": 7, "d_ff": 64, "n_kv_heads": 1}):
        model = model_config(kind, **changes)
        assert totals(model)[1] == count_parameters(model)


# ---- manifest.json


def change_entry(name, /, **changes):
    def change(tree):
        entry = next(entry for entry in tree["files"] if entry["name"] == name)
        entry |= changes
        for key in [key for key, value in entry.items() if value is ...]:
            del entry[key]

    return change


def rename(name):
    def change(tree):
        change_entry(SHARD, name=name)(tree)
        tree["files"].sort(key=lambda entry: str(entry["name"]))

    return change


def drop(*names):
    return lambda tree: tree.update(files=[entry for entry in tree["files"] if entry["name"] not in names])


def add(name, like=SHARD):
    def change(tree):
        entry = next(entry for entry in tree["files"] if entry["name"] == like)
        tree["files"] = sorted([*tree["files"], entry | {"name": name}], key=lambda entry: entry["name"])

    return change


WRONG_MANIFESTS = {
    "a file outside": rename("../../../outside.safetensors"),
    "an absolute path": rename("/dev/zero"),
    "a folder's file": rename("a/b.safetensors"),
    "this folder": rename("."),
    "no name": rename(""),
    "a NUL": rename("a\0b"),
    "a line": rename("a\nb"),
    "a hidden file": rename(".hidden"),
    "a number for a name": rename(5),
    "a device": change_entry(STATE, name="/dev/zero"),
    "an unlisted state": drop(STATE),
    "an unlisted shard": drop(SHARD),
    "a rank's shards unlisted": drop(*(SHARD.replace("-model-00001", f"-model-0000{n}") for n in (1, 2, 3))),
    "nothing listed": lambda tree: tree.update(files=[]),
    "a file twice": add(SHARD),
    "files out of order": lambda tree: tree["files"].reverse(),
    "no files": lambda tree: tree.pop("files"),
    "files of a wrong type": lambda tree: tree.update(files="none"),
    "files in an object": lambda tree: tree.update(files={}),
    "an entry of a wrong type": lambda tree: tree.update(files=[None]),
    "another key": lambda tree: tree.update(more=1),
    "a format of a wrong type": lambda tree: tree.update(format="2"),
    "true for a format": lambda tree: tree.update(format=True),
    "bytes below zero": change_entry(SHARD, bytes=-1),
    "a broken number of bytes": change_entry(SHARD, bytes=1.5),
    "huge bytes": change_entry(SHARD, bytes=2**63),
    "bytes as a text": change_entry(SHARD, bytes="5"),
    "a short hash": change_entry(SHARD, sha256="ab"),
    "no hash": change_entry(SHARD, sha256=...),
    "a hash of a wrong type": change_entry(SHARD, sha256=None),
    "a hash in capitals": change_entry(SHARD, sha256="A" * 64),
    "another rank": change_entry(SHARD, rank=1),
    "a rank below zero": change_entry(SHARD, rank=-1),
    "a huge rank": change_entry(SHARD, rank=10**12),
    "true for a rank": change_entry(SHARD, rank=False),
    "no rank": change_entry(SHARD, rank=...),
    "an unknown key": change_entry(SHARD, mode=0o644),
}


@pytest.mark.parametrize("change", WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_a_wrong_manifest_is_refused(folder, change):
    tree = altered.read_manifest_tree(folder)
    change(tree)
    altered.seal(folder, tree)
    with pytest.raises(DamagedError) as caught:
        megabus.load(folder)
    # What too few shards lack is told as what the state asks for.
    files = (MANIFEST, STATE) if change in (WRONG_MANIFESTS[which] for which in TOO_FEW) else (MANIFEST,)
    assert str(caught.value).startswith(tuple(f"checkpoint = {folder / file}: is damaged (" for file in files))
    assert "\n" not in str(caught.value)


TOO_FEW = ("an unlisted shard", "a rank's shards unlisted")


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "shard-00003-model-00001-of-00003.safetensors",
        "shard-00000-model-00001-of-00003.safetensors",
        "shard-00001-model-00004-of-00003.safetensors",
        "shard-00001-model-00001-of-00002.safetensors",
        "shard-0000001-model-00001-of-00003.safetensors",
        "mp_rank_00_000.safetensors",
    ],
)
def test_a_file_that_no_save_writes_is_refused(folder, name):
    shutil.copy(folder / SHARD, folder / name)
    tree = altered.read_manifest_tree(folder)
    add(name)(tree)
    altered.seal(folder, tree)
    assert name in refused(folder, MANIFEST)


def test_what_is_not_listed_is_not_read(folder, tmp_path):
    """Neither refused, nor believed."""
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.model").write_bytes(b"of another vocabulary")
    megabus.load(folder)
    for command in (["generate", folder], ["convert", folder, tmp_path / "out", "--to", "hf"]):
        done = run_command(*command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: tokenizer = {folder / 'tokenizer.model'}: is not listed in {MANIFEST}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- files that are no plain files


def link_outside(folder, name):
    outside = folder.parents[2] / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def link_inside(folder, name):
    (folder / name).rename(folder / "there")
    (folder / name).symlink_to("there")


def link_to_itself(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)


def link_to_zeros(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def directory(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


NO_FILES = [link_outside, link_inside, link_to_itself, link_to_zeros, pipe, directory]


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
@pytest.mark.parametrize("alter", NO_FILES)
def test_only_regular_files_are_read(folder, alter, name):
    alter(folder, name)
    assert "is a symbolic link" in (text := refused(folder, name)) or "is no regular file" in text


@pytest.mark.parametrize("alter", NO_FILES)
def test_latest_is_read_only_if_it_is_a_regular_file(folder, alter):
    alter(folder.parent, "latest")
    if alter in (pipe, link_to_zeros):
        (found,) = run_ranks(1, step_found, folder.parent)
        assert found == step_of(folder)
        assert (folder.parent / "latest").is_file()
        assert not (folder.parent / "latest").is_symlink()
    else:
        with pytest.raises(DamagedError, match="latest"):
            latest_of(folder.parent)


def step_found(root):
    return find_checkpoint(root, strict=False).state.progress.step


# ---- headers of shards


def relabelled(dtype):
    def change(header):
        next(facts for key, facts in header.items() if key != "__metadata__")["dtype"] = dtype

    return change


def reshaped(shape):
    def change(header):
        facts = next(facts for key, facts in header.items() if key != "__metadata__")
        facts["shape"] = shape(facts["shape"])

    return change


def renamed(header):
    key = next(key for key in header if key != "__metadata__")
    header[f"{key}x"] = header.pop(key)


def exchanged(header):
    """Two tensors of the same size have each other's name."""
    names = [key for key in header if key != "__metadata__"]
    one, two = next((a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"])
    header[one], header[two] = header[two], header[one]


def moved(header):
    facts = next(facts for key, facts in header.items() if key != "__metadata__")
    facts["data_offsets"] = [offset + 4 for offset in facts["data_offsets"]]


HEADERS = {
    "I32": relabelled("I32"),
    "U32": relabelled("U32"),
    "BF16": relabelled("BF16"),
    "no dtype": relabelled("F31"),
    "two axes": reshaped(lambda shape: [*shape, 1]),
    "half": reshaped(lambda shape: [shape[0] // 2]),
    "huge": reshaped(lambda shape: [2**62]),
    "negative": reshaped(lambda shape: [-shape[0]]),
    "another name": renamed,
    "other offsets": moved,
    "none": dict.clear,
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", [SHARD, LAST])
def test_headers_must_say_what_the_state_says(folder, change, name):
    header, rest = altered.header_of(folder / name)
    change(header)
    altered.put_header(folder / name, header, rest)
    altered.attest(folder, name)
    refused(folder, name)


def test_names_that_are_exchanged_are_what_the_file_says(folder):
    """The control: only its own hash knows, and that was made anew."""
    header, rest = altered.header_of(folder / SHARD)
    exchanged(header)
    altered.put_header(folder / SHARD, header, rest)
    refused(folder, SHARD)
    altered.attest(folder, SHARD)
    megabus.load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff" * 40, b"{" * 10_000, b'{"a": ' * 10_000, b"null"])
def test_what_is_no_header_is_refused(folder, text):
    _, rest = altered.header_of(folder / SHARD)
    altered.put_header(folder / SHARD, text, rest)
    altered.attest(folder, SHARD)
    refused(folder, SHARD)


def test_shards_of_two_ranks_or_kinds_are_not_mixed_up(folder):
    for other in (SHARD.replace("-model-00001", "-model-00002"), SHARD.replace("shard-00001", "shard-00002")):
        good = (folder / SHARD).read_bytes()
        shutil.copyfile(folder / other, folder / SHARD)
        altered.attest(folder, SHARD)
        with pytest.raises(DamagedError, match=r"files: shard-00001|lacks a tensor|holds a tensor|is damaged"):
            megabus.load(folder)
        (folder / SHARD).write_bytes(good)
        altered.attest(folder, SHARD)
    megabus.load(folder)


# ---- ranks: such a checkpoint is set aside, as one with a flipped bit is


def texts_of(folder):
    """One of each kind, as what is done to a checkpoint."""
    state, manifest = json.loads((folder / STATE).read_text()), altered.read_manifest_tree(folder)

    def value(key, value):
        return lambda: set_value(folder, key, value)

    def sealed(change):
        def alter():
            tree = json.loads(json.dumps(manifest))
            change(tree)
            altered.seal(folder, tree)

        return alter

    def header():
        found, rest = altered.header_of(folder / LAST)
        relabelled("I32")(found)
        altered.put_header(folder / LAST, found, rest)
        altered.attest(folder, LAST)

    assert state["stage"] == 0
    return {
        "negative stage": value("stage", -1),
        "negative tokens": value("progress.tokens", -1),
        "growths none": value("progress.growths", "none"),
        "wide": value("model.d_model", 10**9),
        "deep": value("model.n_layers", 10**8),
        "many ranks": value("layout.dp", 10**9),
        "NaN": value("progress.flops", math.nan),
        "nested": lambda: altered.put_state(folder, WRONG_TEXTS["deep"]),
        "outside": sealed(WRONG_MANIFESTS["a file outside"]),
        "unlisted state": sealed(drop(STATE)),
        "device": sealed(WRONG_MANIFESTS["a device"]),
        "pipe": lambda: pipe(folder, SHARD),
        "pipe for a manifest": lambda: pipe(folder, MANIFEST),
        "link": lambda: link_outside(folder, LAST),
        "relabelled": header,
    }


def find_each(root, names):
    told, folder = [], complete(root)[0]
    for name in names:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(root, root.parent / "good")
            texts_of(folder)[name]()
        dist.barrier()
        error, stderr, found = ck.outcome(find_checkpoint, root, False)
        told.append((error, stderr, found and found.state.progress.step, sorted(path.name for path in root.iterdir())))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root)
            (root.parent / "good").rename(root)
            (root.parents[1] / "outside").unlink(missing_ok=True)
    return told


def test_ranks_set_them_aside_and_take_the_one_before(folder, capfd):
    names = list(texts_of(folder))
    first, second = run_ranks(2, find_each, folder.parent, names)
    older, newer = (f"step-{step:08d}" for step in altered.STEPS)
    for name, (error, stderr, step, there), other in zip(names, first, second, strict=True):
        assert (error, step) == (None, altered.STEPS[0]), name
        assert there == ["latest", older, f"{newer}.damaged"], name
        lines = stderr.splitlines()
        assert lines[-1] == f"warning: {folder} is set aside as {newer}.damaged; {older} is used instead", name
        assert any(line.startswith(f"warning: checkpoint = {folder}/") for line in lines[:-1]), (name, lines)
        assert all(line.startswith("warning: ") for line in lines), (name, lines)
        assert other == (None, "", step, there), name
    assert "Traceback" not in capfd.readouterr().err


# ---- what may be read by others


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_umasks_mode(tmp_path, umask, mode):
    """Shards too, which their library writes for their owner alone."""
    run_ranks(2, save_with, umask, tmp_path / "checkpoints")
    (folder,) = complete(tmp_path / "checkpoints")
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*folder.iterdir(), folder.parent / "latest"]}
    assert len(modes) == 9
    assert set(modes.values()) == {mode}


def save_with(umask, root):
    os.umask(umask)
    ck.saved_steps(root, ck.run_config({"tp": 2}), 1)


def test_a_state_is_as_it_was_written(folder):
    """The control of them all."""
    found = look(folder)
    assert found.state == read_state(folder)
    assert len(found.entries) == 7
