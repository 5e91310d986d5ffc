"""Plans to check: from random layouts and sizes to others, and of one growth between given layouts."""

from __future__ import annotations

import itertools
import random

import numpy as np

from megabus.config import GrowthConfig, ModelConfig
from megabus.config.stages import Layout
from megabus.growth.plan import Plan
from megabus.growth.rules import Growth
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
    how = GrowthConfig(depth=draw.choice(["identity", "stack"]), channels=draw.choice(["even", "uneven"]))
    old, new = Placement(model, layout), Placement(new_model, new_layout)
    return Plan(old, new, Growth(model, new_model, how, seed))


MODEL = ModelConfig(vocab_size=66, d_model=9, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=14)
SIZES = {"d_model": 13, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "d_ff": 22}
LARGER = MODEL.model_copy(update=SIZES)


def grown_plan(layout, new_layout, **how):
    growth = Growth(MODEL, LARGER, GrowthConfig(**how), 5)
    return Plan(Placement(MODEL, layout), Placement(LARGER, new_layout), growth)
