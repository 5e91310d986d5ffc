"""Checkpoints whose hashes are right and whose contents are not: made by hand, as an accident never makes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time

import pytest
from blake3 import blake3

import megabus
from megabus.checkpoint.manifest import MANIFEST, DamagedError
from megabus.checkpoint.state import STATE, Progress
from megabus.checkpoint.store import checkpoints_of, point_latest
from megabus.config import Layout, parse_config, resolve_stages
from megabus.config.schema import KappaConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.data.order import Deal
from megabus.kappa.marginal import Ahead, StagePath
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan
from megabus.model.cost import count_parameters, counted_sizes, flops_per_token
from tests.support.sources import MemorySource, model_config

SHARD = "shard-00001-model-00001-of-00003.safetensors"
LAST = "shard-00002-model-00003-of-00003.safetensors"
STEPS = (7, 8)  # of the checkpoints of `write_run`
GROWN = 3  # the step after which it grew


def run_of(model):
    """The configuration that such a run may have had: it has grown by a layer, and will by another."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": model.model_dump() | {"n_layers": model.n_layers - 1},
            "train": {"seq_len": 8, "micro_batch_size": 2, "global_batch_size": 4, "max_steps": 9},
            "optimizer": {"lr": 1e-2},
            "growth": {
                "max_tokens": 96,
                "stages": [{"n_layers": model.n_layers, "max_tokens": 4096}, {"n_layers": model.n_layers + 1}],
            },
            "eval": {"tokens": 64},
            "data": {"train": "unused", "valid": "unused"},
        }
    )


def write_run(run, kind="ngpt", layout=(2, 1, 1), **changes):
    """Two checkpoints of a run, as two ranks would have written them, with all that a state may hold; the newer one."""
    for step in STEPS:
        source = MemorySource(model_config(kind, **changes), step=step)
        state, config = source.state, run_of(source.state.model)
        first, second, _ = resolve_stages(config, 1)
        cost = [stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len) for stage in (first, second)]
        now = state.progress = Progress(GROWN, 32 * GROWN, 32 * GROWN, GROWN * cost[0])
        now.stage_tokens, now.stage_flops = now.tokens, now.flops
        row = {"step": GROWN, "tokens": now.tokens, "flops": now.flops, "stage": 1, "reason": "cap"}
        now.growths.append(row | {"old": counted_sizes(first.model), "new": counted_sizes(second.model)})
        now.mark(GROWN, 32, cost[1])
        now.deals = (Deal(0, (1024,)),)
        monitor = KappaMonitor(KappaConfig())
        ahead = Ahead(54321, 3e5, 8192.0, 1e9)
        monitor.start_stage(span_of(second, now.tokens, now.flops, 4096, ahead))
        path = StagePath(count_parameters(first.model), True, [10.0, 20.0], [4.0, 3.0], [0.01, 0.02], 0.0)
        monitor.state.past.append(path)
        for n in range(3):
            monitor.observe(now.tokens + 10 * n, now.flops + 0.1 * n, 3.0 - n / 4)
        for _ in range(GROWN, step):  # the first one after the growth is not finite
            now.step, now.tokens, now.position = now.step + 1, now.tokens + 32, now.position + 32
            now.flops += cost[1]
        now.nonfinite, state.optimizer_step = 1, step - 1
        state.stage, state.monitor, state.config = 1, monitor.state_dict(), config.model_dump(mode="json")
        source_facts = {"tokens": [999], "blend": [1024], "chunk_len": 8, "tokenizers": []}
        state.data = {"train": source_facts, "valid": source_facts, "valid_tokens": 64}
        folder = write_checkpoint(source, checkpoints_of(run), Layout(*layout))
    return folder


def span_of(stage, tokens, flops, max_tokens, ahead):
    return StageSpan(1, count_parameters(stage.model), 0.95, tokens, flops, max_tokens, None, ahead=ahead)


def digest_of(data):
    return f"blake3:{blake3(data).hexdigest()}"


def seal(folder, tree):
    """Write a manifest that says `tree`, and vouches for itself; `latest` vouches for it."""
    tree = {key: value for key, value in tree.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(tree | {"sha256": digest}, indent=1) + "\n")
    point_latest(folder)


def read_manifest_tree(folder):
    return json.loads((folder / MANIFEST).read_text())


def attest(folder, *names):
    """Let the manifest say what these files are now."""
    tree = read_manifest_tree(folder)
    for entry in tree["files"]:
        if entry["name"] in names:
            data = (folder / entry["name"]).read_bytes()
            entry |= {"bytes": len(data), "digest": digest_of(data)}
    seal(folder, tree)


def put_state(folder, raw):
    (folder / STATE).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    attest(folder, STATE)


def put_file(folder, name, raw):
    """A file more, which the manifest lists."""
    (folder / name).write_bytes(raw)
    tree = read_manifest_tree(folder)
    entry = {"name": name, "bytes": len(raw), "digest": digest_of(raw), "rank": 0}
    tree["files"] = sorted([*tree["files"], entry], key=lambda entry: entry["name"])
    seal(folder, tree)


def at(tree, key):
    """The section that the last part of a dotted key stands in, and that part."""
    *parents, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for part in parents:
        tree = tree[part]
    return tree, last


def header_of(path):
    """(the header, what comes behind it) of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path, header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


# ---- alterations, and how they are refused


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
    section, last = at(tree, key)
    section[last] = value
    put_state(folder, json.dumps(tree))


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


def link_outside(folder, name):
    outside = folder.parents[2] / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def relabelled(dtype):
    def change(header):
        next(facts for key, facts in header.items() if key != "__metadata__")["dtype"] = dtype

    return change
