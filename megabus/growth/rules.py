"""How rows grow: one pure function from old rows to new rows, the same for whole tensors and for shards.

Every step is element-wise or a fixed-order sum within one row, in fp64, and randomness is keyed by global row
numbers. Growing a shard therefore gives the same bits as cutting a shard from the grown tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabus import counter
from megabus.config.schema import GrowthConfig, ModelConfig
from megabus.growth import reads, writes
from megabus.growth.maps import AxisMap, LayerSource, axis_maps, channel_scale, layer_sources
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec
from megabus.parallel.fragments import Kind

BLOCK_BYTES = 1 << 24  # of temporaries: on CPUs larger blocks are no faster, and twice as large ones slower


@dataclass(frozen=True)
class Growth:
    """One growth: from a model to a larger one, in a given manner, with randomness from `seed`."""

    old: ModelConfig
    new: ModelConfig
    how: GrowthConfig
    seed: int

    def layer_source(self, spec: ParamSpec) -> LayerSource:
        """Origin of the layer that a parameter of the new model lives in (itself, outside the layers)."""
        if spec.layer is None:
            return LayerSource(0, 0, 1)
        return layer_sources(self.old.n_layers, self.new.n_layers, self.how.depth)[spec.layer]

    def old_spec(self, spec: ParamSpec) -> ParamSpec:
        """The old parameter that a new one grows from."""
        return param_specs(self.old)[spec.in_layer(self.layer_source(spec).parent)]

    def rows(self, spec: ParamSpec) -> AxisMap:
        return axis_maps(self.old, self.new)[spec.rows]

    def columns(self, spec: ParamSpec) -> np.ndarray:
        """The old column that every new one copies: (d_model,); gains have the one."""
        return axis_maps(self.old, self.new)["embed"].parent if spec.is_matrix else np.zeros(1, int)

    @property
    def cosine(self) -> float:
        """What read rows that turn towards new channels (`read: tilt`) keep of themselves; 1 where none turn."""
        turn = self.how.read == "tilt" and self.new.d_model > self.old.d_model
        return reads.cosine(axis_maps(self.old, self.new)["embed"]) if turn else 1.0

    @property
    def unit(self) -> bool:
        """Whether rows are unit vectors, as in nGPT."""
        return any(spec.unit for spec in param_specs(self.new).values())

    def sees_more(self, spec: ParamSpec) -> bool:
        """Whether a parameter's rows are read rows that turn towards new channels."""
        return spec.role == "read" and not spec.lookup and self.cosine < 1

    def gate(self, spec: ParamSpec) -> float:
        return self.layer_source(spec).gate(self.how.depth) if spec.gate else 1.0

    def added(self, spec: ParamSpec, rows: AxisMap | None = None) -> np.ndarray:
        """Which new rows (or which of `rows`) the growth has added to those that were there: (rows,) bool."""
        rows = self.rows(spec) if rows is None else rows
        # On the embed axis nothing is new, for there is no original to prefer: E spreads each channel over its copies.
        return ((rows.copy != 0) & (spec.rows != "embed")) | (self.layer_source(spec).copy != 0)

    def live(self, spec: ParamSpec, kind: Kind) -> np.ndarray:
        """Which new rows are grown from anything at all; the others are zeros. (rows,) bool."""
        rows = self.rows(spec)
        return np.full(len(rows), self.gate(spec) != 0) if kind == "weight" else _share(self, spec, kind, rows) != 0

    def mixing(self, spec: ParamSpec, kind: Kind) -> np.ndarray:
        """New rows of which every entry depends on all of the old row, not just on the column that it copies."""
        copies = self.rows(spec).copies
        return (copies > 1) & (kind == "weight" and _turns(self, spec))


def grow_blocks(
    growth: Growth,
    name: str,
    kind: Kind,
    start: int,
    stop: int,
    fetch: Callable[[np.ndarray], Tensor],
    limit: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of a new parameter's weight or Adam moment, block by block: (first row, rows (B, d_model)),
    gains (B,).

    `fetch` returns old rows of the same kind for an array of old row numbers. For gains a row is one entry. Computed
    in fp64, returned in the dtype of the old rows. A block, its temporaries and the block before it take no more than
    `limit` bytes, or what one row takes.
    """
    spec = param_specs(growth.new)[name]
    rows = growth.rows(spec)
    step = max(1, limit // row_bytes(growth, spec))
    for low in range(start, stop, step):
        part = slice(low, min(low + step, stop))
        block = AxisMap(rows.parent[part], rows.copy[part], rows.copies[part])
        yield low, _block(growth, spec, kind, block, low, fetch)


def row_bytes(growth: Growth, spec: ParamSpec) -> int:
    """The most memory that growing one row takes at a time, over any kind and manner (measured; a test holds it)."""
    copies = int(growth.rows(spec).copies.max())
    width = growth.new.d_model if spec.is_matrix else 1
    entries = 12 + 2 * copies if copies > 1 and _turns(growth, spec) else 14 if growth.sees_more(spec) else 6
    return 8 * (width * entries + 16)  # the last term: the row's numbers on its axes


def _block(
    growth: Growth, spec: ParamSpec, kind: Kind, rows: AxisMap, low: int, fetch: Callable[[np.ndarray], Tensor]
) -> Tensor:
    fetched = fetch(rows.parent)
    dtype, old = fetched.dtype, fetched.double()
    del fetched
    if kind == "weight":
        return _weight(growth, spec, old, rows, low).to(dtype)
    return _moment(growth, spec, kind, old, rows, low).to(dtype)


def _turns(growth: Growth, spec: ParamSpec) -> bool:
    """Whether copies of this parameter's rows are more than scaled copies."""
    return spec.role == "write" and growth.how.write != "clone"


def _weight(growth: Growth, spec: ParamSpec, old: Tensor, rows: AxisMap, low: int) -> Tensor:
    gate = growth.gate(spec)
    if gate == 0:  # not a product: where nothing is needed, nothing is sent, and a row may hold any bits
        return old.new_zeros(len(old), growth.new.d_model) if spec.is_matrix else torch.zeros_like(old)
    if spec.is_matrix:
        grown = _embed(growth, old, power=1)
        if growth.sees_more(spec):
            grown = _read(growth, spec, grown, low)
        if spec.role == "write" and rows.copies.max() > 1:
            grown = _write(growth, spec, grown, rows, low)
        return grown * gate
    # A gain acts as raw * multiplier: that product is what stays.
    grown = old * (growth.old_spec(spec).multiplier / spec.multiplier)
    if spec.restores:
        grown = grown / growth.cosine
    if spec.divides and growth.how.write != "tilt":
        grown = grown / torch.from_numpy(rows.copies).to(old.device)
    return grown * gate


def _embed(growth: Growth, old: Tensor, power: int) -> Tensor:
    """Rows times E^T: new channel i' takes a[i'] times its parent's entry (a^2 for second moments)."""
    embed = axis_maps(growth.old, growth.new)["embed"]
    parent = torch.from_numpy(embed.parent).to(old.device)
    scale = torch.from_numpy(channel_scale(embed, growth.how.channels) ** power).to(old.device)
    return old[:, parent].mul_(scale)


def _read(growth: Growth, spec: ParamSpec, w_BD: Tensor, low: int) -> Tensor:
    embed = axis_maps(growth.old, growth.new)["embed"]
    key = counter.key(growth.seed, spec.name, "read", w_BD.shape[1], len(growth.rows(spec)))
    numbers = torch.arange(low, low + len(w_BD), device=w_BD.device)
    a = channel_scale(embed, growth.how.channels)
    return reads.tilt(w_BD, numbers, key, embed, a, None if spec.unit else spec.init)


def _write(growth: Growth, spec: ParamSpec, w_BD: Tensor, rows: AxisMap, low: int) -> Tensor:
    how = growth.how.write
    key = counter.key(growth.seed, spec.name, how, *w_BD.shape[1:], len(growth.rows(spec)))
    parent, copy, copies = (torch.from_numpy(x).to(w_BD.device) for x in (rows.parent, rows.copy, rows.copies))
    number = torch.arange(low, low + len(w_BD), device=w_BD.device)
    grown = w_BD.clone()
    for count in np.unique(rows.copies):
        if count == 1:
            continue
        n, at = int(count), (copies == int(count)).nonzero()[:, 0]
        if how == "tilt":
            grown[at] = writes.tilt(w_BD[at], parent[at], copy[at], n, key)
        elif how == "noise":
            grown[at] = writes.noise(w_BD[at], number[at], key, unit=spec.unit, copies=n)
        elif not spec.unit:  # plain clones of rows that may shrink; unit rows leave it to the gain (`divides`)
            grown[at] = w_BD[at] / n
    return grown


def _share(growth: Growth, spec: ParamSpec, kind: Kind, rows: AxisMap) -> np.ndarray:
    """What each new row gets of its parent's gradient, in the mean or in the root mean square: (rows,) fp64."""
    if growth.how.moments == "reset":
        return np.zeros(len(rows))
    if growth.how.moments == "carry":
        return (~growth.added(spec, rows)).astype(np.float64)
    shared = spec.role != "write" and spec.rows != "embed"
    # A tilted copy sees delta . w_k where its parent saw delta . w. On average over directions that is a share 1/n of
    # it, but w_k is as long as w: the square is as large (a test measures it).
    if kind == "exp_avg_sq" and growth.how.write == "tilt":
        shared = False
    return 1.0 / rows.copies if shared else np.ones(len(rows))


def _powers_of_a(growth: Growth, spec: ParamSpec, kind: Kind) -> int:
    """What power of a the moment has on the copies of a channel.

    The gradient of E w is a g. Where unit rows have turned to see all channels, what h is made of gets a gradient in
    all of them: E's part, a g, and in the mean square (1 - a^2) g^2 outside of E's image, g^2 together. A gain of a
    channel of a branch multiplies that with an entry of the branch, which is E's: a more.
    """
    power, branch = (1 if kind == "exp_avg" else 2), 0 if spec.is_matrix else 1
    seen = growth.cosine < 1 and growth.unit and not growth.sees_more(spec) and kind == "exp_avg_sq"
    return power * ((0 if seen else 1) + branch)


def _moment(growth: Growth, spec: ParamSpec, kind: Kind, old: Tensor, rows: AxisMap, low: int) -> Tensor:
    """Moments follow the gradient: m like g, v like g^2.

    A loss that is a function of E w has gradient a * g on the copies of an entry; copies of a read row (or of
    its gain) share their family's gradient (in the mean: see `_share`), while each copy of a write row sees all of it.
    `carry` keeps only originals; `grow` maps everything; `reset` starts from zero.
    """
    power = 1 if kind == "exp_avg" else 2
    factor = torch.from_numpy(_share(growth, spec, kind, rows) ** power).to(old.device)
    dead = factor == 0  # their parents need not have been sent
    if spec.is_matrix:
        if growth.sees_more(spec) and spec.unit:  # what it reads shrank by the cosine, which is made up for
            factor = factor / growth.cosine**power
        grown = _embed(growth, old, _powers_of_a(growth, spec, kind))
        return grown.mul_(factor[:, None]).masked_fill_(dead[:, None], 0)
    scale = (spec.multiplier / growth.old_spec(spec).multiplier) ** power
    if spec.restores:
        scale *= growth.cosine**power
    if spec.rows == "embed":
        embed = axis_maps(growth.old, growth.new)["embed"]
        a = channel_scale(embed, growth.how.channels)[low : low + len(rows)]
        factor = factor * torch.from_numpy(a ** _powers_of_a(growth, spec, kind)).to(old.device)
    return (old * factor * scale).masked_fill_(dead, 0)
