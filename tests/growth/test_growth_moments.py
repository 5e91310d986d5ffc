"""Moments grown or carried, against the gradients of the grown model."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch

import megabus
from megabus.growth import param_growth
from megabus.model.decoder import param_specs
from tests.support.growing import (
    CHANNELS,
    FRACTION,
    WIDTH,
    WIDTH_IDS,
    WIDTHS,
    flat_scale,
    gap,
    gradients,
    how,
    isometry,
    mapped_and_true,
    mean_squares,
    row_matrices,
)
from tests.support.small_models import GQA, KINDS, config, lively_state

torch.set_num_threads(1)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_embed_growth_maps_moments_as_gradients(kind, channels, power):
    """Where only d_model grows, a mapped first moment is the gradient (g' = a g), a second one its square."""
    for width in (52, 131):
        _, _, mapped, true = mapped_and_true(kind, {}, {"d_model": width}, power, channels=channels)
        assert max(gap(mapped[name], true[name]) for name in true) < 1e-5


@pytest.mark.parametrize("power", [1, 2])
def test_unmapped_scales_would_show(power, monkeypatch):
    monkeypatch.setattr(param_growth, "channel_scale", flat_scale)
    _, _, mapped, true = mapped_and_true("ngpt", {}, {"d_model": 52}, power)
    assert min(gap(mapped[name], true[name]) for name in ("embed.weight", "layers.0.mlp.up")) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), WIDTHS, ids=WIDTH_IDS)
def test_copied_rows_share_their_familys_gradient(kind, before, after):
    """Write rows get their exact gradient; copied read rows and gains get the mean of their family's."""
    old, new, mapped, true = mapped_and_true(kind, before, after)
    rows = row_matrices(old, new)
    differ = 0.0
    for name, spec in param_specs(new).items():
        C = rows[spec.rows]
        if spec.role == "write" or not spec.sharded or spec.rows == "vocab":
            assert gap(mapped[name], true[name]) < 1e-5, name
            continue
        mean = C @ (C.T @ true[name]) / (C @ C.sum(0)).view(-1, *(1,) * (true[name].ndim - 1))
        assert gap(mapped[name], mean) < 1e-5, name
        differ = max(differ, gap(mapped[name], true[name]))
    assert differ > 1e-2  # a member's own gradient does differ: the mean is all that a map can know


@pytest.mark.parametrize(("depth", "parents", "added"), [("append", "01201", (3, 4)), ("identity", "00112", (1, 3))])
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_carried_moments_stay_with_originals(kind, depth, parents, added):
    """Old entries, times a (squared for second moments) on embed; zero for copies and added layers."""
    old, new = config(), config("ngpt", FRACTION)
    moments = {name: g.float() for name, g in gradients(old, lively_state(old)).items()}
    if kind == "exp_avg_sq":
        moments = {name: g.square() for name, g in moments.items()}
    power = 1 if kind == "exp_avg" else 2
    carried = megabus.grow_state(moments, old, new, 1, how(moments="carry", depth=depth), kind)
    E = isometry(36, 52, "even") ** power
    for name, spec in param_specs(new).items():
        parent = int(parents[spec.layer or 0])
        source = moments[spec.in_layer(parent)].double()
        if spec.layer in added:
            assert (carried[name] == 0).all()
        elif spec.is_matrix:
            C = row_matrices(old, new)[spec.rows]
            first = (C.cumsum(0) == 1) * C
            assert gap(carried[name], first @ source @ E.T) < 1e-6, name
        elif spec.rows == "embed":  # a for its channel of h, a for that of the branch, 1/(init/scale) for raw
            assert gap(carried[name], E.square() @ source * sqrt(52 / 36) ** power) < 1e-6, name


@pytest.mark.parametrize(("moments", "write"), [("grow", "clone"), ("carry", "clone"), ("carry", "tilt")])
@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_are_the_first_ones_squared(kind, moments, write):
    """m of g and v of g^2 stay so on every entry: Adam's step does not feel a family's share."""
    old, new = config(kind, GQA), config(kind, GQA, FRACTION, {"n_heads": 9, "n_kv_heads": 3})
    first = {name: g.float() for name, g in gradients(old, lively_state(old)).items()}
    second = {name: m.square() for name, m in first.items()}
    manner = how(moments=moments, channels="uneven", write=write)
    m, v = (
        megabus.grow_state(state, old, new, 1, manner, what)
        for state, what in ((first, "exp_avg"), (second, "exp_avg_sq"))
    )
    assert all(torch.allclose(v[name], m[name].square(), rtol=1e-5, atol=0) for name in m)
    assert not torch.allclose(v["layers.0.mlp.up"], m["layers.0.mlp.up"].abs(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("write", "low", "high"), [("tilt", 0.6, 1.5), ("clone", 0.99, 1.01)])
def test_squares_of_copied_rows_are_what_they_become(kind, write, low, high):
    """Mean squares of gradients after a doubling of heads and units, over those that `grow` makes of the ones before:
    a tilted copy's gradient is no smaller than its parent's, a clone's half of it (a quarter of the square)."""
    old, new = config(kind, GQA), config(kind, GQA, {"n_heads": 8, "n_kv_heads": 4, "d_ff": 124})
    state, manner = lively_state(old), how(moments="grow", write=write)
    grown = megabus.grow_state(state, old, new, 1, manner)
    before, after = (mean_squares(*pair) for pair in ((old, state), (new, grown)))
    mapped = megabus.grow_state(before, old, new, 1, manner, "exp_avg_sq")
    names = [n for n, spec in param_specs(new).items() if spec.role == "read" and spec.rows != "vocab"]
    ratios = [float(after[n].sum() / mapped[n].sum()) for n in names if ".0." in n]
    assert len(ratios) == 5
    assert low < min(ratios) <= max(ratios) < high
    other = {"tilt": "clone", "clone": "tilt"}[write]  # with the other's share the ratios would be 4 times as far
    wrong = megabus.grow_state(before, old, new, 1, how(moments="grow", write=other), "exp_avg_sq")
    assert not any(low < float(after[n].sum() / wrong[n].sum()) < high for n in names if ".0." in n)


def slopes_of_shared(kind, depth, **manner):
    """{parameter of a layer of six: first moment over gradient} after three layers became two copies each."""
    old, new = config(kind), config(kind, {"n_layers": 6})
    state, manner = lively_state(old, larger=1), how(depth=depth, **manner)
    moments = {name: g.float() for name, g in gradients(old, state).items()}
    mapped = megabus.grow_state(moments, old, new, 1, manner, "exp_avg")
    true = gradients(new, megabus.grow_state(state, old, new, 1, manner))
    return {
        spec: float((mapped[name].double() * true[name]).sum() / true[name].square().sum())
        for name, spec in param_specs(new).items()
    }


@pytest.mark.parametrize("depth", ["split", "taper"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_a_gate_share_what_is_behind_it(kind, depth):
    """First moments over gradients of each copy: 1 for gates and for all that they silence."""
    told = slopes_of_shared(kind, depth, moments="grow")
    assert all(0.8 < slope < 1.25 for slope in told.values()), {spec.name: slope for spec, slope in told.items()}
    assert {spec.branch for spec in told if spec.layer is not None} == {1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_shares_would_show(kind, monkeypatch):
    """Negative control: of a gate that was shared 3 to 1, what is behind it does not get a half each."""
    share = param_growth._share

    def halved(growth, spec, layer, *rest):
        return share(replace(growth, how=how(moments="grow", depth="split")), spec, layer, *rest)

    monkeypatch.setattr(param_growth, "_share", halved)
    told = slopes_of_shared(kind, "taper", moments="grow")
    assert not any(0.8 < slope < 1.25 for spec, slope in told.items() if spec.branch and not spec.gate)


@pytest.mark.parametrize("kind", KINDS)
def test_originals_that_are_carried_share_too(kind):
    told = slopes_of_shared(kind, "taper", moments="carry")
    for spec, slope in told.items():
        added = spec.layer is not None and spec.layer % 2
        assert slope == 0 if added else 0.8 < slope < 1.25, (spec.name, slope)


# ---- plain clones

CLONE = {"write": "clone", "channels": "uneven"}
EVEN = [({}, {"n_heads": 4, "d_ff": 90}), (GQA, {"n_heads": 8, "d_ff": 124}), (GQA, {"n_heads": 8, "n_kv_heads": 4})]
UNEVEN = [({}, {"n_heads": 3, "d_ff": 90}), (GQA, {"n_heads": 9, "n_kv_heads": 3})]
IDS = ["2-4", "4:2-8:2", "4:2-8:4", "2-3", "4:2-9:3"]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("before", "after"), EVEN + UNEVEN, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_clones_are_their_gradients(kind, before, after, power):
    """Of every parameter and entry by entry, wherever clones keep the function: nGPT's heads must be even in number."""
    _, _, mapped, true = mapped_and_true(kind, before, after | {"d_model": 52}, power, **CLONE)
    largest = max(gap(mapped[name], true[name]) for name in true)
    assert (largest < 1e-5) == (kind == "gpt" or (before, after) in EVEN), largest


def mapped_over_true(before, after, **manner):
    """Moments after growth over gradients, by parameter of the first layer: of first ones the slope, and of second ones
    the sum over batches."""
    old, new, mapped, true = mapped_and_true("ngpt", before, after, **CLONE, **manner)
    manner, state = how(moments="grow", **CLONE, **manner), lively_state(old)
    grown = megabus.grow_state(state, old, new, 1, manner)
    squares, then = (mean_squares(*pair, batches=6) for pair in ((old, state), (new, grown)))
    squares = megabus.grow_state(squares, old, new, 1, manner, "exp_avg_sq")
    names = [n for n, spec in param_specs(new).items() if spec.layer in (0, None)]
    mean = {n: float(mapped[n].double().square().sum() / (mapped[n].double() * true[n]).sum()) for n in names}
    return mean, {n: float(squares[n].sum() / then[n].sum()) for n in names}


@pytest.mark.parametrize(
    ("before", "after", "read"), [(*EVEN[1], "tilt"), *((*case, "clone") for case in UNEVEN)], ids=["tilt", *IDS[3:]]
)
def test_moments_of_clones_are_near_their_gradients(before, after, read):
    """Where read rows turn, and where uneven numbers of heads change the function."""
    mean, square = mapped_over_true(before, after | {"d_model": 52}, read=read)
    low, high = (0.9, 1.1) if read == "tilt" else (0.6, 1.4)
    for ratios in (mean, square):
        assert low < min(ratios.values()) <= max(ratios.values()) < high, ratios


@pytest.mark.parametrize(("before", "after"), [EVEN[0], UNEVEN[1]], ids=["even", "uneven"])
def test_a_share_by_role_alone_would_show(before, after, monkeypatch):
    """All of the gradient for write rows and 1/n for whatever else is copied, as it is where write rows are divided."""

    def by_role(growth, spec, rows):
        return np.ones(len(rows)) if spec.role == "write" or spec.rows == "embed" else 1 / rows.copies

    monkeypatch.setattr(param_growth, "_clone_share", by_role)
    mean, square = mapped_over_true(before, after)
    assert mean["layers.0.attn.out"] > 1.9
    assert square["layers.0.attn.out"] > 3.6
    if "d_ff" in after:
        assert mean["layers.0.mlp.down"] > 1.3
        assert mean["layers.0.s_u"] < 0.8


def test_reset_moments_are_zero():
    old, new = config(), config("ngpt", WIDTH)
    state = lively_state(old)
    for kind in ("exp_avg", "exp_avg_sq"):
        for moments, zero in (("reset", True), ("carry", False), ("grow", False)):
            grown = megabus.grow_state(state, old, new, 1, how(moments=moments), kind)
            assert all((x == 0).all() == zero for x in grown.values())
