"""The functions of `megabus.kernels.eager` through torch.compile: one pass forward, one backward, inputs recomputed.

Every size but 1 is a symbol of its own from the first call on. So on a CPU a growth compiles nothing anew, and a run
that is resumed after a growth computes with the same code as the run that grew.

On a GPU the last axis, which rows are summed along, keeps the size that it has: a row of known length is read once and
held, where one of any length is read in a loop. It changes when a growth widens the model, and is compiled anew then.
What the compiler guesses of the others from the first sizes that it sees may differ in a resumed run: how work is cut
into blocks, and with it the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor, _dynamo

from megabus.kernels import eager
from megabus.kernels.form import Kernels

WIDTHS = 256  # at most that a function is compiled for: torch's own limit is 8, and a run has more stages
# Without it, sizes that happen to be equal at the first call (N = d_ff, T = C / 2) become one symbol for ever.
OWN_SYMBOLS = shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]


def _compile(function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
    known = _dynamo.config.patch(recompile_limit=WIDTHS)

    @wraps(function)
    def call(*args: Any) -> Any:
        # Set for every call, for any may be the one that compiles. The setting is a thread's own, and with
        # recomputation calls come from autograd's threads too. It costs some 10 us, a twentieth of the call itself.
        with OWN_SYMBOLS, known:
            for x in args:
                if isinstance(x, Tensor) and x.device.type != "cpu":
                    _dynamo.mark_static(x, x.dim() - 1)
            return compiled(*args)

    return call


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


def unit_rows_(rows: Tensor) -> None:
    (_unit_rows_ if rows.is_cuda else eager.unit_rows_)(rows)  # PyTorch's own is faster on a CPU


COMPILED = Kernels(
    name="compiled",
    residual=residual,
    rms_norm=rms_norm,
    rotate=_rotate,
    rotate_unit=rotate_unit,
    attention=eager.attention,  # one call of PyTorch's own kernels: there is nothing to fuse
    gate=gate,
    cross_entropy_=eager.cross_entropy_,
    unit_rows_=unit_rows_,
)
