"""Running means of weights grow as the weights do: what is computed with their directions stays the same."""

from __future__ import annotations

import pytest
import torch

import megabus
from megabus.growth.param_growth import Growth
from megabus.model.decoder import param_specs
from tests.support.growing import FRACTION, how
from tests.support.small_models import GQA, config, lively_state, loss_of, model_of

OLD, NEW = config("ngpt", GQA), config("ngpt", GQA, FRACTION, {"n_heads": 8, "n_kv_heads": 2, "n_layers": 5})
MANNERS = [{"read": "tilt", "channels": "uneven"}, {"depth": "taper"}, {"depth": "fresh"}, {"write": "clone"}]


def mean_of_unit_rows():
    """Of two models' weights: rows of lengths between 0 and 1."""
    a, b = lively_state(OLD, 3), lively_state(OLD, 4)
    return {name: 0.7 * a[name] + 0.3 * b[name] for name in a}


def directions(state, model):
    specs = param_specs(model)
    return {
        name: torch.nn.functional.normalize(x.double(), dim=1) if specs[name].unit else x.double()
        for name, x in state.items()
    }


def grown(state, manner, kind):
    return megabus.grow_state(state, OLD, NEW, 1, how(**manner), kind)


def apart(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in b)


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_directions_of_what_grows_are_what_directions_grow_to(manner):
    mean = mean_of_unit_rows()
    there = directions(grown(mean, manner, "ema-0.9"), NEW)
    wanted = grown(directions(mean, OLD), manner, "weight")
    assert apart(there, wanted) < 1e-6
    if manner.get("read") == "tilt":  # control: grown as a weight, which is a unit vector, it turns too far
        assert apart(directions(grown(mean, manner, "weight"), NEW), wanted) > 0.01


@torch.no_grad()
def test_the_loss_of_a_mean_stays():
    mean, manner = mean_of_unit_rows(), MANNERS[0]
    before = loss_of(model_of(OLD, directions(mean, OLD)))
    after = loss_of(model_of(NEW, directions(grown({n: x.double() for n, x in mean.items()}, manner, "ema-0.9"), NEW)))
    assert abs(float(before) - float(after)) < 1e-9


def test_unit_rows_and_all_of_a_gpt_grow_as_weights():
    state, kind = lively_state(OLD), "ema-0.5"
    assert apart(grown(state, {"read": "tilt"}, kind), grown(state, {"read": "tilt"}, "weight")) < 1e-7
    old, new = config("gpt"), config("gpt", {"d_model": 52, "d_ff": 90, "n_layers": 4})
    pair = [megabus.grow_state(lively_state(old), old, new, 1, how(read="tilt"), each) for each in (kind, "weight")]
    assert all(torch.equal(pair[0][name], x) for name, x in pair[1].items())


def test_means_are_sent_with_the_weights():
    assert Growth(OLD, NEW, how(moments="reset"), 1, means=("ema-0.9",)).sent_kinds == ("weight", "ema-0.9")
    assert Growth(OLD, NEW, how(), 1, means=("ema-0.9",)).sent_kinds[-1] == "ema-0.9"
