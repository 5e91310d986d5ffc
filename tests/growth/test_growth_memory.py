"""What a growth takes of memory, and what it sends, on ranks that really exchange shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megabus.config import GrowthConfig, Layout, ModelConfig
from megabus.config.precision import FP32_BYTES
from megabus.estimate.live_bytes import LiveBytes
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan, Required
from megabus.growth.redistribute import redistribute
from megabus.growth.rows import drawn_row_bytes, drawn_rows, grow_rows, row_bytes
from megabus.model.decoder import param_specs
from megabus.parallel.fragments import KINDS
from megabus.parallel.placement import Placement
from megabus.testing.ranks import run_ranks
from tests.support.plans import needed_entries, owned_entries, traffic

torch.set_num_threads(1)
SMALL = {"vocab_size": 67, "d_model": 36, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 62}
WIDTH = {"d_model": 52, "n_heads": 6, "n_kv_heads": 2, "d_ff": 90}
BOTH = WIDTH | {"n_layers": 5}


def plan_of(layouts, larger, model=SMALL, kind="ngpt", **how):
    old, new = ModelConfig(kind=kind, **model), ModelConfig(kind=kind, **model | larger)
    before, after = (Layout(*each) for each in layouts)
    return Plan(Placement(old, before), Placement(new, after), Growth(old, new, GrowthConfig(**how), 7))


def random_fragments(placement, rank, kinds):
    return {piece: {kind: torch.randn(len(piece)) for kind in kinds} for piece in placement.owned(rank)}


# ---- memory

LARGE = {"vocab_size": 151, "d_model": 40, "n_layers": 2, "n_heads": 6, "head_dim": 8, "d_ff": 126}
UNEVEN = {"d_model": 53, "n_layers": 3, "n_heads": 12, "d_ff": 210}
STACKED = {"n_layers": 6}
PAIRS = [((2, 2, 1), (1, 2, 2)), ((1, 1, 3), (3, 1, 1)), ((1, 1, 2), (2, 1, 1))]


def _memory_job(plan, kinds, buffer_bytes, greedy):
    """Bytes beyond the old and the new fragments at the worst moment; bytes of the new ones."""
    if greedy:
        waves = Plan.waves
        Plan.waves = lambda self, rank, *_: waves(self, rank, 2**40, 1)
    rank = dist.get_rank()
    owned = random_fragments(plan.old, rank, kinds)
    with LiveBytes(tensor for tensors in owned.values() for tensor in tensors.values()) as live:
        grown, _ = redistribute(plan, owned, kinds, rank, buffer_bytes)
    new = sum(tensor.nbytes for tensors in grown.values() for tensor in tensors.values())
    assert live.now == new  # nothing else is left
    return live.peak - new, new


def peaks(plan, kinds, kib, greedy=False):
    ranks = run_ranks(plan.old.layout.world, _memory_job, plan, kinds, kib * 2**10, greedy)
    return [(extra / 2**10, shard / 2**10) for extra, shard in ranks]


@pytest.mark.parametrize(("kib", "manner"), [(128, "tilt"), (256, "clone")])
@pytest.mark.parametrize("layouts", PAIRS, ids=str)
def test_a_growth_takes_no_more_than_the_buffer(layouts, kib, manner):
    plan = plan_of(layouts, UNEVEN, LARGE, moments="grow", write=manner, channels="uneven")
    for extra, shard in peaks(plan, KINDS, kib):
        assert kib / 8 < extra <= kib
        assert shard > 1.4 * kib


@pytest.mark.parametrize(("depth", "kib"), [("stack", 64), ("stack", 200), ("fresh", 64)])
def test_layers_on_top_of_many_ranks_fit_the_buffer_too(depth, kib):
    """One old row goes to several ranks, and nowhere do copies of it pile up; nor does what is drawn."""
    plan = plan_of(((1, 1, 4), (2, 2, 1)), STACKED, LARGE, moments="grow", depth=depth)
    assert all(extra <= kib for extra, _ in peaks(plan, KINDS, kib))


def test_negative_control_without_waves_the_buffer_overflows():
    plan = plan_of(PAIRS[0], UNEVEN, LARGE, moments="grow")
    assert max(extra for extra, _ in peaks(plan, KINDS, 256, greedy=True)) > 256


@pytest.mark.parametrize("write", ["tilt", "clone"])
def test_rows_take_what_they_are_said_to(write):
    """The widest growth of a row: seven copies. Blocks of one row and of many."""
    wider = {"tilt": {"d_model": 7 * 36}, "clone": {}}[write]
    larger = {"n_heads": 28, "n_kv_heads": 14, "d_ff": 7 * 62} | wider
    job = plan_of(PAIRS[0], larger, write=write, read="tilt", moments="grow").growth
    for name in ("layers.1.mlp.down", "layers.1.mlp.up", "layers.1.alpha_attn", "layers.1.s_u"):
        spec = Placement(job.new, Layout(1, 1, 1)).specs[name]
        old, param = torch.randn(62, 36) if spec.is_matrix else torch.randn(62), job.param(name)
        for kind in KINDS:
            for count in (1, 20):
                limit = count * row_bytes(param)
                with LiveBytes([old]) as live:
                    for _ in grow_rows(param, kind, 0, 36, lambda at, old=old: old[torch.from_numpy(at)], limit):
                        pass
                assert live.peak <= limit
                assert live.peak > limit / 11 or kind != "weight"


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_drawn_rows_take_what_they_are_said_to(kind):
    model = ModelConfig(kind=kind, **SMALL)
    for name in ("layers.1.attn.out", "layers.1.s_u" if kind == "ngpt" else "layers.1.norm_mlp.gain"):
        spec = param_specs(model)[name]
        for count in (1, 20):
            limit = count * drawn_row_bytes(model)
            with LiveBytes([]) as live:
                for _ in drawn_rows(model, name, 7, 5, 36, torch.device("cpu"), limit):
                    pass
            assert live.peak <= limit
            assert live.peak > 0.85 * limit or not spec.is_matrix


# ---- bytes


def _sent_job(plan, kinds, needless):
    """Bytes that this rank hands to torch.distributed to be sent."""
    if needless:
        required = Plan.required
        Plan._parents = lambda self, pieces: np.arange(self.old.rows(_parent_of(self, pieces[0])))
        Plan.required = lambda self, rows, pieces, kind: needless_rows(required(self, rows, pieces, kind), self, rows)
    sent, batch = [], dist.batch_isend_irecv

    def counted(jobs):
        sent.extend(job.tensor.nbytes for job in jobs if job.op is dist.isend)
        return batch(jobs)

    dist.batch_isend_irecv = counted
    rank = dist.get_rank()
    _, traffic = redistribute(plan, random_fragments(plan.old, rank, kinds), kinds, rank, 2**18)
    assert traffic.sent == sum(sent)
    return sum(sent)


def _parent_of(plan, piece):
    return plan.growth.source(piece.name)


def needless_rows(required, plan, rows):
    """All of a row range to whoever needs any of it."""
    if not len(required.rows):
        return required
    width = plan.old.width(rows.name)
    return Required(np.arange(rows.start, rows.stop), [(rows.start * width, rows.stop * width)])


def least(plan, kinds):
    """Bytes that must change owner: entries that a rank's new ones are made of, and that it has not."""
    missing = 0
    for rank in range(plan.old.layout.world):
        owned = owned_entries(plan.old, rank)
        missing += sum(len(needed_entries(plan, rank, kind) - owned) for kind in kinds)
    return missing * FP32_BYTES


def sent(plan, kinds, needless=False):
    return sum(run_ranks(plan.old.layout.world, _sent_job, plan, kinds, needless))


MOVES = [
    ((1, 1, 4), (1, 1, 4)),
    ((2, 2, 1), (1, 2, 2)),
    ((1, 3, 1), (1, 1, 3)),
    ((1, 2, 2), (2, 1, 2)),
]
MANNERS = [
    (WIDTH, "reset", {}),
    (WIDTH, "grow", {"write": "clone"}),
    ({"n_layers": 5}, "carry", {"depth": "stack"}),
    (BOTH, "grow", {"depth": "split"}),
    (BOTH, "grow", {"depth": "fresh"}),
    (BOTH, "carry", {"write": "clone"}),
    ({}, "grow", {}),
]


@pytest.mark.parametrize(("larger", "moments", "manner"), MANNERS, ids=str)
@pytest.mark.parametrize("layouts", MOVES, ids=str)
def test_nothing_is_sent_that_need_not_change_owner(layouts, larger, moments, manner):
    kinds = ("weight",) if moments == "reset" else KINDS
    kind = "gpt" if "depth" in manner else "ngpt"
    plan = plan_of(layouts, larger, kind=kind, moments=moments, **manner)
    must = least(plan, kinds)
    assert must <= sent(plan, kinds) <= 1.05 * must
    assert traffic(plan, kinds)[0] == must
    assert (must == 0) == (layouts[0] == layouts[1] and not larger)


def test_negative_control_needless_rows_are_counted():
    plan = plan_of(MOVES[1], BOTH)
    assert sent(plan, ("weight",), needless=True) > 1.05 * least(plan, ("weight",))
