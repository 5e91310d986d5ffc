"""What becomes of a read row (a vector that h is multiplied with) when h gets channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megabus import counter
from megabus.growth.maps import AxisMap


def cosine(embed: AxisMap) -> float:
    """Of the angle by which unit rows turn: the old channels keep what they have of a random direction, sqrt(d/d')."""
    return float(np.sqrt((int(embed.parent[-1]) + 1) / len(embed)))


def tilt(w_BD: Tensor, numbers: Tensor, key: int, embed: AxisMap, a: np.ndarray, init: float | None) -> Tensor:
    """Rows w = E w_old and what they see of the new channels: cos w + sin c of unit rows; w + init sqrt(d' - d) c, as
    many fresh entries as there are new channels, where `init` is the standard deviation of entries.

    c is a random unit vector with Eᵀc = 0, so c . h = 0 for every h = E h_old. numbers: (B,) of the new rows, which key
    the draws; a: E's entries, (D,). fp64 in, fp64 out.
    """
    parent, scale = torch.from_numpy(embed.parent).to(w_BD.device), torch.from_numpy(a).to(w_BD.device)
    c_BD = counter.normals(key, numbers, w_BD.shape[1])
    inside_BD = c_BD.new_zeros(len(c_BD), int(embed.parent[-1]) + 1)
    for copy in range(int(embed.copies.max())):  # in a fixed order: a family's sum has the same bits everywhere
        at = torch.from_numpy(np.flatnonzero(embed.copy == copy)).to(w_BD.device)
        inside_BD[:, parent[at]] += scale[at] * c_BD[:, at]
    c_BD = counter.unit_rows(c_BD - scale * inside_BD[:, parent])
    if init is not None:
        return w_BD + init * (c_BD.shape[1] - inside_BD.shape[1]) ** 0.5 * c_BD
    cos = cosine(embed)
    return cos * w_BD + (1 - cos**2) ** 0.5 * c_BD
