"""Bits of grown shards; directions that differ, and what they are for."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megabus
from megabus import counter
from megabus.growth import rows as rows_module
from megabus.growth.param_growth import Growth
from megabus.growth.rows import grow_rows, row_bytes
from megabus.model.decoder import param_specs
from megabus.model.params import global_shape, spec_of
from tests.support.growing import CHANNELS, FRACTION, READS, WIDTH, how, row_matrices, same
from tests.support.small_models import GQA, KINDS, PART_IDS, PARTS, config, lively_state, loss_of, model_of

torch.set_num_threads(1)


# ---- shards, threads, blocks


def growth_job(seed=1, kind="ngpt", after=FRACTION, parts=None, **manner):
    old = config(kind, GQA, parts or {})
    new = config(kind, GQA, parts or {}, after, {"n_heads": 9, "n_kv_heads": 3})
    return Growth(old, new, how(**manner), seed)


def grown_in_parts(param, kind, old, cuts):
    """A parameter grown span by span, each fetching no rows but those it asks for."""

    def fetch(parents):
        needed = np.unique(parents)
        return old[needed][np.searchsorted(needed, parents)]

    return torch.cat([rows for span in pairwise(cuts) for _, rows in grow_rows(param, kind, *span, fetch)])


def parts_agree(job, kind, draw, single_rows=(), shorter=False):
    """shorter: rows are those of a running mean of unit rows."""
    state, whole_is_parts = lively_state(job.old), True
    if shorter:
        state = {
            name: x * torch.rand(len(x), *[1] * (x.dim() - 1), generator=torch.Generator().manual_seed(1))
            for name, x in state.items()
        }
    grown = megabus.grow_state(state, job.old, job.new, job.seed, job.how, kind)
    for name, spec in param_specs(job.new).items():
        n = global_shape(spec, job.new)[0]
        if job.source(name) is None:
            continue
        cuts = sorted({0, n, *draw.integers(1, n, 3).tolist()})
        cuts = list(range(n + 1)) if name in single_rows else cuts
        parts = grown_in_parts(job.param(name), kind, state[job.source(name)], cuts)
        whole_is_parts &= torch.equal(parts, grown[name])
    return whole_is_parts


SINGLE = ("layers.1.attn.out", "layers.2.mlp.down", "layers.0.alpha_attn", "layers.0.attn.q", "layers.0.s_u")


@pytest.mark.parametrize("moments", ["grow", "carry"])
@pytest.mark.parametrize("write", ["tilt", "clone"])
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_growing_row_ranges_gives_the_bits_of_growing_all(kind, write, moments):
    draw = np.random.default_rng(0)
    for model in KINDS:
        for channels, read in zip(CHANNELS, READS, strict=True):
            job = growth_job(kind=model, write=write, read=read, moments=moments, channels=channels)
            assert parts_agree(job, kind, draw, SINGLE if model == "ngpt" else ())


@pytest.mark.parametrize("write", ["tilt", "clone"])
def test_growing_row_ranges_of_running_means_gives_the_bits_of_growing_all(write):
    draw = np.random.default_rng(0)
    for model in KINDS:
        job = growth_job(kind=model, write=write, read="tilt", channels="uneven")
        assert parts_agree(job, "ema-0.9", draw, SINGLE if model == "ngpt" else (), shorter=True)


@pytest.mark.parametrize("parts", PARTS[:2], ids=PART_IDS[:2])
def test_ranges_of_biases_norms_and_tied_heads_too(parts):
    assert parts_agree(growth_job(kind="gpt", parts=parts, read="tilt"), "weight", np.random.default_rng(0))


def test_the_shard_check_notices_local_randomness(monkeypatch):
    normals = counter.normals
    monkeypatch.setattr(counter, "normals", lambda key, rows, n: normals(key, rows - rows[0], n))
    assert not parts_agree(growth_job(), "weight", np.random.default_rng(0))


def test_the_shard_check_notices_values_that_depend_on_neighbours(monkeypatch):
    tilt = rows_module._tilt_write
    monkeypatch.setattr(rows_module, "_tilt_write", lambda w, *args: tilt(w, *args) * (1 + 1e-6 * len(w)))
    assert not parts_agree(growth_job(), "weight", np.random.default_rng(0))


def test_bits_do_not_depend_on_threads_or_blocks(monkeypatch):
    job, name = growth_job(after={"d_model": 400, "d_ff": 186}), "layers.0.mlp.down"
    old, param = lively_state(job.old)[name], job.param(name)

    def grow(limit=rows_module.BLOCK_BYTES):
        rows = grow_rows(param, "weight", 0, 186, lambda parents: old[parents], limit)
        return torch.cat([block for _, block in rows])

    grown = grow()
    assert grown.numel() > 2**16  # enough for PyTorch to share out among threads
    try:
        torch.set_num_threads(2)
        assert torch.equal(grow(), grown)
    finally:
        torch.set_num_threads(1)
    blocks = []
    real = rows_module._weight
    monkeypatch.setattr(rows_module, "_weight", lambda *args: blocks.append(1) or real(*args))
    assert torch.equal(grow(8 * row_bytes(param) - 1), grown)
    assert len(blocks) == 27


class Divisions(TorchDispatchMode):
    """Divisions by numbers that are no powers of two. A CUDA kernel would multiply by their reciprocals."""

    def __init__(self):
        super().__init__()
        self.by = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and not isinstance(args[1], torch.Tensor):
            self.by += [args[1]] * (math.frexp(args[1])[0] != 0.5)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("manner", [{"after": {"d_ff": 186}}, {"read": "tilt"}, {"depth": "taper"}], ids=str)
def test_nothing_is_divided_by_a_number_that_lies_on_no_device(manner):
    for kind in KINDS:
        job = growth_job(kind=kind, **manner)
        with Divisions() as divisions:
            megabus.grow_state(lively_state(job.old), job.old, job.new, job.seed, job.how)
            assert divisions.by == []
            torch.ones(3) / 3  # control
            assert divisions.by == [3]


# ---- directions


def test_seeds_layers_and_growths_draw_different_directions():
    old, new = config(), config("ngpt", WIDTH)
    state = lively_state(old)
    for layer in range(3):  # the same write matrices in every layer
        state[f"layers.{layer}.mlp.down"] = state["layers.0.mlp.down"]
    one, again, two = (megabus.grow_state(state, old, new, seed, how()) for seed in (1, 1, 2))
    assert same(one, again)
    downs = [grown[f"layers.{layer}.mlp.down"] for grown in (one, two) for layer in range(3)]
    assert len({x.numpy().tobytes() for x in downs}) == 6
    clones = megabus.grow_state(state, old, new, 1, how(write="clone"))
    assert len({clones[f"layers.{layer}.mlp.down"].numpy().tobytes() for layer in range(3)}) == 1


def spread_within_families(kind, write, steps=1):
    """Train the grown model; returns how far copies of ffn and head rows are apart, by parameter."""
    old, new = config(kind), config(kind, {"n_heads": 4, "d_ff": 93})
    grown = megabus.grow_state(lively_state(old), old, new, 1, how(write=write))
    model = model_of(new, grown)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    apart = []
    for step in range(steps + 1):
        rows = row_matrices(old, new)
        apart.append({})
        for name, p in model.named_parameters():
            C, w = rows[spec_of(p).rows], p.detach().view(len(p), -1)
            if spec_of(p).rows in ("ffn", "heads") and C.sum(0).max() > 1:
                mean = C @ (C.T @ w) / (C @ C.sum(0))[:, None]
                short = name.split(".", 2)[-1]
                apart[step][short] = max(apart[step].get(short, 0), float((w - mean).abs().max()))
        adam.zero_grad()
        loss_of(model).backward()
        adam.step()
    return apart


@pytest.mark.parametrize("kind", KINDS)
def test_tilt_sets_copies_apart_where_clones_stay_together(kind):
    write = ("attn.out", "mlp.down")
    tilted, cloned = (spread_within_families(kind, write) for write in ("tilt", "clone"))
    for short, apart in tilted[0].items():
        assert (apart > 1e-2) == (short in write)  # read rows start out as exact copies
        assert tilted[1][short] > 1e-3
        assert cloned[0][short] == 0
        assert cloned[1][short] < 1e-6
