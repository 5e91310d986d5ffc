"""Rates by role: the rules' exponents, and no name."""

from __future__ import annotations

from math import sqrt

import pytest

from megabus.model.decoder import param_specs
from megabus.model.rates import relative_rate
from tests.support.small_models import config

TUNED = 4  # a ninth of the width


def rates(kind, **sizes):
    """By namesake; alike in all layers."""
    model, found = config(kind, **sizes), {}
    for spec in param_specs(model).values():
        found.setdefault(spec.namesake, set()).add(relative_rate(spec, model, TUNED))
    assert all(len(values) == 1 for values in found.values())
    return {name: values.pop() for name, values in found.items()}


# Written out once more: each parameter's power of 1/9.
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.gate", "mlp.down")
NGPT = dict.fromkeys((*MATRICES, "output.head.weight"), 3 / 4)
NGPT |= dict.fromkeys(("embed.weight", "s_qk", "alpha_attn", "alpha_mlp", "output.s_z"), 1 / 2)
NGPT |= dict.fromkeys(("s_u", "s_v"), 0)
GPT = dict.fromkeys((*MATRICES, "output.head.weight"), 1)
GPT |= dict.fromkeys(("embed.weight", "norm_attn.gain", "norm_mlp.gain", "output.norm.gain"), 0)


@pytest.mark.parametrize(("kind", "powers"), [("ngpt", NGPT), ("gpt", GPT)])
def test_every_parameter_has_its_roles_exponent(kind, powers):
    assert rates(kind) == pytest.approx({name: (1 / 9) ** power for name, power in powers.items()}, rel=1e-12)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_at_the_tuned_width_nothing_changes_whatever_else_does(kind):
    for sizes in ({}, {"n_layers": 7, "d_ff": 200, "n_heads": 4}):
        assert set(rates(kind, d_model=TUNED, **sizes).values()) == {1.0}


def test_ngpts_gains_keep_their_relative_speed():
    """rate / raw start is the same at every width."""
    for spec in param_specs(config("ngpt")).values():
        if spec.role == "gain":
            tuned = param_specs(config("ngpt", d_model=TUNED))[spec.name]
            assert relative_rate(spec, config("ngpt"), TUNED) / spec.init == pytest.approx(1 / tuned.init)
            assert spec.init in (1.0, pytest.approx(1 / sqrt(36)))
