"""A rank's own part of the training state, as it travels between engines, growth and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megabus.parallel.placement import Piece

Kind = str
"""`weight`, an Adam moment, or the running mean of the weights with some decay, `ema-0.999`."""
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("weight", *MOMENTS)
EMA = "ema"

Fragments = dict[Piece, dict[Kind, Tensor]]
"""For each interval that a rank owns, in canonical order: its fp32 weight and, once there are any, its moments, and
its running means where there are such."""


def ema_kind(decay: float) -> Kind:
    """The kind of tensor that a running mean of this decay is."""
    return f"{EMA}-{decay!r}"


def ema_kinds(decays: Sequence[float]) -> tuple[Kind, ...]:
    return tuple(map(ema_kind, decays))


def decay_of(kind: Kind) -> str | None:
    """The decay of a running mean, as its kind names it; None of other kinds."""
    sort, _, decay = kind.partition("-")
    return decay if sort == EMA else None


def sort_of(kind: Kind) -> Kind:
    """What its growth depends on: that of all running means is one, `ema`."""
    return kind if decay_of(kind) is None else EMA
