"""Growth keeps the function; what does not keep it is noticed."""

from __future__ import annotations

from math import sqrt
from typing import get_args

import pytest
import torch

import megabus
from megabus.config.schema import Depth
from megabus.growth import param_growth, rows
from megabus.kernels.eager import residual
from megabus.model.decoder import param_specs
from tests.support.growing import (
    CHANNELS,
    FRACTION,
    MANY,
    READS,
    WIDTH_IDS,
    change_of,
    flat_scale,
    grow_and_compare,
    how,
    logits_of,
    one_sided_simplex,
    same,
)
from tests.support.small_models import GQA, KINDS, config, lively_state, loss_of, model_of

torch.set_num_threads(1)

STEPS = [
    ({}, FRACTION),
    ({}, MANY),
    ({}, {"d_model": 36, "n_layers": 5}),
    ({}, {"d_model": 37}),
    (GQA, {"n_heads": 6, "n_kv_heads": 3, **{k: FRACTION[k] for k in ("d_model", "d_ff", "n_layers")}}),
    (GQA, {"n_heads": 6, "d_model": 52}),
    (GQA, {"n_heads": 9, "n_kv_heads": 3, "d_model": 52}),
    ({}, FRACTION | {"alpha_init": 0.03, "s_z_init": 1.2, "init_std": 0.017, "head_init_std": 0.014}),
]
STEP_IDS = ["fraction", "many", "depth", "one", *WIDTH_IDS[2:], "transfer"]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), STEPS, ids=STEP_IDS)
def test_tilt_and_silent_layers_keep_the_function(kind, before, after, channels, read):
    old, new = config(kind, before), config(kind, before, after)
    state = lively_state(old)
    assert logits_of(old, state).std() > 0.1
    grown = megabus.grow_state(state, old, new, 1, how(channels=channels, read=read))
    assert change_of(old, new, state, grown) <= 1e-6
    losses = [loss_of(model_of(*at, torch.float32)).item() for at in ((old, state), (new, grown))]
    assert abs(losses[0] - losses[1]) <= 1e-6


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), STEPS, ids=STEP_IDS)
def test_growth_is_exact_but_for_the_rounding_of_storage(monkeypatch, kind, before, after, channels, read):
    """The same in fp64 all through."""
    old, new = config(kind, before), config(kind, before, after)
    state = {name: x.double() for name, x in lively_state(old).items()}
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    grown = megabus.grow_state(state, old, new, 1, how(channels=channels, read=read))
    assert all(x.dtype == torch.float64 for x in grown.values())
    assert change_of(old, new, state, grown) <= 2e-14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", ["append", "identity"])
@pytest.mark.parametrize("read", READS)
def test_three_growths_in_a_row_keep_the_function(read, depth, kind):
    first = config(kind)
    sizes = [
        config(kind, {"d_model": 41, "n_heads": 3, "d_ff": 70}),
        config(kind, {"d_model": 52, "n_heads": 4, "d_ff": 99, "n_layers": 4}),
        config(kind, {"d_model": 75, "n_heads": 7, "d_ff": 150, "n_layers": 7}),
    ]
    start = state = lively_state(first)
    now = first
    for size in sizes:
        state, now = megabus.grow_state(state, now, size, 7, how(read=read, depth=depth)), size
    assert change_of(first, now, start, state) <= 1e-6


@pytest.mark.parametrize("write", ["tilt", "clone"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["weight", "exp_avg", "exp_avg_sq"])
def test_growing_nothing_is_the_identity_bitwise(kind, write, weights):
    same_size = config(kind, GQA)
    state = lively_state(same_size)
    manner = how(write=write, read="tilt", moments="grow", channels="uneven")
    assert same(megabus.grow_state(state, same_size, same_size, 1, manner, weights), state)
    grown = megabus.grow_state(state, same_size, config(kind, GQA, {"d_ff": 63}), 1, manner, weights)
    assert not same(grown, state)


def test_clones_are_exact_only_where_a_gain_can_make_up_for_them():
    """ffn units and whole multiples of heads, but not 2 -> 3 heads: a head has no gain to halve."""
    assert grow_and_compare(config(), config("ngpt", {"d_ff": 90}), write="clone") < 1e-6
    assert grow_and_compare(config(), config("ngpt", {"n_heads": 4}), write="clone") < 1e-6
    assert grow_and_compare(config(), config("ngpt", {"n_heads": 3}), write="clone") > 1e-2
    assert grow_and_compare(config("gpt"), config("gpt", FRACTION), write="clone") < 1e-6


def test_zero_rows_grow_without_nan():
    for kind in KINDS:
        old, new = config(kind), config(kind, MANY)
        state = lively_state(old)
        for layer in range(3):
            state[f"layers.{layer}.attn.out"][3:7] = 0
        for write in ("tilt", "clone"):
            grown = megabus.grow_state(state, old, new, 1, how(write=write))
            assert all(x.isfinite().all() for x in grown.values())
            assert (grown["layers.0.attn.out"].norm(dim=-1) == 0).any()


def forget_root_d(grown):
    for name, x in grown.items():
        if name.endswith("s_v"):
            x *= sqrt(52 / 36)


def wake_copies(grown):
    for layer in (3, 4):
        grown[f"layers.{layer}.alpha_attn"] += grown[f"layers.{layer - 3}.alpha_attn"]


def keep_raw_scale(grown):
    grown["output.s_z"] *= sqrt(52 / 36)


def keep_raw_alpha(grown):
    grown["layers.0.alpha_mlp"] *= sqrt(52 / 36)


@pytest.mark.parametrize("spoil", [forget_root_d, wake_copies, keep_raw_scale, keep_raw_alpha])
def test_spoiled_growth_moves_the_function(spoil):
    old, new = config(), config("ngpt", FRACTION)
    state = lively_state(old)
    grown = megabus.grow_state(state, old, new, 1)
    assert change_of(old, new, state, grown) <= 1e-6
    spoil(grown)
    assert change_of(old, new, state, grown) > 1e-3


@pytest.mark.parametrize(
    ("home", "name", "wrong"),
    [(rows, "_simplex", one_sided_simplex), (param_growth, "channel_scale", flat_scale)],
    ids=["sum", "scale"],
)
def test_broken_rules_move_the_function(monkeypatch, home, name, wrong):
    monkeypatch.setattr(home, name, wrong)
    assert grow_and_compare(config(), config("ngpt", FRACTION)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_loud_layers_are_not_exact(kind):
    """`split` strays less than copies at full strength, since its gates still add up; `taper` less yet."""
    old, new = config(kind, {"n_layers": 2}), config(kind, {"n_layers": 4})
    state = lively_state(old)
    for name, spec in param_specs(old).items():
        if spec.gate and kind == "ngpt":  # as in a trained model
            state[name] *= 6
    change = {}
    for depth in get_args(Depth):
        change[depth] = change_of(old, new, state, megabus.grow_state(state, old, new, 1, how(depth=depth)))
    assert max(change.pop("append"), change.pop("identity")) <= 1e-6
    assert min(change.values()) > 1e-3
    assert change["taper"] < 0.75 * change["split"] < 0.75 * min(change[depth] for depth in ("stack", "interleave"))


def composed(h_ND, y_ND, alphas):
    for alpha in alphas:
        h_ND = residual(h_ND, y_ND, torch.full((h_ND.shape[1],), alpha, dtype=torch.float64))
    return h_ND


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5])
def test_shares_of_the_ratio_compose_on_the_sphere(alpha):
    """Towards the same y orthogonal to h, shares of alpha / (1 - alpha) miss only some r2 r1^2 / 2
    (docs/growth_derivations.md); shares of alpha miss more. An h that leans to y needs other shares: none are exact for
    all h."""
    h_ND, y_ND = torch.eye(2, dtype=torch.float64).split(1)
    r = alpha / (1 - alpha)
    shares = [3 / 4, 1 / 4]
    taper = [s * r / (1 + s * r) for s in shares]
    missed = {}
    for name, alphas in (("ratio", taper), ("alpha", [s * alpha for s in shares])):
        h_2 = composed(h_ND, y_ND, alphas)
        missed[name] = float(h_2[0, 1] / h_2[0, 0]) - r
    first, last = (s * r for s in shares)
    assert missed["ratio"] == pytest.approx(last * (sqrt(1 + first**2) - 1), rel=1e-12)
    assert 0 < missed["ratio"] < -missed["alpha"]
    leaning_ND = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
    once, twice = composed(leaning_ND, y_ND, [alpha]), composed(leaning_ND, y_ND, taper)
    assert (once - twice).abs().max() > alpha**2 / 20
