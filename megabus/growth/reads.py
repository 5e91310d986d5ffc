"""What becomes of a read row (a vector that h is multiplied with) when h gets channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megabus import counter
from megabus.growth.maps import AxisMap


def kept(embed: AxisMap) -> float:
    """cos of the angle by which read rows leave the old channels' space: the share that as many of its dimensions
    have of a random direction's length, sqrt(d/d')."""
    return float(np.sqrt((embed.parent.max() + 1) / len(embed)))


def tilt(w_BD: Tensor, numbers: Tensor, key: int, embed: AxisMap, a: np.ndarray, *, unit: bool) -> Tensor:
    """Rows w = E w_old turned out of the image of E: cos(θ) w + sin(θ) c, or w + tan(θ) |w| c where they need not be unit
    vectors and no gain makes up for the cosine.

    c is a random unit vector for which Eᵀc = 0, so it sees nothing of any h = E h_old. numbers: (B,) of the new rows,
    which key the draws; a: E's entries, (D,). fp64 in, fp64 out.
    """
    cos = kept(embed)
    sin = (1 - cos**2) ** 0.5
    parent, scale = torch.from_numpy(embed.parent).to(w_BD.device), torch.from_numpy(a).to(w_BD.device)
    draw_BD = counter.normals(key, numbers, w_BD.shape[1])
    inside_BD = draw_BD.new_zeros(len(draw_BD), int(embed.parent.max()) + 1)
    for copy in range(int(embed.copies.max())):  # in a fixed order: a family's sum has the same bits everywhere
        at = torch.from_numpy(np.flatnonzero(embed.copy == copy)).to(w_BD.device)
        inside_BD[:, parent[at]] += scale[at] * draw_BD[:, at]
    c_BD = counter.unit_rows(draw_BD - scale * inside_BD[:, parent])
    if unit:
        return cos * w_BD + sin * c_BD
    return w_BD + sin / cos * counter.row_sum(w_BD * w_BD).sqrt() * c_BD
