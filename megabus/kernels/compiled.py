"""The functions of `megabus.kernels.eager` through torch.compile: one pass forward, one backward, inputs recomputed.

Every size is symbolic from the first call on. So a growth compiles nothing anew, and a run that is resumed after one
computes with the same code, and the same bits, as the run that grew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megabus.kernels import eager
from megabus.kernels.table import Kernels


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


_residual, _rms_norm, _gate = (_compile(f) for f in (eager.residual, eager.rms_norm, eager.gate))
_rotate, _rotate_unit, _unit_rows_ = (_compile(f) for f in (eager.rotate, eager.rotate_unit, eager.unit_rows_))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _plain(gain: Tensor | None) -> Tensor | None:
    """Never a parameter itself: torch.compile takes a parameter's size for fixed."""
    return None if gain is None else gain.view_as(gain)


def residual(h: Tensor, x: Tensor, alpha_D: Tensor) -> Tensor:
    return _residual(_flat(h), _flat(x), _plain(alpha_D)).view_as(h)


def rms_norm(h: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    return _rms_norm(_flat(h), _plain(gain_D), eps).view_as(h)


def gate(u: Tensor, v: Tensor, gain_u_F: Tensor | None, gain_v_F: Tensor | None) -> Tensor:
    return _gate(_flat(u), _flat(v), _plain(gain_u_F), _plain(gain_v_F)).view_as(u)


def rotate_unit(x: Tensor, cos_TC: Tensor, sin_TC: Tensor, gain_HC: Tensor | None) -> Tensor:
    return _rotate_unit(x, cos_TC, sin_TC, _plain(gain_HC))


COMPILED = Kernels("compiled", residual, rms_norm, _rotate, rotate_unit, gate, _unit_rows_)
