"""Maps of growth, and grown parameters against explicit dense matrices."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

import megabus
from megabus.growth import maps, param_growth, rows
from megabus.growth.maps import axis_maps, channel_scale, grouped, layer_sources, spread
from megabus.model.decoder import param_specs
from tests.support.growing import (
    CHANNELS,
    WIDTH,
    WIDTH_IDS,
    WIDTHS,
    flat_scale,
    how,
    isometry,
    one_sided_simplex,
    row_matrices,
)
from tests.support.small_models import GQA, KINDS, config, lively_state

torch.set_num_threads(1)


# ---- maps


def test_spread_copies_evenly_and_side_by_side():
    rows = spread(5, 8)
    assert rows.parent.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert rows.copy.tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert rows.copies.tolist() == [2, 2, 2, 2, 1, 2, 2, 1]
    for old, new in ((36, 52), (36, 131), (62, 233), (7, 7)):
        counts = np.bincount(spread(old, new).parent, minlength=old)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("old", "new"), [((4, 2), (6, 3)), ((4, 2), (6, 2)), ((4, 2), (9, 3)), ((2, 2), (11, 11))])
def test_grouped_heads_stay_with_their_key(old, new):
    """The key head of a new query head is a copy of its parent's key head."""
    heads = grouped(old[1], new[1], old[0] // old[1], new[0] // new[1])
    kv = spread(old[1], new[1])
    for head in range(new[0]):
        assert heads.parent[head] // (old[0] // old[1]) == kv.parent[head // (new[0] // new[1])]
        family = np.flatnonzero(heads.parent == heads.parent[head])
        assert heads.copies[head] == len(family)
        assert heads.copy[family].tolist() == list(range(len(family)))
    assert set(heads.parent) == set(range(old[0]))


@pytest.mark.parametrize(
    ("depth", "parents", "gates"),
    [
        ("append", [0, 1, 2, 0, 1], [1, 1, 1, 0, 0]),
        ("identity", [0, 0, 1, 1, 2], [1, 0, 1, 0, 1]),
        ("split", [0, 0, 1, 1, 2], [0.5, 0.5, 0.5, 0.5, 1]),
        ("stack", [0, 1, 2, 0, 1], [1, 1, 1, 1, 1]),
        ("interleave", [0, 0, 1, 1, 2], [1, 1, 1, 1, 1]),
    ],
)
def test_depth_maps(depth, parents, gates):
    sources = layer_sources(3, 5, depth)
    assert [source.parent for source in sources] == parents
    assert [source.gate(depth, branch) for branch in (1, 2) for source in sources] == 2 * gates
    old, new = config(), config("ngpt", {"n_layers": 5})
    state = lively_state(old)
    grown = megabus.grow_state(state, old, new, 1, how(depth=depth))
    for layer, (parent, gate) in enumerate(zip(parents, gates, strict=True)):
        for short in ("attn.q", "mlp.down", "s_qk", "alpha_attn", "alpha_mlp"):
            factor = gate if short.startswith("alpha") else 1
            assert torch.equal(grown[f"layers.{layer}.{short}"], factor * state[f"layers.{parent}.{short}"])


@pytest.mark.parametrize(("new", "shares"), [(2, [3 / 4, 1 / 4]), (3, [9 / 13, 3 / 13, 1 / 13]), (1, [1])])
def test_tapered_shares_keep_attention_before_the_mlp(new, shares):
    """On the sphere a share is one of alpha / (1 - alpha); the baseline's write matrices take it as it is."""
    sources = layer_sources(1, new, "taper")
    for branch, wanted in ((1, shares), (2, shares[::-1])):
        assert np.allclose([source.gate("taper", branch) for source in sources], wanted, rtol=1e-15, atol=0)
    for kind, gates in (("ngpt", ("alpha_attn", "alpha_mlp")), ("gpt", ("attn.out", "mlp.down"))):
        old, larger = config(kind, {"n_layers": 1}), config(kind, {"n_layers": new})
        state = {name: x.double() for name, x in lively_state(old).items()}
        grown = megabus.grow_state(state, old, larger, 1, how(depth="taper"))
        for gate, wanted in zip(gates, (shares, shares[::-1]), strict=True):
            scale, total = param_specs(larger)[f"layers.0.{gate}"].multiplier, 0
            for layer, share in enumerate(wanted):
                alpha = grown[f"layers.{layer}.{gate}"] * scale
                ratio = alpha / (1 - alpha) if kind == "ngpt" else alpha
                total = total + ratio
                whole = state[f"layers.0.{gate}"] * scale
                whole = whole / (1 - whole) if kind == "ngpt" else whole
                assert (ratio - share * whole).abs().max() < 1e-14
            assert (total - whole).abs().max() < 1e-14


def test_alphas_of_one_and_more_stay_under_taper():
    """There a ratio has no meaning; near 1 nothing of h is left, so each copy may well do all of it."""
    old, new = config("ngpt", {"n_layers": 1}), config("ngpt", {"n_layers": 2})
    state, gate = lively_state(old), "layers.0.alpha_mlp"
    alpha = torch.linspace(0.9, 3, 36, dtype=torch.float64)
    state[gate] = alpha / param_specs(old)[gate].multiplier
    grown = megabus.grow_state(state, old, new, 1, how(depth="taper"))[gate] * param_specs(new)[gate].multiplier
    assert torch.allclose(grown[alpha >= 1], alpha[alpha >= 1], rtol=1e-14)
    assert (grown.diff() > 0).all()
    assert grown[0] < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_layers_are_those_of_a_new_model(kind):
    old, new = config(kind), config(kind, WIDTH, {"n_layers": 5})
    state, begun = lively_state(old), megabus.build_model(new, seed=7).state_dict()
    grown = megabus.grow_state(state, old, new, 7, how(depth="fresh"))
    wider = megabus.grow_state(state, old, config(kind, WIDTH), 7, how())
    for name, spec in param_specs(new).items():
        assert torch.equal(grown[name], begun[name] if spec.layer in (3, 4) else wider[name]), name
    for what in ("exp_avg", "exp_avg_sq"):
        moments = megabus.grow_state(state, old, new, 7, how(depth="fresh", moments="grow"), what)
        assert all((moments[name] == 0).all() == (spec.layer in (3, 4)) for name, spec in param_specs(new).items())


@pytest.mark.parametrize(("depth", "silent_layers"), [("append", (3, 4)), ("identity", (1, 3))])
def test_depth_silences_the_baseline_by_its_write_matrices(depth, silent_layers):
    old, new = config("gpt"), config("gpt", {"n_layers": 5})
    grown = megabus.grow_state(lively_state(old), old, new, 1, how(depth=depth))
    for layer in range(5):
        silent = layer in silent_layers
        for short, zero in (("attn.out", silent), ("mlp.down", silent), ("mlp.up", False)):
            assert (grown[f"layers.{layer}.{short}"].abs().max() == 0) == zero


# ---- the oracle: explicit dense matrices


def violations(old, new, state, grown, channels):
    """By how much the grown width (no depth) departs from the dense matrices, statement by statement."""
    E, rows = isometry(old.d_model, new.d_model, channels), row_matrices(old, new)
    found = dict.fromkeys(("read", "gain", "sum", "length", "angle", "tilt"), 0.0)

    def note(what, error):
        found[what] = max(found[what], float(error.abs().max()) if error.numel() else 0.0)

    for name, spec in param_specs(old).items():
        w, C = state[name].double(), rows[spec.rows]
        if spec.role == "gain":
            keeps = spec.init == 1 and not spec.name.endswith(("s_v", "gain"))  # s_u: no root of d in it
            note("gain", grown[name] - C @ w * (1 if keeps else sqrt(old.d_model / new.d_model)))
        elif spec.role == "read":
            note("read", grown[name] - C @ w @ E.T)
        else:
            wide = w @ E.T
            note("sum", C.T @ grown[name].double() - wide)
            for row, column in zip(wide, C.T, strict=True):
                family, size = grown[name].double()[column.nonzero()[:, 0]], row.norm()
                n = len(family)
                tilt = family - row / n
                note("length", family.norm(dim=-1) / size - 1)
                note("tilt", tilt @ row / size**2)
                if n > 1:
                    unit = tilt / tilt.norm(dim=-1, keepdim=True)
                    wanted = torch.full((n, n), -1 / (n - 1), dtype=torch.float64).fill_diagonal_(1)
                    note("angle", unit @ unit.T - wanted)
    return found


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("old", "new"), [(36, 52), (36, 131), (36, 36), (1, 7)])
def test_the_embedding_is_an_isometry(old, new, channels):
    E = isometry(old, new, channels)
    assert (E.T @ E - torch.eye(old)).abs().max() < 1e-15
    scale = channel_scale(spread(old, new), channels)
    assert np.abs(E.sum(1).numpy() - scale).max() < 1e-15
    if channels == "uneven" and new == 52:
        assert set(scale.round(12)) == {1.0, 0.8, 0.6}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), WIDTHS, ids=WIDTH_IDS)
def test_growth_is_the_dense_oracle(kind, before, after, channels):
    old, new = config(kind, before), config(kind, before, after)
    state = lively_state(old)
    found = violations(old, new, state, megabus.grow_state(state, old, new, 1, how(channels=channels)), channels)
    assert max(found.values()) < 1e-6, found
    if kind == "ngpt":
        for name, x in megabus.grow_state(state, old, new, 1, how(channels=channels)).items():
            if param_specs(new)[name].unit:
                assert (x.double().norm(dim=-1) - 1).abs().max() < 2e-7, name


def two_sided_simplex(copies):
    """Sums to zero and has unit vectors for even numbers of copies only."""
    vertices = torch.zeros(copies, copies - 1, dtype=torch.float64)
    vertices[0::2, 0], vertices[1::2, 0] = 1, -1
    return vertices


BREAKS = [
    (rows, "_simplex", two_sided_simplex, {"angle", "sum"}),
    (rows, "_simplex", one_sided_simplex, {"sum", "angle"}),
    (rows, "_directions", lambda key, rows, away, n: away.expand(-1, n, -1), {"tilt", "length"}),
    (param_growth, "channel_scale", flat_scale, {"read", "sum"}),
    (maps, "grouped", lambda kv, new_kv, g, new_g: spread(kv * g, new_kv * new_g), {"read", "gain"}),
]


@pytest.mark.parametrize(("home", "name", "wrong", "signs"), BREAKS, ids=["even", "sided", "along", "scale", "group"])
def test_the_oracle_notices(monkeypatch, home, name, wrong, signs):
    old = config("ngpt", GQA)
    new = config("ngpt", GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52, "d_ff": 233})
    axis_maps.cache_clear()
    monkeypatch.setattr(home, name, wrong)
    state = lively_state(old)
    found = violations(old, new, state, megabus.grow_state(state, old, new, 1, how()), "even")
    axis_maps.cache_clear()
    assert all(found[sign] > 1e-2 for sign in signs), found
