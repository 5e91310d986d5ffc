"""Read rows that tilt towards new channels: what they see, what makes up for it, and what it is for."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

import megabus
from megabus import counter
from megabus.growth import param_growth, rows
from megabus.growth.maps import axis_maps
from megabus.model.decoder import param_specs
from tests.support.growing import (
    CHANNELS,
    FRACTION,
    MANY,
    change_of,
    copy_matrix,
    gradients,
    how,
    isometry,
    mean_squares,
    row_matrices,
)
from tests.support.small_models import GQA, KINDS, config, lively_state

torch.set_num_threads(1)

WIDE = [{"d_model": 52}, FRACTION, MANY]


def grown_pair(kind="ngpt", after=FRACTION, **manner):
    """A model and what it grows into: (old, new, state, grown state)."""
    old, new = config(kind, GQA), config(kind, GQA, {**after, "n_heads": 4})
    state = lively_state(old)
    return old, new, state, megabus.grow_state(state, old, new, 1, how(read="tilt", **manner))


def readers(model):
    """Specs of the matrices that h is multiplied with, of the grown model's own layers."""
    return [spec for spec in param_specs(model).values() if spec.role == "read" and not spec.lookup]


def parent_of(spec, old, new):
    """The old tensor's name: `append` begins the pile again."""
    return spec.name if spec.layer is None else spec.in_layer(spec.layer % old.n_layers)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("after", WIDE, ids=["one", "fraction", "many"])
def test_a_read_row_is_its_parent_and_a_direction_that_no_old_h_has(after, channels):
    """cos E w + sin c with Eᵀc = 0 and cos² = d/d': unit rows, and no two rows look the same way."""
    old, new, state, grown = grown_pair(after=after, channels=channels)
    E, rows = isometry(old.d_model, new.d_model, channels), row_matrices(old, new)
    cos = sqrt(old.d_model / new.d_model)
    for spec in readers(new):
        row = grown[spec.name].double()
        wanted = rows[spec.rows] @ state[parent_of(spec, old, new)].double()
        assert (row @ E - cos * wanted).abs().max() < 3e-7, spec.name
        assert (row.norm(dim=-1) - 1).abs().max() < 2e-7, spec.name
        c = row - cos * wanted @ E.T
        assert (c.norm(dim=-1) - sqrt(1 - cos**2)).abs().max() < 1e-6
        alike = (c @ c.T / (1 - cos**2)).fill_diagonal_(0).abs().max()
        assert alike < 1 - 1e-6, spec.name


def test_the_baselines_read_rows_get_entries_of_the_initial_size():
    """w + c: nothing shrinks, so nothing has to make up for it; as much in new channels as initial entries have."""
    old, new, state, grown = grown_pair("gpt", MANY)
    E, rows = isometry(old.d_model, new.d_model, "even"), row_matrices(old, new)
    for spec in readers(new):
        wanted = rows[spec.rows] @ state[parent_of(spec, old, new)].double()
        assert torch.allclose(grown[spec.name].double() @ E, wanted, atol=1e-6)
        c = grown[spec.name].double() - wanted @ E.T
        assert torch.allclose(c.norm(dim=-1), torch.tensor(spec.init * sqrt(131 - 36)).double(), rtol=1e-5)


def any_directions(param, numbers):
    """Without the projection on what no old h has."""
    return counter.unit_rows(counter.normals(param.key, numbers, param.width))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_old_h_can_see_would_change_the_function(monkeypatch, kind):
    monkeypatch.setattr(rows, "_unseen_directions", any_directions)
    assert change_of(*grown_pair(kind)) > 1e-2


@pytest.mark.parametrize("name", ["layers.0.s_v", "output.s_z"])
def test_gains_that_do_not_make_up_would_change_the_function(name):
    old, new, state, grown = grown_pair()
    assert change_of(old, new, state, grown) < 1e-6
    assert change_of(old, new, state, grown | {name: grown[name] * sqrt(36 / 52)}) > 1e-3


def test_no_two_matrices_seeds_or_growths_draw_the_same_directions():
    """All read rows of the old model alike, so that what differs is what was drawn."""
    old, wider, widest = (config("ngpt", GQA, {"d_model": width}) for width in (36, 52, 75))
    state = lively_state(old)
    for spec in readers(old):
        state[spec.name] = state["layers.0.attn.q"][:12].repeat(-(-len(state[spec.name]) // 12), 1)[
            : len(state[spec.name])
        ]
    seen, E = [], isometry(36, 52, "even").float()
    for seed in (1, 2):
        grown = megabus.grow_state(state, old, wider, seed, how(read="tilt"))
        again = megabus.grow_state(grown, wider, widest, seed, how(read="tilt"))
        for spec in readers(wider):
            outside = grown[spec.name] - grown[spec.name] @ E @ E.T
            seen.append(outside[0] / outside[0].norm())
            seen.append(again[spec.name][0, :52] / again[spec.name][0, :52].norm())
    alike = torch.stack(seen) @ torch.stack(seen).T
    assert alike.fill_diagonal_(0).abs().max() < 0.999
    assert len(seen) == 2 * 2 * len(readers(wider))


def test_raw_gains_stay_as_they_are():
    """What a random direction of d' entries has less on each than one of d is what the root of d in a gain is for."""
    _, new, state, grown = grown_pair(after={"d_model": 52})
    for name in ("layers.0.s_v", "output.s_z"):
        assert torch.allclose(grown[name], state[name], rtol=1e-6)
    assert param_specs(new)["output.s_z"].compensates_read_tilt


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_first_moments_are_the_gradient_as_far_as_the_old_model_knew_it(kind, channels):
    """Where only d_model grows. Read rows see old h alone: all of the gradient. What h is made of is seen from new
    channels too, which the old model knew nothing of: E's part of the gradient."""
    old, new, state, grown = grown_pair(kind, {"d_model": 52}, channels=channels)
    before, after = gradients(old, state), gradients(new, grown)
    manner = how(moments="grow", read="tilt", channels=channels)
    mapped = megabus.grow_state({n: g.float() for n, g in before.items()}, old, new, 1, manner, "exp_avg")
    E, C = isometry(36, 52, channels), copy_matrix(36, 52)
    plain = megabus.grow_state({n: g.float() for n, g in before.items()}, old, new, 1, how(moments="grow"), "exp_avg")
    for name, spec in param_specs(new).items():
        found, wanted = mapped[name].double(), after[name].double()
        if spec.is_matrix and (spec.role == "write" or spec.lookup):
            found, wanted = found @ E, wanted @ E
        elif spec.rows == "embed":  # a channel's copies together: what h is made of again, times a branch's E
            found, wanted = C.T @ found, C.T @ wanted
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
    if kind == "ngpt":  # control: read rows' gradients are larger by 1 / cos
        assert not torch.allclose(plain["layers.0.attn.q"].double(), after["layers.0.attn.q"].double(), rtol=0.1)


def ratios_of_squares(after, **manner):
    """Mean squares of gradients over many batches, over the mapped second moments: of every parameter along embed, by
    how many copies a channel has and which of them it is."""
    old, new = config("ngpt", GQA), config("ngpt", GQA, after)
    state, manner = lively_state(old), how(moments="grow", read="tilt", **manner)
    grown = megabus.grow_state(state, old, new, 1, manner)
    true = mean_squares(new, grown)
    mapped = megabus.grow_state(mean_squares(old, state), old, new, 1, manner, "exp_avg_sq")
    embed, found = axis_maps(old, new)["embed"], {}
    for name, spec in param_specs(new).items():
        for family in {*zip(embed.copies.tolist(), embed.copy.tolist(), strict=True)}:
            at = torch.from_numpy((embed.copies == family[0]) & (embed.copy == family[1]))
            if spec.is_matrix or spec.rows == "embed":
                x, y = true[name][..., at], mapped[name][..., at]
                found[name, family] = float(x.sum() / y.sum())
    return found


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("width", [52, 72, 100])
def test_second_moments_are_as_large_as_the_squares(monkeypatch, channels, width):
    """On every kind of entry, and not so by any of the other rules: a^2 for all, with or without the cosine."""
    found = ratios_of_squares({"d_model": width}, channels=channels)
    assert 0.6 < min(found.values()) <= max(found.values()) < 1.6, found
    written = [value for (name, _), value in found.items() if name.endswith(("embed.weight", "out", "down"))]
    assert 0.7 < min(written) <= max(written) < 1.4, found
    monkeypatch.setattr(param_growth, "_channel_power", lambda growth, spec, kind: 2 if spec.is_matrix else 4)
    wrong = ratios_of_squares({"d_model": width}, channels=channels)
    assert max(wrong.values()) > 1.7, wrong


def test_the_baselines_second_moments_are_those_of_plain_rows():
    """Fresh entries are of the initial size, whatever the rows have become: what they add is not known."""
    old, new = config("gpt", GQA), config("gpt", GQA, FRACTION, {"n_heads": 4})
    squares = mean_squares(old, lively_state(old))
    plain, tilted = (
        megabus.grow_state(squares, old, new, 1, how(moments="grow", read=read), "exp_avg_sq")
        for read in ("clone", "tilt")
    )
    assert all(torch.equal(plain[name], x) for name, x in tilted.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_h_is_made_of_learns_new_channels_at_once(kind):
    """The gradient of embeddings and write rows outside of E's image: nothing without the tilt, so that new channels
    have to wait until copies of heads and units have come apart."""
    shares = {}
    for read in ("clone", "tilt"):
        old, new = config(kind, GQA), config(kind, GQA, {"d_model": 52})
        grown = megabus.grow_state(lively_state(old), old, new, 1, how(read=read))
        E = isometry(36, 52, "even")
        shares[read] = {}
        for name, g in gradients(new, grown).items():
            spec = param_specs(new)[name]
            if spec.is_matrix and (spec.lookup or spec.role == "write"):
                outside = g.double() - g.double() @ E @ E.T
                shares[read][name] = float(outside.norm() / g.norm())
    assert max(shares["clone"].values()) < 1e-5
    assert min(shares["tilt"].values()) > 0.05
