"""Plans to check: from random layouts and sizes to others, and of one growth between given layouts."""

from __future__ import annotations

import itertools
import random

import numpy as np

from megabus.config import GrowthConfig, ModelConfig
from megabus.config.precision import FP32_BYTES
from megabus.config.stages import Layout
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan, RowRange
from megabus.parallel.placement import Placement

SEEDS = range(8)


def layouts(world):
    degrees = itertools.product(range(1, 5), repeat=3)
    return [Layout(*each) for each in degrees if np.prod(each) == world]


def random_model(draw, layout, old=None):
    """Awkward sizes that the layout (and the old model) allow: multiples of tp only where needed."""

    def size(low, high, multiple=1, at_least=1):
        return (max(low, -(-at_least // multiple)) + draw.randint(0, high - low)) * multiple

    tp = layout.tp
    kv = size(1, 2, tp, old.kv_heads if old else 1)
    group = max(draw.randint(1, 2), old.n_heads // old.kv_heads if old else 1)
    return ModelConfig(
        kind=old.kind if old else draw.choice(["ngpt", "gpt"]),
        vocab_size=old.vocab_size if old else draw.choice([65, 66, 67]),
        d_model=size(5, 12, 1, old.d_model if old else 1),
        n_layers=size(layout.pp, layout.pp + 2, 1, old.n_layers if old else 1),
        n_heads=kv * group,
        n_kv_heads=kv,
        head_dim=2,
        d_ff=size(3, 9, tp, old.d_ff if old else 1),
    )


def random_pair(seed):
    """A plan from one random layout and size to another of the same world."""
    draw = random.Random(seed)
    world = draw.choice([2, 3, 4, 6, 8, 12])
    layout, new_layout = draw.choice(layouts(world)), draw.choice(layouts(world))
    model = random_model(draw, layout)
    new_model = random_model(draw, new_layout, model)
    how = GrowthConfig(
        depth=draw.choice(["append", "identity", "stack", "fresh"]),
        channels=draw.choice(["even", "uneven"]),
        moments=draw.choice(["carry", "grow"]),
    )
    old, new = Placement(model, layout), Placement(new_model, new_layout)
    return Plan(old, new, Growth(model, new_model, how, seed))


MODEL = ModelConfig(vocab_size=66, d_model=9, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=14)
SIZES = {"d_model": 13, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "d_ff": 22}
LARGER = MODEL.model_copy(update=SIZES)


def grown_plan(layout, new_layout, **how):
    growth = Growth(MODEL, LARGER, GrowthConfig(**how), 5)
    return Plan(Placement(MODEL, layout), Placement(LARGER, new_layout), growth)


def copied_index(new, old):
    """Which old index each of `new` copies, if it were an axis of its own."""
    return [i * old // new for i in range(new)]


def row_parents(growth, axis):
    """The old row of every new row along an axis; written without megabus's maps."""
    old, new = growth.old, growth.new
    if axis not in ("heads", "kv_heads"):
        sizes = {"ffn": "d_ff", "vocab": "vocab_size", "embed": "d_model"}
        return copied_index(getattr(new, sizes[axis]), getattr(old, sizes[axis]))
    old_group, new_group = old.n_heads // old.kv_heads, new.n_heads // new.kv_heads
    kv, group = copied_index(new.kv_heads, old.kv_heads), copied_index(new_group, old_group)
    heads = kv if axis == "kv_heads" else [k * old_group + g for k in kv for g in group]
    return [head * old.head_dim + i for head in heads for i in range(old.head_dim)]


def needed_entries(plan, rank, kind):
    """Old entries that a rank's new entries are made of, entry by entry: a set of (parameter, entry).

    A new entry comes from one old one; from a whole row where a copied write row turns; from none where it is zero.
    kind None: whole rows, needed or not.
    """
    growth, needed = plan.growth, set()
    channels = copied_index(growth.new.d_model, growth.old.d_model)
    for piece in plan.new.owned(rank):
        spec = plan.new.specs[piece.name]
        layer = growth.layer_source(spec)
        if layer is None:  # drawn afresh
            continue
        source = spec.name if spec.layer is None else spec.name.replace(f".{spec.layer}.", f".{layer.parent}.", 1)
        parents = row_parents(growth, spec.rows)
        width, old_width = (len(channels), growth.old.d_model) if spec.is_matrix else (1, 1)
        silent = kind == "weight" and spec.gate and layer.copy > 0 and growth.how.depth in ("append", "identity")
        carried = kind in ("exp_avg", "exp_avg_sq") and growth.how.moments == "carry"
        turning = kind == "weight" and spec.role == "write" and growth.how.write != "clone"
        for entry in range(piece.start, piece.stop):
            row, column = divmod(entry, width)
            parent = parents[row]
            copy = spec.rows != "embed" and parent in parents[max(0, row - 1) : row]
            if spec.rows in ("heads", "kv_heads"):
                copy = parents.index(parent) < row
            if silent or (carried and (copy or layer.copy > 0)):
                continue
            whole = kind is None or (turning and parents.count(parent) > 1)
            wanted = range(old_width) if whole else [channels[column] if spec.is_matrix else 0]
            needed |= {(source, parent * old_width + i) for i in wanted}
    return needed


def traffic(plan, kinds=("weight",), ranks=None):
    """Bytes sent to `ranks` (None: to the whole world), and bytes that stay with them."""
    sent = kept = 0
    for dst in range(plan.new.layout.world) if ranks is None else ranks:
        for name, kind in itertools.product(plan.sources(dst), kinds):
            for transfer in plan.transfers(dst, RowRange(name, 0, plan.old.rows(name)), kind):
                if transfer.src == dst:
                    kept += len(transfer.piece)
                else:
                    sent += len(transfer.piece)
    return sent * FP32_BYTES, kept * FP32_BYTES


def owned_entries(placement, rank):
    return {(piece.name, i) for piece in placement.owned(rank) for i in range(piece.start, piece.stop)}
