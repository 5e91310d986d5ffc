"""Checkpoints whose hashes are right and whose contents are not: made by hand, as an accident never makes them."""

from __future__ import annotations

import hashlib
import json
import struct

from megabus.checkpoint.manifest import MANIFEST
from megabus.checkpoint.state import STATE
from megabus.checkpoint.store import checkpoints_of, point_latest
from megabus.config import Layout, parse_config
from megabus.config.schema import KappaConfig
from megabus.convert.checkpoint import write_checkpoint
from megabus.kappa.marginal import Ahead, StagePath
from megabus.kappa.monitor import KappaMonitor
from megabus.kappa.predictors import StageSpan
from support.sources import MemorySource, model_config

STEPS = (7, 8)  # of the checkpoints of `write_run`


def run_of(model):
    """The configuration that such a run may have had."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": model.model_dump(),
            "train": {"seq_len": 8, "micro_batch_size": 2, "global_batch_size": 4, "max_steps": 9},
            "optimizer": {"lr": 1e-2},
            "data": {"train": "unused", "valid": "unused"},
        }
    )


def write_run(run, kind="ngpt", layout=(2, 1, 1)):
    """Two checkpoints of a run, as two ranks would have written them, with all that a state may hold; the newer one."""
    for step in STEPS:
        source = MemorySource(model_config(kind), step=step)
        monitor = KappaMonitor(KappaConfig())
        ahead = Ahead(54321, 3e5, 8192.0, 1e9)
        monitor.start_stage(StageSpan(0, 12345, 0.95, 0, 0.0, 4096, None, ahead=ahead))
        monitor.state.past.append(StagePath(6000, True, [10.0, 20.0], [4.0, 3.0], [0.01, 0.02], 0.0))
        for n in range(3):
            monitor.observe(10 * n, 0.1 * n, 3.0 - n / 4)
        source.state.monitor = monitor.state_dict()
        source.state.config = run_of(source.state.model).model_dump(mode="json")
        folder = write_checkpoint(source, checkpoints_of(run), Layout(*layout))
    return folder


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
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal(folder, tree)


def put_state(folder, raw):
    (folder / STATE).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    attest(folder, STATE)


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
