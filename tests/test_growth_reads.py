"""Read rows that tilt towards new channels: what they see, what makes up for it, and what it is for."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from growing import CHANNELS, FRACTION, MANY, change_of, copy_matrix, how, isometry, row_matrices
from small_models import GQA, KINDS, batch, config, lively_state, loss_of, model_of

import megabus
from megabus.growth import reads, rules
from megabus.model.decoder import param_specs

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
    """The old tensor's name: identity puts copies behind their originals."""
    return spec.name if spec.layer is None else spec.in_layer(spec.layer * old.n_layers // new.n_layers)


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
        assert alike < 1 - 1e-4 or new.d_model - old.d_model < 20, spec.name


def test_the_baselines_read_rows_get_entries_of_the_initial_size():
    """w + c: nothing shrinks, so nothing has to make up for it; as much in new channels as initial entries have."""
    old, new, state, grown = grown_pair("gpt", MANY)
    E, rows = isometry(old.d_model, new.d_model, "even"), row_matrices(old, new)
    for spec in readers(new):
        wanted = rows[spec.rows] @ state[parent_of(spec, old, new)].double()
        assert torch.allclose(grown[spec.name].double() @ E, wanted, atol=1e-6)
        c = grown[spec.name].double() - wanted @ E.T
        assert torch.allclose(c.norm(dim=-1), torch.tensor(spec.init * sqrt(131 - 36)).double(), rtol=1e-5)


def without_projection(w, numbers, key, embed, a, init):
    return reads.counter.unit_rows(reads.cosine(embed) * w + 0.5 * reads.counter.normals(key, numbers, w.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_old_h_can_see_would_change_the_function(monkeypatch, kind):
    monkeypatch.setattr(reads, "tilt", without_projection)
    assert change_of(*grown_pair(kind)) > 1e-2


@pytest.mark.parametrize("name", ["layers.0.s_v", "output.s_z"])
def test_gains_that_do_not_make_up_would_change_the_function(name):
    old, new, state, grown = grown_pair()
    assert change_of(old, new, state, grown) < 1e-6
    assert change_of(old, new, state, grown | {name: grown[name] * sqrt(36 / 52)}) > 1e-3


def test_raw_gains_stay_as_they_are():
    """What a random direction of d' entries has less on each than one of d is what the root of d in a gain is for."""
    _, new, state, grown = grown_pair(after={"d_model": 52})
    for name in ("layers.0.s_v", "output.s_z"):
        assert torch.allclose(grown[name], state[name], rtol=1e-6)
    assert param_specs(new)["output.s_z"].restores


def gradients(model_config, state):
    model = model_of(model_config, state)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


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


@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_are_as_large_as_the_squares(kind, monkeypatch):
    """Over a doubling of channels and many batches, parameter by parameter; half or twice as large is too far off."""
    old, new = config(kind, GQA), config(kind, GQA, {"d_model": 72})
    state, manner = lively_state(old), how(moments="grow", read="tilt")
    grown = megabus.grow_state(state, old, new, 1, manner)
    before, after = mean_squares(old, state), mean_squares(new, grown)
    mapped = megabus.grow_state(before, old, new, 1, manner, "exp_avg_sq")
    names = [name for name, spec in param_specs(new).items() if spec.is_matrix]
    ratios = {name: float(after[name].sum() / mapped[name].sum()) for name in names}
    if kind == "ngpt":
        assert 0.7 < min(ratios.values()) <= max(ratios.values()) < 1.4, ratios
    else:  # fresh entries have the initial size, not that of these rows
        assert all(abs(ratios[spec.name] - 1) < 1e-4 for spec in readers(new))
    monkeypatch.setattr(rules, "_read_share", lambda *_: 1.0)
    wrong = megabus.grow_state(before, old, new, 1, manner, "exp_avg_sq")
    if kind == "ngpt":
        assert float(after["embed.weight"].sum() / wrong["embed.weight"].sum()) > 1.4


def mean_squares(model_config, state):
    found = {}
    for seed in range(12):
        model = model_of(model_config, state)
        tokens, targets = batch(4, 31, seed)
        model.loss(model.hidden(tokens), targets)[0].backward()
        for name, p in model.named_parameters():
            found[name] = found.get(name, 0) + p.grad.square().float() / 12
    return found


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
