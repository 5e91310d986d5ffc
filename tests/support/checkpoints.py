"""Small trained engines, saved and loaded on ranks; a state put together from what the ranks hold."""

from __future__ import annotations

import contextlib
import io
from math import prod

import numpy as np
import torch

from megabus.checkpoint.manifest import MANIFEST, read_manifest, settle, write_manifest
from megabus.checkpoint.restore import find_checkpoint, restore
from megabus.checkpoint.save import Saver
from megabus.checkpoint.state import Progress, SavedState
from megabus.checkpoint.store import point_latest
from megabus.config import Layout, parse_config, resolve_stages
from megabus.engine.engine import Engine
from megabus.errors import UserError
from megabus.parallel.fragments import KINDS
from megabus.parallel.placement import Placement

V, T = 73, 6


def run_config(layout, kind="ngpt", tokenizer=None, **train):
    """Odd sizes, so that ZeRO's partitions cut rows, and tensor-parallel neighbours, whose vocabulary shards differ,
    own different intervals of the gains they share; grouped query heads; layers that no pipeline divides evenly."""
    sizes = {"vocab_size": V, "d_model": 37, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 62}
    micro = 12 // (layout.get("dp", 1) * layout.get("pp", 1))
    numbers = {"seq_len": T, "micro_batch_size": micro, "global_batch_size": 12, "max_steps": 9}
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"kind": kind} | sizes,
            "layout": layout,
            "train": numbers | train,
            "optimizer": {"lr": 3e-2},
            "data": {"train": "unused", "valid": "unused", "tokenizer": tokenizer},
        }
    )


def world_of(config):
    return prod(config.layout.model_dump(exclude_none=True).values())


def fresh(config):
    return Engine(config.train, config.optimizer, resolve_stages(config, world_of(config))[0])


def train_on(engine, seed, steps=1):
    for step in range(steps):
        draw = torch.Generator().manual_seed(100 * seed + step)
        samples = torch.randint(V, (12, T + 1), generator=draw)
        rows = [samples[engine.micro_rows(micro)] for micro in range(engine.stage.grad_accum)]
        engine.train_step([(row[:, :-1], row[:, 1:]) for row in rows] if engine.needs_data else [], lr=3e-2)


def trained(config, seed=3, steps=1):
    """An engine whose masters are no round numbers, nor the initial ones."""
    engine = fresh(config)
    engine.write_initial(seed)
    train_on(engine, seed, steps)
    return engine


def state_of(engine, config, step, **progress):
    return SavedState(
        progress=Progress(step=step, **progress),
        stage=0,
        model=engine.stage.model,
        layout=engine.stage.layout,
        optimizer_step=engine.optimizer_step,
        kinds=KINDS if engine.optimizer_step else ("weight",),
        monitor={},
        config=config.model_dump(mode="json"),
        data={},
    )


def make_saver(root, keep_last=9, keep_every=None, asynchronous=False, tokenizer=None):
    return Saver(root, keep_last, keep_every, asynchronous, tokenizer)


def save(saver, engine, config, step):
    """One whole save."""
    saver.start(state_of(engine, config, step), engine.placement, engine.read())
    return saver.wait()


def held(engine):
    """What this rank owns: (parameter, first entry, kind, entries)."""
    return [
        (piece.name, piece.start, kind, values.cpu().numpy().copy())
        for piece, tensors in engine.read().items()
        for kind, values in tensors.items()
    ]


def assembled(config, ranks):
    """The whole state, put together from what all ranks hold without the code under test: (kind, name) -> bits."""
    whole, placement = {}, Placement(config.model, Layout(1, 1, 1))
    for name, start, kind, values in (entry for rank in ranks for entry in rank):
        flat = whole.setdefault((kind, name), np.full(placement.numel(name), np.nan, np.float32))
        there = flat[start : start + len(values)]
        assert (np.isnan(there) | (there == values)).all(), f"replicas of {name} differ"
        there[:] = values
    assert not any(np.isnan(flat).any() for flat in whole.values())
    assert {name for _, name in whole} == set(placement.specs)
    return {key: flat.view(np.int32) for key, flat in whole.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def bits(state_dict):
    """A model's weights as `assembled` has them."""
    return {("weight", name): values.reshape(-1).numpy().view(np.int32) for name, values in state_dict.items()}


def saved_steps(root, config, steps, tokenizer=None):
    """On every rank: train and save after each of `steps` steps; what the rank held each time."""
    engine, saver, told = trained(config, steps=0), make_saver(root, tokenizer=tokenizer), []
    for step in range(1, steps + 1):
        train_on(engine, seed=step)
        assert save(saver, engine, config, step).error is None
        told.append(held(engine))
    return told


def loaded(root, config, strict=False):
    """On every rank: what an engine holds that was filled from the newest good checkpoint, and its optimizer step."""
    engine = fresh(config)
    restore(find_checkpoint(root, strict), engine)
    return held(engine), engine.optimizer_step


def outcome(call, *args):
    """What a rank gets from a call: (type and text of its UserError or None, stderr, result)."""
    error = result = None
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            result = call(*args)
        except UserError as caught:
            error = (type(caught).__name__, str(caught))
    return error, stderr.getvalue(), result


def tree_of(root):
    """Every file and directory below `root`: not its contents, but what any writing to it would change."""
    return {
        str(path.relative_to(root)): (stat.st_ino, stat.st_size * path.is_file(), stat.st_mtime_ns * path.is_file())
        for path in sorted(root.rglob("*"))
        for stat in [path.lstat()]
    }


def attest(folder):
    """Make the manifest, and `latest`, say what the files are now: an edit by hand that is no damage."""
    ranks = {entry.name: entry.rank for entry in read_manifest(folder)}
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    write_manifest(folder, [settle(path, ranks[path.name]) for path in files])
    point_latest(folder)
