"""What becomes of a write row (a vector summed into h) when its head or ffn unit gets copies."""

from __future__ import annotations

import torch
from torch import Tensor

from megabus import counter

NOISE = 0.5  # relative length of `write: noise`


def _directions(key: int, parents: Tensor, away_B1D: Tensor, count: int) -> Tensor:
    """`count` orthonormal directions per row, orthogonal to `away` (unit rows or zero), keyed by old row number:
    (rows, count, D) fp64. Gram-Schmidt, twice over so that fp64 keeps all its digits."""
    found: list[Tensor] = []
    for number in range(count):
        draw_BD = counter.normals(counter.key(key, number), parents, away_B1D.shape[-1])
        for _ in range(2):
            for other_BD in (away_B1D[:, 0], *found):
                draw_BD = draw_BD - counter.row_sum(draw_BD * other_BD) * other_BD
        found.append(counter.unit_rows(draw_BD))
    return torch.stack(found, dim=1)


def _simplex(copies: int) -> Tensor:
    """Vertices of a regular simplex around 0, unit length: (copies, copies - 1); columns of Helmert's matrix."""
    vertices = torch.zeros(copies, copies - 1, dtype=torch.float64)
    for j in range(1, copies):
        side = (j * (j + 1)) ** -0.5
        vertices[:j, j - 1] = side
        vertices[j, j - 1] = -j * side
    return vertices * (copies / (copies - 1)) ** 0.5


def _length(w_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(unit rows, lengths); a zero row stays zero."""
    length_B1 = counter.row_sum(w_BD * w_BD).sqrt()
    return w_BD / length_B1.clamp_min(1e-300), length_B1


def tilt(w_BD: Tensor, parents: Tensor, copy: Tensor, copies: int, key: int) -> Tensor:
    """Copies number `copy` of rows w, each of `copies`: they keep w's length and sum to w exactly.

    w_k = w/n + |w| sqrt(1 - 1/n^2) t_k with t_k the vertices of a regular simplex orthogonal to w (n = 2: +t, -t;
    n = 3: three directions at 120 degrees). fp64 in, fp64 out.
    """
    unit_BD, length_B1 = _length(w_BD)
    basis_BND = _directions(key, parents, unit_BD[:, None], copies - 1)
    vertex_BN = _simplex(copies).to(w_BD.device)[copy]
    t_BD = torch.zeros_like(w_BD)
    for number in range(copies - 1):  # not einsum: its summation order may depend on shapes
        t_BD = t_BD + vertex_BN[:, number, None] * basis_BND[:, number]
    return w_BD / copies + length_B1 * ((1 - copies**-2) ** 0.5 * t_BD)


def noise(w_BD: Tensor, rows: Tensor, key: int, *, unit: bool, copies: int) -> Tensor:
    """w plus a random direction of half its length per new row; unit rows are renormalised, others divided."""
    _, length_B1 = _length(w_BD)
    noisy_BD = w_BD + NOISE * length_B1 * counter.unit_rows(counter.normals(key, rows, w_BD.shape[1]))
    return _length(noisy_BD)[0] if unit else noisy_BD / copies
