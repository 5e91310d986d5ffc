"""What a fitted curve says may depend on the losses' shape, and not on their unit."""

from __future__ import annotations

import numpy as np
import pytest

from megabus.kappa.curve_fit import fit_curve

C = np.arange(21.0, 61.0)
LAW = 2.0 + C**-0.3


def losses(h=0.02, tau=4.5, noise=0.005, seed=0):
    return LAW + h * np.exp(-(C - 20) / tau) + noise * np.random.default_rng(seed).standard_normal(len(C))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_unit_of_the_loss_changes_no_probability(seed):
    """A bump of four std of the noise, of which a fit is not sure."""
    one = fit_curve(C, losses(seed=seed), 20.0)
    assert 0.01 < one.p[one.H == 0].sum() < 0.99
    for unit in (0.01, 100.0):
        other = fit_curve(C, unit * losses(seed=seed), 20.0)
        np.testing.assert_allclose(other.p, one.p, rtol=1e-6)
        np.testing.assert_allclose(other.H, unit * one.H, rtol=1e-6, atol=1e-9 * unit)
