"""How rows grow: one pure function from old rows to new rows, the same for whole tensors and for shards.

Every step is element-wise or a fixed-order sum within one row, in fp64, and randomness is keyed by global row
numbers. Growing a shard therefore gives the same bits as cutting a shard from the grown tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megabus import counter
from megabus.config.schema import ModelConfig
from megabus.growth.param_growth import ParamGrowth
from megabus.model.init import initial_rows
from megabus.model.params import axis_sizes
from megabus.parallel.fragments import EMA, MOMENTS, Kind, sort_of
from megabus.upload import upload

BLOCK_BYTES = 1 << 24  # of temporaries: on CPUs larger blocks are no faster, and twice as large ones slower


def grow_rows(
    param: ParamGrowth,
    kind: Kind,
    start: int,
    stop: int,
    fetch: Callable[[np.ndarray], Tensor],
    limit: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of a new parameter's weight, running mean of it or Adam moment, block by block: (first row,
    rows (B, d_model)), gains (B,).

    `fetch` returns old rows of the same kind for an array of old row numbers. For gains a row is one entry. Computed
    in fp64, returned in the dtype of the old rows. A block, its temporaries and the block before it take no more than
    `limit` bytes, or what one row takes.
    """
    step = max(1, limit // row_bytes(param))
    for low in range(start, stop, step):
        yield low, _block(param, kind, low, min(low + step, stop), fetch)


def drawn_rows(
    model: ModelConfig, name: str, seed: int, start: int, stop: int, device: torch.device, limit: int = BLOCK_BYTES
) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of a parameter that grows from nothing, as `grow_rows` gives them: `model`'s initial ones,
    fp32. A block and its temporaries take no more than `limit` bytes, or what one row takes."""
    step = max(1, limit // drawn_row_bytes(model))
    for low in range(start, stop, step):
        yield low, initial_rows(model, name, seed, low, min(low + step, stop), device)


def drawn_row_bytes(model: ModelConfig) -> int:
    """The most memory that drawing one row takes at a time (measured; a test holds it)."""
    return 8 * 6 * (axis_sizes(model)["embed"] + 1)


def row_bytes(param: ParamGrowth) -> int:
    """The most memory that growing one row takes at a time, over any kind (measured; a test holds it)."""
    copies = int(param.rows.copies.max())
    entries = 12 + 2 * copies if copies > 1 and param.write_tilt else 14 if param.read_tilt else 6
    return 8 * (param.width * entries + 16)  # the last term: the row's numbers on its axes


def _block(param: ParamGrowth, kind: Kind, low: int, high: int, fetch: Callable[[np.ndarray], Tensor]) -> Tensor:
    fetched = fetch(param.rows.parent[low:high])
    shape, dtype = (len(fetched), *(param.width for _ in fetched.shape[1:])), fetched.dtype
    old_BD = fetched.double().reshape(len(fetched), -1)
    del fetched
    if kind in MOMENTS:
        grown_BD = _moment(param, kind, old_BD, low)
    else:
        grown_BD = _weight(param, old_BD, low, sort_of(kind) == EMA)
    del old_BD
    return grown_BD.to(dtype).view(shape)


def _weight(param: ParamGrowth, old_BD: Tensor, low: int, mean: bool) -> Tensor:
    """mean: they are running means of weights. Those of unit rows are shorter, and grow to what their directions grow
    to, times their lengths."""
    if param.gate == 0:  # not a product: where nothing is needed, nothing is sent, and a row may hold any bits
        return old_BD.new_zeros(len(old_BD), param.width)
    w_BD = _on_new_channels(param, old_BD, param.scale)
    if param.read_tilt:
        w_BD = _tilt_read(param, w_BD, low, mean)
    if param.write_tilt:
        w_BD = _tilt_copies(param, w_BD, low)
    if param.multiplier != 1:
        w_BD *= param.multiplier
    if param.cosine != 1:
        w_BD /= counter.divisor(param.cosine, w_BD)
    if param.divisor is not None:
        w_BD /= _rows_of(param.divisor, low, w_BD)[:, None]
    if param.sphere and param.gate != 1:
        return _shared_on_sphere(w_BD, param.gate, param.sphere)
    return w_BD if param.gate == 1 else w_BD.mul_(param.gate)


def _shared_on_sphere(raw_BD: Tensor, share: float, unit: float) -> Tensor:
    """Raw gates of a copy that takes a share of what an alpha = raw * unit does to h.

    Norm(h + alpha (y - h)) is the direction of h + r y with r = alpha / (1 - alpha), and to second order r is what
    adds up over steps towards the same y (docs/growth_derivations.md). The share is one of r. An alpha of 1 leaves
    nothing of h, and shares of it or more do what it does.
    """
    alpha_BD = raw_BD * unit
    shared_BD = share * alpha_BD / (1 - (1 - share) * alpha_BD)
    return torch.where(alpha_BD < 1, shared_BD, alpha_BD) / counter.divisor(unit, alpha_BD)


def _moment(param: ParamGrowth, kind: Kind, old_BD: Tensor, low: int) -> Tensor:
    moment = param.moments[kind]
    grown_BD = _on_new_channels(param, old_BD, moment.channels)
    grown_BD *= _rows_of(moment.rows, low, grown_BD)[:, None]
    if moment.factor != 1:
        grown_BD *= moment.factor
    dead_B = ~_rows_of(param.live[kind], low, grown_BD)  # their parents need not have been sent
    return grown_BD.masked_fill_(dead_B[:, None], 0)


def _on_new_channels(param: ParamGrowth, old_BD: Tensor, scale: np.ndarray) -> Tensor:
    """Every new channel takes the entry of the one that it copies, times its scale: rows times E^T for E's entries."""
    parent, scale_D = (upload(x, old_BD.device) for x in (param.channels.parent, scale))
    return old_BD[:, parent].mul_(scale_D)


def _rows_of(values: np.ndarray, low: int, like: Tensor) -> Tensor:
    return upload(values[low : low + len(like)], like.device)


# ---- read rows: vectors that h is multiplied with, when h gets channels


def _tilt_read(param: ParamGrowth, w_BD: Tensor, low: int, mean: bool) -> Tensor:
    """Rows w = E w_old and what they see of the new channels, keep w + length c.

    c is a random unit vector with Eᵀc = 0, so c . h = 0 for every h = E h_old. Draws are keyed by the new row's number.
    """
    assert param.read_tilt is not None
    keep, length = param.read_tilt.keep, param.read_tilt.length
    numbers_B = torch.arange(low, low + len(w_BD), device=w_BD.device)
    c_BD = length * _unseen_directions(param, numbers_B)
    if mean and param.read_tilt.relative:
        c_BD *= counter.row_sum(w_BD * w_BD).sqrt()
    return keep * w_BD + c_BD


def _unseen_directions(param: ParamGrowth, numbers_B: Tensor) -> Tensor:
    """Random unit vectors c with Eᵀc = 0, of new rows with these numbers: (B, D) fp64."""
    embed = param.channels
    parent, scale = (upload(x, numbers_B.device) for x in (embed.parent, param.scale))
    c_BD = counter.normals(param.key, numbers_B, param.width)
    inside_BD = c_BD.new_zeros(len(c_BD), int(embed.parent[-1]) + 1)
    for copy in range(int(embed.copies.max())):  # in a fixed order: a family's sum has the same bits everywhere
        at = upload(np.flatnonzero(embed.copy == copy), numbers_B.device)
        inside_BD[:, parent[at]] += scale[at] * c_BD[:, at]
    return counter.unit_rows(c_BD - scale * inside_BD[:, parent])


# ---- write rows: vectors summed into h, when their head or ffn unit gets copies


def _tilt_copies(param: ParamGrowth, w_BD: Tensor, low: int) -> Tensor:
    """Tilt the rows that have copies; the others stay."""
    copies = param.rows.copies[low : low + len(w_BD)]
    if copies.max() == 1:
        return w_BD
    parent_B, copy_B = (_rows_of(x, low, w_BD) for x in (param.rows.parent, param.rows.copy))
    grown_BD = w_BD.clone()
    for count in np.unique(copies[copies > 1]).tolist():
        at = upload(np.flatnonzero(copies == count), w_BD.device)
        grown_BD[at] = _tilt_write(w_BD[at], parent_B[at], copy_B[at], count, param.key)
    return grown_BD


def _tilt_write(w_BD: Tensor, parents_B: Tensor, copy_B: Tensor, copies: int, key: int) -> Tensor:
    """Copies number `copy` of rows w, each of `copies`: they keep w's length and sum to w exactly.

    w_k = w/n + |w| sqrt(1 - 1/n^2) t_k with t_k the vertices of a regular simplex orthogonal to w (n = 2: +t, -t;
    n = 3: three directions at 120 degrees). fp64 in, fp64 out.
    """
    length_B1 = counter.row_sum(w_BD * w_BD).sqrt()
    unit_BD = w_BD / length_B1.clamp_min(1e-300)  # a zero row stays zero
    basis_BND = _directions(key, parents_B, unit_BD[:, None], copies - 1)
    vertex_BN = upload(_simplex(copies), w_BD.device)[copy_B]
    t_BD = torch.zeros_like(w_BD)
    for number in range(copies - 1):  # not einsum: its summation order may depend on shapes
        t_BD = t_BD + vertex_BN[:, number, None] * basis_BND[:, number]
    return w_BD / counter.divisor(copies, w_BD) + length_B1 * ((1 - copies**-2) ** 0.5 * t_BD)


def _directions(key: int, parents_B: Tensor, away_B1D: Tensor, count: int) -> Tensor:
    """`count` orthonormal directions per row, orthogonal to `away` (unit rows or zero), keyed by old row number:
    (B, count, D) fp64. Gram-Schmidt, twice over so that fp64 keeps all its digits."""
    found: list[Tensor] = []
    for number in range(count):
        draw_BD = counter.normals(counter.key(key, number), parents_B, away_B1D.shape[-1])
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
