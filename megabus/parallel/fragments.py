"""A rank's own part of the training state, as it travels between engines, growth and checkpoints."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megabus.parallel.placement import Piece

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("weight", *MOMENTS)

Fragments = dict[Piece, dict[Kind, Tensor]]
"""For each interval that a rank owns, in canonical order: its fp32 weight and, once there are any, its moments."""
